"""Requests and responses of the Open Inference Protocol, with tensors as JSON or as binary data.

Specification: KServe, open-inference-protocol, inference_rest.md; Triton,
protocol/extension_binary_data.md.
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
from pydantic import BaseModel, BeforeValidator, Field

from bbt_accel.core.batch import shape_fits
from bbt_accel.errors import RequestError, clipped, first_problem

HEADER_LENGTH = "inference-header-content-length"  # of the JSON object that binary data follows
DTYPES: dict[str, Any] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "BYTES": np.dtype(object),
}
"""The protocol's data types that the models use; BYTES are texts, transferred as UTF-8."""
KINDS: dict[str, set[type]] = {
    "FP32": {int, float},
    "INT64": {int},
    "BYTES": {str},
}  # of JSON values
NAMES = {"FP32": "FP32 numbers", "INT64": "INT64 numbers", "BYTES": "texts"}
MOST_ELEMENTS = 2**40
"""Of a tensor, more than any request can hold."""
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
    """A parsed request: tensors by name, and for each requested output whether it is to be
    binary.
    """

    tensors: Tensors
    outputs: dict[str, bool]
    parameters: dict[str, Any]
    id: str | None


class _Part(BaseModel, strict=True, extra="ignore"):
    """A part of the JSON object. Unknown members are ignored: extensions of other servers use
    them.
    """


class _Parameters(_Part):
    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    binary_data: bool | None = None


class _Output(_Part):
    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=8)]
    data: list[Any] | None = None


def _few(parameters: object) -> object:
    """Before their values are validated: pydantic lists every problem of all values, before it
    counts them.
    """
    if isinstance(parameters, dict) and len(parameters) > 64:
        raise ValueError("more than 64 parameters")
    return parameters


class _Request(_Part):
    id: str | None = None
    parameters: Annotated[dict[str, str | int | float | bool], BeforeValidator(_few)] = {}
    inputs: Annotated[list[_Input], Field(max_length=64)] = []
    outputs: Annotated[list[_Output], Field(max_length=64)] | None = None


