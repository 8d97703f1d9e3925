"""Static int8 for ONNX Runtime: 8-bit matrix products with ranges fixed at calibration, one scale a weight channel.

Fixed ranges keep the candidates of a population independent: dynamic ones would span the whole batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bbt_accel.exporters.calibration import ranges
from bbt_accel.exporters.half import drop_unused
from bbt_accel.exporters.sessions import Feeds


def to_int8(model: onnx.ModelProto, feeds: list[Feeds], folder: Path) -> tuple[onnx.ModelProto, int, list[str]]:
    """Quantize each matrix product with a constant weight: uint8 activations, int8 weights, float results.

    Returns the graph, how many products were quantized, and the names of those left in fp32 because calibration saw
    no float values at their input.
    """
    constants = {t.name: t for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and weight_of(n, constants) is not None]
    chosen = [n for n in products if n.input[0] not in constants]
    found = ranges(model, feeds, sorted({n.input[0] for n in chosen}), folder)
    activations: dict[str, str] = {}
    weights: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    left = []
    for i, node in enumerate(model.graph.node):
        if not any(node is n for n in chosen) or node.input[0] not in found:
            left += [node.name or f"{node.op_type}_{i}"] if any(node is n for n in products) else []
            nodes.append(node)
            continue
        name = node.input[0]
        if name not in activations:
            activations[name] = f"{name}_int8"
            nodes += quantized_activation(model.graph, name, *found[name])
        axis = 0 if transposed(node) else 1
        key = node.input[1], axis
        if key not in weights:
            weights[key] = f"{node.input[1]}_int8_{axis}"
            nodes.append(quantized_weight(model.graph, constants[node.input[1]], weights[key], axis))
        node.input[0], node.input[1] = activations[name], weights[key]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model.graph)
    return model, len(products) - len(left), left


def weight_of(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> onnx.TensorProto | None:
    weight = constants.get(node.input[1])
    return weight if weight is not None and len(weight.dims) == 2 else None


def transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def quantized_activation(graph: onnx.GraphProto, name: str, low: float, high: float) -> list[onnx.NodeProto]:
    """Quantize to uint8 with a zero point, so that 0 is exact, and back."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / 255, 1e-12))
    zero = np.uint8(np.clip(round(-low / scale), 0, 255))
    graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(zero, np.uint8), f"{name}_zero"))
    ends = [f"{name}_scale", f"{name}_zero"]
    return [
        helper.make_node("QuantizeLinear", [name, *ends], [f"{name}_quantized"]),
        helper.make_node("DequantizeLinear", [f"{name}_quantized", *ends], [f"{name}_int8"]),
    ]


def quantized_weight(graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str, axis: int) -> onnx.NodeProto:
    """Symmetric int8 with one scale an output channel."""
    weight = numpy_helper.to_array(tensor)
    scale = np.maximum(np.abs(weight).max(axis=1 - axis, keepdims=True) / 127, 1e-12).astype(np.float32)
    quantized = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(quantized, f"{name}_values"))
    graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), f"{name}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}_zero"))
    inputs = [f"{name}_values", f"{name}_scale", f"{name}_zero"]
    return helper.make_node("DequantizeLinear", inputs, [name], axis=axis)
