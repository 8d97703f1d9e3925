"""fp16 and bf16 graphs: weights and activations in half precision, with the nodes that overflow kept in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.bundle import Bundle
from bbt_accel.exporters.calibration import ranges
from bbt_accel.exporters.sessions import Feeds

LARGEST = 65504.0 / 2
"""Nodes with values beyond half of fp16's maximum stay in fp32: other rows and prompts may reach further."""
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
"""Precision → ONNX element type."""
NORMS = {"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
         "SkipSimplifiedLayerNormalization"}  # fmt: skip
"""Their sums of squares overflow first (RoBERTa, T5)."""
FP32_MAKERS = {"ConstantOfShape", "Range"}
"""Nodes that produce fp32 from no fp32 input, often without a type attribute."""
NOT_FLOAT = {"Shape", "Size", "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN"}
"""Operators whose outputs are never floats, whatever their inputs."""


def to_half(
    model: onnx.ModelProto, feeds: list[Feeds], folder: Path, dtype: int = TensorProto.FLOAT16
) -> tuple[onnx.ModelProto, list[str]]:
    """Convert a graph in place; its inputs and outputs stay fp32. Returns it and the nodes that stay fp32.

    A node stays fp32 when an input or output exceeds `LARGEST` on `feeds`; norms do too. The same nodes stay fp32 in
    BFLOAT16, whose range is that of fp32: those with masks and positions, which it would round coarsely.
    """
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    names = [name for node in model.graph.node for name in node.output if name]
    found = ranges(model, feeds, names, folder)
    large = {name for name, (low, high) in found.items() if max(-low, high) > LARGEST}
    overflowing = [n.name for n in model.graph.node if large & {*n.input, *n.output}]
    norms = [n.name for n in model.graph.node if n.op_type in NORMS or n.op_type == "Pow"]
    floats = set(found) | {i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT}
    Conversion(model.graph, floats, dtype).run({*overflowing, *norms})
    return model, overflowing


class Conversion:
    """A graph while it is converted: the tensors that are half precision so far, and the casts between the types.

    floats: names of all fp32 inputs and node outputs.
    """

    def __init__(self, graph: onnx.GraphProto, floats: set[str], dtype: int) -> None:
        self.graph, self.floats, self.dtype = graph, floats, dtype
        self.weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.half: set[str] = set()
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self, kept: set[str]) -> None:
        """Convert every float node except those named in `kept`."""
        for node in list(self.graph.node):
            self.add(node, node.name in kept)
        for i, name in enumerate([o.name for o in self.graph.output]):
            if name in self.half:
                rename(self.nodes, name, f"{name}_half")
                self.nodes.append(
                    helper.make_node("Cast", [f"{name}_half"], [name], f"output_{i}", to=TensorProto.FLOAT)
                )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        drop_unused(self.graph)
        del self.graph.value_info[:]

    def add(self, node: onnx.NodeProto, keep: bool) -> None:
        """Append a node, with casts in front of it where its inputs have the other type."""
        keep = keep or node.op_type in FP32_MAKERS or not set(node.output) & self.floats
        for i, name in enumerate(node.input):
            if name in self.floats or name in self.weights:
                node.input[i] = self.as_type(name, TensorProto.FLOAT if keep else self.dtype)
        if not keep:
            retype(node, TensorProto.FLOAT, self.dtype)
            self.half |= set(node.output) & self.floats
        self.nodes.append(node)

    def as_type(self, name: str, wanted: int) -> str:
        """The name of a tensor in another type; adds a cast, or a converted weight, the first time."""
        have = self.dtype if name in self.half else TensorProto.FLOAT
        if have == wanted or (name, wanted) in self.casts:
            return self.casts.get((name, wanted), name)
        other = f"{name}_{TensorProto.DataType.Name(wanted).lower()}"
        self.casts[name, wanted] = other
        if name in self.weights:
            self.graph.initializer.append(converted(self.weights[name], other, wanted))
        else:
            self.nodes.append(helper.make_node("Cast", [name], [other], f"cast_{other}", to=wanted))
        return other


def converted(tensor: onnx.TensorProto, name: str, dtype: int) -> onnx.TensorProto:
    """A weight in another type, rounded to nearest and clipped to the range of fp16."""
    array = numpy_helper.to_array(tensor)
    if dtype == TensorProto.FLOAT16:
        limit = float(np.finfo(np.float16).max)
        return numpy_helper.from_array(np.clip(array, -limit, limit).astype(np.float16), name)
    return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)


def retype(node: onnx.NodeProto, old: int, new: int) -> None:
    """Casts to the old type, and constants of it, become the new one."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
            attribute.i = new
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == old:
            attribute.t.CopyFrom(converted(attribute.t, attribute.t.name, new))


def rename(nodes: list[onnx.NodeProto], old: str, new: str) -> None:
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


# Emulating bf16 on a CPU -------------------------------------------------------------------------------------


def emulate_bf16(bundle: Bundle, folder: Path) -> Bundle:
    """A bf16 bundle with fp32 graphs, in `folder`, that round to bf16 wherever it would.

    ONNX Runtime has no bf16 kernels for CPUs. Tensor cores accumulate bf16 matmuls in fp32, as these graphs do.
    """
    for stage in bundle.info.stages:
        model = onnx.load(bundle.path / f"{stage}.onnx")
        round_to_bf16(model.graph)
        onnx.save(model, str(folder / f"{stage}.onnx"), save_as_external_data=True, location=f"{stage}.data")
    return Bundle(folder, bundle.info)


def round_to_bf16(graph: onnx.GraphProto) -> None:
    """Turn bf16 weights, constants and outputs into fp32 ones that are rounded to bf16."""
    low = {t.name for t in graph.initializer if t.data_type == TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.name in low:
            tensor.CopyFrom(converted(tensor, tensor.name, TensorProto.FLOAT))
    nodes: list[onnx.NodeProto] = []
    for original in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        nodes.append(node)
        if not outputs_bf16(node, low):
            continue
        retype(node, TensorProto.BFLOAT16, TensorProto.FLOAT)
        for i, name in enumerate(node.output):
            low.add(name)
            exact, rounded = f"{name}_exact", f"{name}_rounded"
            node.output[i] = exact
            nodes.append(helper.make_node("Cast", [exact], [rounded], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def outputs_bf16(node: onnx.NodeProto, low: set[str]) -> bool:
    bf16 = TensorProto.BFLOAT16
    if node.op_type == "Cast":
        return any(a.name == "to" and a.i == bf16 for a in node.attribute)
    constant = any(a.type == onnx.AttributeProto.TENSOR and a.t.data_type == bf16 for a in node.attribute)
    return constant or (node.op_type not in NOT_FLOAT and bool(low & set(node.input)))
