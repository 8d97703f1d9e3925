"""fp16 and bf16 graphs: weights and activations in half precision, with the nodes that overflow
kept in fp32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.core.bundle import Bundle
from bbt_accel.exporters.convert.calibration import intermediate_values
from bbt_accel.exporters.trace.graph import name_nodes, replace_nodes
from bbt_accel.exporters.trace.sessions import Feeds

LARGEST = 65504.0 / 2
"""Nodes with values beyond half of fp16's maximum stay in fp32: other rows and prompts may reach
further.
"""
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}  # precision → ONNX element type
FP32_OPERATORS = {
    "LayerNormalization",
    "SkipLayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Pow",
}
"""Norms, whose sums of squares overflow first (RoBERTa, T5)."""
AFTER_MEAN = {"Add", "Sqrt", "Pow", "Reciprocal", "Div"}
"""What follows the mean of squares in a norm that is written out, up to the reciprocal of its
root.
"""
FP32_MAKERS = {
    "ConstantOfShape",
    "Range",
}  # produce fp32 from no fp32 input, often without a type attribute


def to_half(
    model: onnx.ModelProto, feeds: list[Feeds], folder: Path, dtype: int = TensorProto.FLOAT16
) -> list[str]:
    """Convert a graph in place; its inputs and outputs stay fp32. Returns the nodes that stay fp32
    lest they overflow.

    folder: of the file with the weights that are not inside the graph; each is read when it is
    converted. A node stays fp32 when an input or output exceeds `LARGEST` on `feeds`; norms and
    positions do too, whole or written out. The same nodes stay fp32 in BFLOAT16, whose range is
    that of fp32.
    """
    name_nodes(model.graph)
    floats = {
        i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    large: set[str] = set()
    outputs = [name for node in model.graph.node for name in node.output if name]
    for values in intermediate_values(model, feeds, outputs, folder):
        floats |= values.keys()
        large |= {name for name, value in values.items() if np.abs(value).max() > LARGEST}
    conversion = Conversion(model.graph, floats, dtype, folder)
    overflowing = [node.name for node in model.graph.node if large & {*node.input, *node.output}]
    exact = {*overflowing, *angles(model.graph, floats), *mean_squares(model.graph)}
    for node in model.graph.node:
        conversion.add(node, node.name in exact or node.op_type in FP32_OPERATORS)
    for name in floats & {output.name for output in model.graph.output}:
        conversion.as_type(name, half=False)
    replace_nodes(model.graph, conversion.nodes)
    return overflowing


def angles(graph: onnx.GraphProto, floats: set[str]) -> set[str]:
    """Names of the nodes that compute with positions: half precision has no digits for their turns
    and buckets.

    Sines and cosines are of rotary positions, logarithms of relative ones (T5, MPNet), whose
    buckets follow by arithmetic until they become integers.
    """
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = [node for node in graph.node if node.op_type in ("Cos", "Sin", "Log")]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [makers[name] for name in node.input if name in makers and name in floats]
    logarithms = {name for node in graph.node if node.op_type == "Log" for name in node.output}
    for node in graph.node:  # in the order of computation
        if node.op_type in ("Add", "Cast", "Div", "Mul", "Sub") and logarithms & {*node.input}:
            found.add(node.name)
            logarithms |= floats & {*node.output}
    return found


def mean_squares(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes of norms that are written out, as RMSNorm is: from the squares to the
    reciprocal of the root.

    The mean of squares of a decoder's largest activations is beyond fp16, whether or not
    calibration reached it.
    """
    squares: dict[str, str] = {}  # output → node
    found: set[str] = set()
    means: set[str] = set()  # the mean of squares and what is computed of it
    for node in graph.node:
        if node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1]):
            squares[node.output[0]] = node.name
        if node.op_type == "ReduceMean" and node.input[0] in squares:
            found |= {squares[node.input[0]], node.name}
            means.add(node.output[0])
        elif node.op_type in AFTER_MEAN and means & {*node.input}:
            found.add(node.name)
            if node.op_type in ("Add", "Sqrt"):
                means.add(node.output[0])
    return found


