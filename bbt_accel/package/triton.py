"""config.pbtxt of a classifier in a model repository of Triton Inference Server.

It is a ModelConfig of Triton's model_config.proto; the layout is that of its user guide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import onnx

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
"""Of a classifier's inputs and outputs, which stay fp32 in every precision."""


def model_config(
    graph: onnx.GraphProto, name: str, rows: int, label_file: str, parameters: Mapping[str, str]
) -> str:
    """The text of config.pbtxt.

    rows: that Triton may put into one call, those of several requests too; the first axis of every
    tensor is theirs. label_file: a name of each class a line, for the classification extension.
    """
    lines = [
        f"name: {json.dumps(name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {rows}",
        "dynamic_batching { }",
        *_tensors("input", graph.input),
        *_tensors("output", graph.output, f' label_filename: "{label_file}"'),
    ]
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}')
    return "\n".join(lines) + "\n"


def _tensors(kind: str, values: Iterable[onnx.ValueInfoProto], more: str = "") -> Iterator[str]:
    for value in values:
        tensor = value.type.tensor_type
        sizes = tensor.shape.dim[1:]  # Triton adds the axis of a batch itself
        dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in sizes)
        entry = f'name: "{value.name}" data_type: {TYPES[tensor.elem_type]} dims: [ {dims} ]'
        yield f"{kind} {{ {entry}{more} }}"
