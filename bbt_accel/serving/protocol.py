"""Requests and responses of the Open Inference Protocol, with tensors as JSON or as binary data.

Specification: KServe, open-inference-protocol, inference_rest.md; Triton, protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.bundle import first_problem
from bbt_accel.errors import RequestError

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header with the length of the JSON object that binary data follows."""
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

    def metadata(self) -> dict[str, object]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def config(self) -> dict[str, object]:
        """The entry in Triton's model configuration."""
        datatype = "TYPE_STRING" if self.datatype == "BYTES" else f"TYPE_{self.datatype}"
        return {"name": self.name, "data_type": datatype, "dims": list(self.shape)}


@dataclass
class InferRequest:
    """A parsed request: tensors by name, and for each requested output whether it is to be binary."""

    tensors: Tensors
    outputs: dict[str, bool]
    parameters: dict[str, Any] = field(default_factory=dict)
    id: str | None = None


# The schema of the JSON object. Unknown members are ignored: extensions of other servers use them.


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _InputParameters(_Part):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class _Input(_Part):
    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]]
    parameters: _InputParameters = _InputParameters()
    data: list[Any] | None = None


class _OutputParameters(_Part):
    binary_data: bool | None = None


class _Output(_Part):
    name: str
    parameters: _OutputParameters = _OutputParameters()


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
    head = body if header_length is None else body[: _length(header_length, len(body))]
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
    return InferRequest(tensors, _wanted(request, outputs), dict(request.parameters), request.id)


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= most):
        raise RequestError("Inference-Header-Content-Length must be a number, at most the length of the body")
    return int(text)


def _check_input(tensor: _Input, known: Mapping[str, TensorSpec], binary: bool) -> None:
    """Name, datatype, shape, and exactly one source of data. binary: whether the body may have binary data."""
    spec = known.get(tensor.name)
    if spec is None:
        raise RequestError(f"there is no input {tensor.name!r}; inputs are {', '.join(known)}")
    if tensor.datatype != spec.datatype:
        raise RequestError(f"input {tensor.name} must be {spec.datatype}, not {tensor.datatype}")
    fits = len(tensor.shape) == len(spec.shape) and all(
        wanted in (-1, size) for wanted, size in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise RequestError(f"input {tensor.name} must have the shape {list(spec.shape)}, not {tensor.shape}")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise RequestError(f"input {tensor.name} needs data, or binary_data_size and binary data, but not both")
    if size is not None and not binary:
        raise RequestError("binary data needs the header Inference-Header-Content-Length")


def _from_json(tensor: _Input) -> Tensor:
    """`data` flattened or nested, in row-major order; numbers must be of the data type."""
    allowed = {"FP32": "iuf", "INT64": "i", "BYTES": "O"}[tensor.datatype]
    try:
        found = np.array(tensor.data, dtype=object if tensor.datatype == "BYTES" else None)
    except (ValueError, OverflowError):
        raise RequestError(f"input {tensor.name} has ragged or too deeply nested data") from None
    if list(found.shape) != tensor.shape and found.shape != (math.prod(tensor.shape),):
        raise RequestError(f"input {tensor.name} has data of shape {list(found.shape)}, not {tensor.shape}")
    texts = tensor.datatype == "BYTES"
    if found.size and (found.dtype.kind not in allowed or (texts and not all(isinstance(v, str) for v in found.flat))):
        raise RequestError(f"input {tensor.name} must consist of {'texts' if texts else f'{tensor.datatype} numbers'}")
    with np.errstate(over="ignore"):  # the model refuses infinite numbers
        return found.astype(DTYPES[tensor.datatype]).reshape(tensor.shape)


def _from_binary(tensor: _Input, data: bytes) -> Tensor:
    size = tensor.parameters.binary_data_size
    if len(data) != size:
        raise RequestError(f"the body ends within input {tensor.name}")
    if tensor.datatype == "BYTES":
        return _texts(tensor, data)
    dtype = DTYPES[tensor.datatype]
    if size != math.prod(tensor.shape) * dtype.itemsize:
        raise RequestError(f"input {tensor.name} of shape {tensor.shape} does not have {size} bytes")
    return np.frombuffer(data, dtype).reshape(tensor.shape).copy()


def _texts(tensor: _Input, data: bytes) -> Tensor:
    """Each element is its length as an unsigned 32-bit integer, followed by its bytes."""
    texts, at = [], 0
    try:
        while at < len(data):
            (length,) = struct.unpack_from("<I", data, at)
            text = data[at + 4 : at + 4 + length]
            if len(text) != length:
                raise RequestError(f"input {tensor.name} ends within an element")
            texts.append(text.decode("utf-8"))
            at += 4 + length
    except (struct.error, UnicodeDecodeError):
        raise RequestError(f"input {tensor.name} must consist of alternating lengths and UTF-8 texts") from None
    if len(texts) != math.prod(tensor.shape):
        raise RequestError(f"input {tensor.name} has {len(texts)} texts, but its shape is {tensor.shape}")
    found = np.empty(len(texts), object)
    found[:] = texts
    return found.reshape(tensor.shape)


def _wanted(request: _Request, outputs: Sequence[TensorSpec]) -> dict[str, bool]:
    """The requested outputs, by default all, and whether each is returned as binary data."""
    names = [spec.name for spec in outputs]
    binary = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return dict.fromkeys(names, binary)
    wanted = {}
    for output in request.outputs:
        if output.name not in names:
            raise RequestError(f"there is no output {output.name!r}; outputs are {', '.join(names)}")
        own = output.parameters.binary_data
        wanted[output.name] = binary if own is None else own
    return wanted


def write_response(
    model: str, request: InferRequest, outputs: Tensors, specs: Sequence[TensorSpec], parameters: Mapping[str, object]
) -> tuple[bytes, dict[str, str]]:
    """The body of a response, and its headers.

    Raises RequestError when NaN or infinite numbers are requested as JSON, which cannot represent them.
    """
    datatypes = {spec.name: spec.datatype for spec in specs}
    parts: list[dict[str, object]] = []
    blobs: list[bytes] = []
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
    answer: dict[str, object] = {"model_name": model, "model_version": "1", "outputs": parts}
    if request.id is not None:
        answer["id"] = request.id
    if parameters:
        answer["parameters"] = dict(parameters)
    head = json.dumps(answer).encode()
    if not blobs:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join([head, *blobs]), headers


def _to_binary(value: Tensor, datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode("utf-8") for text in value.flat]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return value.astype(DTYPES[datatype]).tobytes()