class Conversion:
    """A graph while it is converted. X_half is the tensor X in half precision, either cast from the
    other on demand.
    """

    def __init__(self, graph: onnx.GraphProto, floats: set[str], dtype: int, folder: Path) -> None:
        self.graph, self.dtype, self.folder = graph, dtype, folder
        self.floats = floats  # names of all fp32 inputs and node outputs
        self.weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.half: set[str] = set()  # tensors that exist in half precision so far
        self.single = {*self.weights, *(i.name for i in graph.input)}  # those that exist in fp32
        self.nodes: list[onnx.NodeProto] = []

    def add(self, node: onnx.NodeProto, keep: bool) -> None:
        """Append a node, in fp32 if it is to `keep` that, with casts in front of it where its
        inputs lack its type.
        """
        made = set(node.output) & self.floats
        half = bool(made) and not keep and node.op_type not in FP32_MAKERS
        for i, name in enumerate(node.input):
            if name in self.floats or name in self.weights:
                node.input[i] = self.as_type(name, half)
        (self.half if half else self.single).update(made)
        if half:
            retype(node, TensorProto.FLOAT, self.dtype)
            node.output[:] = [f"{name}_half" if name in made else name for name in node.output]
        self.nodes.append(node)

    def as_type(self, name: str, half: bool) -> str:
        """The name of a tensor in half precision or fp32; adds a cast, or a converted weight, the
        first time.
        """
        other = f"{name}_half"
        if half and name in self.weights and name not in self.half:
            self.graph.initializer.append(
                converted(self.weights[name], other, self.dtype, self.folder)
            )
        elif half and name not in self.half:
            self.nodes.append(
                helper.make_node("Cast", [name], [other], f"cast_{other}", to=self.dtype)
            )
        elif not half and name not in self.single:
            self.nodes.append(
                helper.make_node("Cast", [other], [name], f"cast_{name}", to=TensorProto.FLOAT)
            )
        (self.half if half else self.single).add(name)
        return other if half else name


def converted(
    tensor: onnx.TensorProto, name: str, dtype: int, folder: Path = Path()
) -> onnx.TensorProto:
    """A weight in another type, rounded to nearest and clipped to the range of fp16."""
    array = numpy_helper.to_array(tensor, str(folder))
    if dtype == TensorProto.FLOAT16:
        limit = float(np.finfo(np.float16).max)
        array = np.clip(array, -limit, limit)
    return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(dtype)), name)


def retype(node: onnx.NodeProto, old: int, new: int) -> None:
    """Casts to the old type, and constants of it, become the new one."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
            attribute.i = new
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == old:
            attribute.t.CopyFrom(converted(attribute.t, attribute.t.name, new))


# Emulating bf16 on a CPU


def emulate_bf16(bundle: Bundle, folder: Path) -> Bundle:
    """A bf16 bundle with fp32 graphs, in `folder`, that round to bf16 wherever it would.

    ONNX Runtime has no bf16 kernels for CPUs. Tensor cores accumulate bf16 matmuls in fp32, as
    these graphs do.
    """
    for stage in bundle.info.stages:
        file = bundle.path / f"{stage}.onnx"
        typed = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)).graph
        model = onnx.load(file)
        round_to_bf16(model.graph, {v.name: v.type.tensor_type.elem_type for v in typed.value_info})
        onnx.save(
            model, str(folder / file.name), save_as_external_data=True, location=f"{stage}.data"
        )
    return Bundle(folder, bundle.info)


def round_to_bf16(graph: onnx.GraphProto, types: dict[str, int]) -> None:
    """Turn bf16 weights, constants and outputs into fp32 ones that are rounded to bf16. types: of
    the outputs.
    """
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(converted(tensor, tensor.name, TensorProto.FLOAT))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                retype(node, TensorProto.BFLOAT16, TensorProto.FLOAT)
                node.output[i] = f"{name}_exact"
                nodes.append(
                    helper.make_node(
                        "Cast", [f"{name}_exact"], [f"{name}_bf16"], to=TensorProto.BFLOAT16
                    )
                )
                nodes.append(
                    helper.make_node("Cast", [f"{name}_bf16"], [name], to=TensorProto.FLOAT)
                )
    replace_nodes(graph, nodes)
