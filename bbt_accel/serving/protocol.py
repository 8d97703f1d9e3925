"""Requests and responses of the Open Inference Protocol, with tensors as JSON or as binary data.

Specification: KServe, open-inference-protocol, inference_rest.md; Triton, protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from bbt_accel.batch import shape_fits
from bbt_accel.bundle import first_problem
from bbt_accel.errors import RequestError

HEADER_LENGTH = "inference-header-content-length"  # of the JSON object that binary data follows
DTYPES: dict[str, Any] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8"), "BYTES": np.dtype(object)}
"""The protocol's data types that the models use; BYTES are texts, transferred as UTF-8."""
Tensor = npt.NDArray[Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the model's metadata describes it; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def config(self) -> dict[str, object]:
        """The entry in Triton's model configuration."""
        datatype = "TYPE_STRING" if self.datatype == "BYTES" else f"TYPE_{self.datatype}"
        return {"name": self.name, "data_type": datatype, "dims": list(self.shape)}


@dataclass(frozen=True)
class InferRequest:
    """A parsed request: tensors by name, and for each requested output whether it is to be binary."""

    tensors: Tensors
    outputs: dict[str, bool]
    parameters: dict[str, Any]
    id: str | None


class _Part(BaseModel, strict=True, extra="ignore"):
    """A part of the JSON object. Unknown members are ignored: extensions of other servers use them."""


class _Parameters(_Part):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool | None = None


class _Output(_Part):
    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data: list[Any] | None = None


class _Request(_Part):
    id: str | None = None
    parameters: dict[str, str | int | float | bool] = {}
    inputs: list[_Input] = []
    outputs: list[_Output] | None = None


def read_request(
    body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferRequest:
    """Read an inference request to a model with these inputs and outputs.

    header_length: the value of `Inference-Header-Content-Length`, None without it. The model itself checks that its
    inputs are complete. Raises RequestError (400) for whatever violates the specification or the model's metadata.
    """
    head, length = body, header_length
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= len(body)):
            raise RequestError("Inference-Header-Content-Length must be a number, at most the length of the body")
        head = body[: int(length)]
    try:
        request = _Request.model_validate_json(head)
    except ValidationError as error:
        raise RequestError(f"the request is malformed ({first_problem(error)})") from None
    known = {spec.name: spec for spec in inputs}
    tensors: Tensors = {}
    end = len(head)
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise RequestError(f"input {tensor.name} is given twice")
        start, end = end, end + (tensor.parameters.binary_data_size or 0)
        _check_input(tensor, known, header_length is not None)
        tensors[tensor.name] = _from_json(tensor) if tensor.data is not None else _from_binary(tensor, body[start:end])
    if end != len(body):
        raise RequestError(f"the body has {len(body)} bytes, but its header and inputs have {end}")
    return InferRequest(tensors, _wanted(request, outputs), request.parameters, request.id)


def _check_input(tensor: _Input, known: Mapping[str, TensorSpec], binary: bool) -> None:
    """Name, datatype, shape, and exactly one source of data. binary: whether the body may have binary data."""
    spec = known.get(tensor.name)
    if spec is None:
        raise RequestError(f"there is no input {tensor.name!r}; inputs are {', '.join(known)}")
    if tensor.datatype != spec.datatype:
        raise RequestError(f"input {tensor.name} must be {spec.datatype}, not {tensor.datatype}")
    if not shape_fits(tensor.shape, spec.shape):
        raise RequestError(f"input {tensor.name} must have the shape {list(spec.shape)}, not {tensor.shape}")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise RequestError(f"input {tensor.name} needs data, or binary_data_size and binary data, but not both")
    if size is not None and not binary:
        raise RequestError("binary data needs the header Inference-Header-Content-Length")


def _from_json(tensor: _Input) -> Tensor:
    """`data` flattened or nested, in row-major order; numbers must be of the data type."""
    texts = tensor.datatype == "BYTES"
    try:
        found = np.array(tensor.data, dtype=object if texts else None)
    except (ValueError, OverflowError):
        raise RequestError(f"input {tensor.name} has ragged or too deeply nested data") from None
    if list(found.shape) != tensor.shape and found.shape != (math.prod(tensor.shape),):
        raise RequestError(f"input {tensor.name} has data of shape {list(found.shape)}, not {tensor.shape}")
    allowed = {"FP32": "iuf", "INT64": "i", "BYTES": "O"}[tensor.datatype]
    if found.size and (found.dtype.kind not in allowed or (texts and not all(isinstance(v, str) for v in found.flat))):
        raise RequestError(f"input {tensor.name} must consist of {'texts' if texts else f'{tensor.datatype} numbers'}")
    with np.errstate(over="ignore"):  # the model refuses infinite numbers
        return found.astype(DTYPES[tensor.datatype]).reshape(tensor.shape)


def _from_binary(tensor: _Input, data: bytes) -> Tensor:
    size, dtype = tensor.parameters.binary_data_size, DTYPES[tensor.datatype]
    if len(data) != size:
        raise RequestError(f"the body ends within input {tensor.name}")
    if tensor.datatype == "BYTES":
        return np.array(_texts(tensor, data), dtype).reshape(tensor.shape)
    if size != math.prod(tensor.shape) * dtype.itemsize:
        raise RequestError(f"input {tensor.name} of shape {tensor.shape} does not have {size} bytes")
    return np.frombuffer(data, dtype).reshape(tensor.shape).copy()


def _texts(tensor: _Input, data: bytes) -> list[str]:
    """Each element is its length as an unsigned 32-bit integer, followed by its bytes."""
    texts, at = [], 0
    try:
        while at < len(data):
            (length,) = struct.unpack_from("<I", data, at)
            start, at = at + 4, at + 4 + length
            if at > len(data):
                raise RequestError(f"input {tensor.name} ends within an element")
            texts.append(data[start:at].decode("utf-8"))
    except (struct.error, UnicodeDecodeError):
        raise RequestError(f"input {tensor.name} must consist of alternating lengths and UTF-8 texts") from None
    if len(texts) != math.prod(tensor.shape):
        raise RequestError(f"input {tensor.name} has {len(texts)} texts, but its shape is {tensor.shape}")
    return texts


def _wanted(request: _Request, outputs: Sequence[TensorSpec]) -> dict[str, bool]:
    """The requested outputs, by default all, and whether each is returned as binary data."""
    names = [spec.name for spec in outputs]
    binary = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.binary_data for output in request.outputs or ()}
    if unknown := [name for name in wanted if name not in names]:
        raise RequestError(f"there is no output {unknown[0]!r}; outputs are {', '.join(names)}")
    return {name: binary if own is None else own for name, own in (wanted or dict.fromkeys(names)).items()}