def read_request(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> InferRequest:
    """Read an inference request to a model with these inputs and outputs.

    header_length: the value of `Inference-Header-Content-Length`, None without it. The model itself
    checks that its inputs are complete. Raises RequestError (400) for whatever violates the
    specification or the model's metadata.
    """
    head, length = body, header_length
    if length is not None:
        if not (
            length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= len(body)
        ):
            raise RequestError(
                "Inference-Header-Content-Length must be a number, at most the length of the body"
            )
        head = body[: int(length)]
    try:
        # Not pydantic's own parser, whose values take a hundred times the memory of short ones.
        request = _Request.model_validate(json.loads(head.decode("utf-8")))
    except (ValueError, RecursionError) as error:  # a ValidationError is one
        raise RequestError(f"the request is malformed ({clipped(first_problem(error))})") from None
    known = {spec.name: spec for spec in inputs}
    tensors: Tensors = {}
    end = len(head)
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise RequestError(f"input {tensor.name} is given twice")
        start, end = end, end + (tensor.parameters.binary_data_size or 0)
        _check_input(tensor, known, header_length is not None)
        tensors[tensor.name] = (
            _from_json(tensor) if tensor.data is not None else _from_binary(tensor, body[start:end])
        )
    if end != len(body):
        raise RequestError(f"the body has {len(body)} bytes, but its header and inputs have {end}")
    return InferRequest(tensors, _wanted(request, outputs), request.parameters, request.id)


def _check_input(tensor: _Input, known: Mapping[str, TensorSpec], binary: bool) -> None:
    """Name, datatype, shape, and exactly one source of data. binary: whether the body may have
    binary data.
    """
    spec = known.get(tensor.name)
    if spec is None:
        raise RequestError(
            f"there is no input {clipped(tensor.name, 80)!r}; inputs are {', '.join(known)}"
        )
    if tensor.datatype != spec.datatype:
        raise RequestError(
            f"input {tensor.name} must be {spec.datatype}, not {clipped(tensor.datatype, 20)}"
        )
    if spec.datatype == "BYTES" and len(tensor.shape) == 2 and tensor.shape[1] == 1:
        tensor.shape = tensor.shape[:1]  # other clients send a column of texts
    if not shape_fits(tensor.shape, spec.shape):
        found = clipped(str(tensor.shape), 80)
        raise RequestError(
            f"input {tensor.name} must have the shape {list(spec.shape)}, not {found}"
        )
    if (
        math.prod(size or 1 for size in tensor.shape) > MOST_ELEMENTS
    ):  # an array without elements has a limit too
        raise RequestError(
            f"input {tensor.name} has a shape that is too large: {clipped(str(tensor.shape), 80)}"
        )
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise RequestError(
            f"input {tensor.name} needs data, or binary_data_size and binary data, but not both"
        )
    if size is not None and not binary:
        raise RequestError("binary data needs the header Inference-Header-Content-Length")


def _from_json(tensor: _Input) -> Tensor:
    """`data` flattened or nested, in row-major order; numbers must be of the data type."""
    values = _flattened(tensor)
    found = set(
        map(type, values)
    )  # before an array is made, whose elements would all have the longest one's size
    if list in found:
        raise RequestError(f"input {tensor.name} has ragged or too deeply nested data")
    if not found <= KINDS[tensor.datatype]:
        raise RequestError(f"input {tensor.name} must consist of {NAMES[tensor.datatype]}")
    if len(values) != math.prod(tensor.shape):
        raise RequestError(
            f"input {tensor.name} has {len(values)} elements, not those of {tensor.shape}"
        )
    try:
        with np.errstate(over="ignore"):  # the model refuses infinite numbers
            return np.array(values, DTYPES[tensor.datatype]).reshape(tensor.shape)
    except OverflowError:
        raise RequestError(
            f"input {tensor.name} must consist of {NAMES[tensor.datatype]}"
        ) from None


def _flattened(tensor: _Input) -> list[Any]:
    """The elements of `data`, whose nesting, if any, must be that of the shape (a column of texts
    may have another).
    """
    values = tensor.data or []
    for size in tensor.shape[1:] if tensor.datatype != "BYTES" else [1]:
        if not all(isinstance(value, list) and len(value) == size for value in values):
            break
        values = [element for value in values for element in value]
    return values


def _from_binary(tensor: _Input, data: bytes) -> Tensor:
    size, dtype = tensor.parameters.binary_data_size, DTYPES[tensor.datatype]
    if len(data) != size:
        raise RequestError(f"the body ends within input {tensor.name}")
    if tensor.datatype == "BYTES":
        return np.array(_texts(tensor, data), dtype).reshape(tensor.shape)
    if size != math.prod(tensor.shape) * dtype.itemsize:
        raise RequestError(
            f"input {tensor.name} of shape {tensor.shape} does not have {size} bytes"
        )
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
        raise RequestError(
            f"input {tensor.name} must consist of alternating lengths and UTF-8 texts"
        ) from None
    if len(texts) != math.prod(tensor.shape):
        raise RequestError(
            f"input {tensor.name} has {len(texts)} texts, but its shape is {tensor.shape}"
        )
    return texts


def _wanted(request: _Request, outputs: Sequence[TensorSpec]) -> dict[str, bool]:
    """The requested outputs, by default all, and whether each is returned as binary data."""
    names = [spec.name for spec in outputs]
    binary = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.binary_data for output in request.outputs or ()}
    if unknown := [name for name in wanted if name not in names]:
        raise RequestError(
            f"there is no output {clipped(unknown[0], 80)!r}; outputs are {', '.join(names)}"
        )
    return {
        name: binary if own is None else own
        for name, own in (wanted or dict.fromkeys(names)).items()
    }


def write_response(
    model: str,
    request: InferRequest,
    outputs: Tensors,
    specs: Sequence[TensorSpec],
    parameters: dict[str, str],
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a response. Raises RequestError for NaN or infinity as JSON,
    which has neither.
    """
    datatypes = {spec.name: spec.datatype for spec in specs}
    parts, blobs = [], []
    for name, binary in request.outputs.items():
        value, datatype = outputs[name], datatypes[name]
        part: dict[str, object] = {"name": name, "datatype": datatype, "shape": list(value.shape)}
        if binary:
            blobs.append(_to_binary(value, datatype))
            part["parameters"] = {"binary_data_size": len(blobs[-1])}
        elif datatype == "FP32" and not np.isfinite(value).all():
            raise RequestError(
                f"{name} has numbers that are not finite: the inputs are too large for the backbone"
            )
        else:
            part["data"] = value.reshape(-1).tolist()
        parts.append(part)
    answer = {
        "model_name": model,
        "model_version": "1",
        "outputs": parts,
        "id": request.id,
        "parameters": parameters,
    }
    head = json.dumps(
        {name: value for name, value in answer.items() if value not in (None, {})}
    ).encode()
    if not blobs:
        return head, {"content-type": "application/json"}
    return b"".join([head, *blobs]), {
        "content-type": "application/octet-stream",
        HEADER_LENGTH: str(len(head)),
    }


def _to_binary(value: Tensor, datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode("utf-8") for text in value.flat]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return value.astype(DTYPES[datatype]).tobytes()
