"""Weight-only 4 bits, for memory: blocks of weights with a scale each.

ONNX Runtime gets its own MatMulNBits, whose weights several nodes may share; on a CPU it rounds
activations to 8 bits, block by block. Others get ONNX's DequantizeLinear with blocks (opset 21),
from which OpenVINO makes a 4-bit matmul.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.exporters.convert.matmuls import input_channels, is_transposed, quantizable_matmuls
from bbt_accel.exporters.trace.graph import MICROSOFT, name_nodes, replace_nodes

OPSET = 21
"""The first in which DequantizeLinear takes blocks and 4-bit integers."""
BLOCKS = (32, 16)
"""Weights along the input's channels that share a scale: the first that divides the channels, as
OpenVINO wants.
"""
SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)
"""Scales to choose from, relative to the one that clips no weight."""
ACCURACY_LEVEL = 4
"""Of MatMulNBits: matmuls of 8-bit activations, the fastest on a CPU."""


def to_int4(model: onnx.ModelProto, nbits: bool, folder: Path) -> list[str]:
    """Quantize, in place, the constant weights of matmuls; returns the names of those matmuls.

    nbits: as ONNX Runtime's MatMulNBits, not as DequantizeLinear. folder: of the file with the
        weights that are not inside the graph.
    A Gemm becomes a MatMul and, with a bias, an Add: that is what runtimes fuse.
    """
    graph = model.graph
    name_nodes(graph)
    weights = {t.name: t for t in graph.initializer}
    chosen = {
        node.name for node in quantizable_matmuls(graph) if block_size(input_channels(graph, node))
    }
    rewrite = matmul_nbits if nbits else dequantized_matmul
    nodes: list[onnx.NodeProto] = []
    done: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        name = f"{node.input[1]}_int4"
        if name not in done:
            exact = numpy_helper.to_array(weights[node.input[1]], str(folder))
            exact = exact.T if is_transposed(node) else exact
            done[name] = exact.shape
            add_weight(graph, exact, name, nbits)
        bias = node.input[2] if len(node.input) > 2 else None
        product = f"{node.name}_product" if bias else node.output[0]
        nodes += rewrite(node, name, product, *done[name])
        if bias:
            nodes.append(
                helper.make_node("Add", [product, bias], list(node.output), f"{node.name}_bias")
            )
    replace_nodes(graph, nodes)
    for opset in model.opset_import:
        if not nbits and opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    return sorted(chosen)


def add_weight(graph: onnx.GraphProto, exact: NDArray[np.float32], name: str, nbits: bool) -> None:
    """Add a weight (K, M) as symmetric 4-bit integers with a scale for each block of its K rows.

    MatMulNBits wants two values in a byte, the first in the low half, and 8 for zero: (M, K /
    block, block / 2).
    """
    block = block_size(len(exact))
    values, scale = quantize_blocks(exact, block)
    if nbits:
        offset = (values + 8).astype(np.uint8).T.reshape(exact.shape[1], -1, block)
        stored, scale = offset[..., ::2] | offset[..., 1::2] << 4, np.ascontiguousarray(scale.T)
    else:
        stored = values.astype(ml_dtypes.int4)
    graph.initializer.append(numpy_helper.from_array(stored, f"{name}_values"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))


def matmul_nbits(
    node: onnx.NodeProto, name: str, product: str, channels: int, columns: int
) -> list[onnx.NodeProto]:
    inputs = [node.input[0], f"{name}_values", f"{name}_scale"]
    sizes = {"K": channels, "N": columns, "bits": 4, "block_size": block_size(channels)}
    made = helper.make_node("MatMulNBits", inputs, [product], node.name, domain=MICROSOFT, **sizes)
    made.attribute.append(helper.make_attribute("accuracy_level", ACCURACY_LEVEL))
    return [made]


def dequantized_matmul(
    node: onnx.NodeProto, name: str, product: str, channels: int, columns: int
) -> list[onnx.NodeProto]:
    inputs, weight, block = (
        [f"{name}_values", f"{name}_scale"],
        f"{node.name}_weight",
        block_size(channels),
    )
    return [
        helper.make_node("DequantizeLinear", inputs, [weight], weight, axis=0, block_size=block),
        helper.make_node("MatMul", [node.input[0], weight], [product], node.name),
    ]


def block_size(channels: int) -> int:
    """Of a matmul with so many input channels; 0 where none fits, and the weights stay in fp32."""
    return next((size for size in BLOCKS if channels % size == 0), 0)


def quantize_blocks(
    exact: NDArray[np.float32], block: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(K, M) → values in -8 … 7, (K, M), and scales, (K / block, M), with the least squared error
    of `SHRINK`.
    """
    blocks = exact.reshape(-1, block, exact.shape[1])
    widest = np.maximum(np.abs(blocks).max(axis=1) / 7, 1e-12).astype(np.float32)
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for shrink in SHRINK:
        scale = widest * shrink
        error = ((rounded(blocks, scale) * scale[:, None] - blocks) ** 2).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return rounded(blocks, best).reshape(exact.shape).astype(np.int8), best


def rounded(blocks: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.rint(blocks / scale[:, None]), -8, 7)