def write_response(
    model: str, request: InferRequest, outputs: Tensors, specs: Sequence[TensorSpec], parameters: dict[str, str]
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a response. Raises RequestError for NaN or infinity as JSON, which has neither."""
    datatypes = {spec.name: spec.datatype for spec in specs}
    parts, blobs = [], []
    for name, binary in request.outputs.items():
        value, datatype = outputs[name], datatypes[name]
        part: dict[str, object] = {"name": name, "datatype": datatype, "shape": list(value.shape)}
        if binary:
            blobs.append(_to_binary(value, datatype))
            part["parameters"] = {"binary_data_size": len(blobs[-1])}
        elif datatype == "FP32" and not np.isfinite(value).all():
            raise RequestError(f"{name} has numbers that are not finite: the inputs are too large for the backbone")
        else:
            part["data"] = value.reshape(-1).tolist()
        parts.append(part)
    answer = {"model_name": model, "model_version": "1", "outputs": parts, "id": request.id, "parameters": parameters}
    head = json.dumps({name: value for name, value in answer.items() if value not in (None, {})}).encode()
    if not blobs:
        return head, {"content-type": "application/json"}
    return b"".join([head, *blobs]), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _to_binary(value: Tensor, datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode("utf-8") for text in value.flat]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return value.astype(DTYPES[datatype]).tobytes()
