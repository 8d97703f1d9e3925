"""Half precision written into a graph, with the nodes that overflow kept in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.exporters.calibration import ranges
from bbt_accel.exporters.sessions import Feeds

LARGEST = 65504.0 / 2
"""Nodes with values beyond half of fp16's largest number stay in fp32: other rows and prompts may go further."""
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
"""Precision → the type that stands in the graph."""
NORMS = {"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
         "SkipSimplifiedLayerNormalization"}  # fmt: skip
"""Their sums of squares overflow first (RoBERTa, T5)."""

FP32_MAKERS = {"ConstantOfShape", "Range"}
"""Nodes that make fp32 from no fp32 input, often without saying so."""


def to_half(
    model: onnx.ModelProto, feeds: list[Feeds], folder: Path, dtype: int = TensorProto.FLOAT16
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph in fp16 with fp32 inputs and outputs, and the names of the nodes that overflow and stay in fp32.

    A node overflows when an input or output is beyond `LARGEST` on the rows of `feeds`. Norms stay in fp32 too.
    dtype: BFLOAT16 instead, which has fp32's range: masks and positions that are beyond `LARGEST` stay in fp32 too.
    """
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    names = [name for node in model.graph.node for name in node.output if name]
    found = ranges(model, feeds, names, folder)
    large = {name for name, (low, high) in found.items() if max(-low, high) > LARGEST}
    overflowing = [n.name for n in model.graph.node if large & {*n.input, *n.output}]
    norms = [n.name for n in model.graph.node if n.op_type in NORMS or n.op_type == "Pow"]
    floats = set(found) | {i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT}
    lower(model, floats, {*overflowing, *norms}, dtype)
    return model, overflowing


def lower(model: onnx.ModelProto, floats: set[str], kept: set[str], dtype: int) -> None:
    """Rewrite every float node but those named in `kept` to compute in `dtype`, with casts where the two meet.

    floats: names of all fp32 tensors that nodes make or the graph takes.
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    outputs = {o.name for o in graph.output}
    low: set[str] = set()  # tensors whose producer computes in dtype
    casts: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []

    def as_type(name: str, wanted: int) -> str:
        have = dtype if name in low else TensorProto.FLOAT
        if have == wanted or (name, wanted) in casts:
            return casts.get((name, wanted), name)
        other = f"{name}_{TensorProto.DataType.Name(wanted).lower()}"
        casts[name, wanted] = other
        if name in weights:
            graph.initializer.append(converted(weights[name], other, wanted))
        else:
            nodes.append(helper.make_node("Cast", [name], [other], f"cast_{other}", to=wanted))
        return other

    for node in list(graph.node):
        keep = node.name in kept or node.op_type in FP32_MAKERS or not set(node.output) & floats
        wanted = TensorProto.FLOAT if keep else dtype
        for i, name in enumerate(node.input):
            if name in floats or name in weights:
                node.input[i] = as_type(name, wanted)
        if not keep:
            set_type(node, dtype)
            low |= set(node.output) & floats
        nodes.append(node)
    for i, name in enumerate(list(outputs)):
        if name in low:
            nodes.append(helper.make_node("Cast", [f"{name}_low"], [name], f"output_{i}", to=TensorProto.FLOAT))
            rename(nodes[:-1], name, f"{name}_low")
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    del graph.value_info[:]


def converted(tensor: onnx.TensorProto, name: str, dtype: int) -> onnx.TensorProto:
    """A weight in another type, rounded to nearest; beyond fp16's range it becomes the largest number."""
    array = numpy_helper.to_array(tensor)
    if dtype == TensorProto.FLOAT16:
        limit = float(np.finfo(np.float16).max)
        return numpy_helper.from_array(np.clip(array, -limit, limit).astype(np.float16), name)
    return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)


def set_type(node: onnx.NodeProto, dtype: int) -> None:
    """Casts to fp32 and fp32 constants inside a lowered node become `dtype`."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = dtype
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(converted(attribute.t, attribute.t.name, dtype))


def rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
