"""Weight-only 4 bits, for memory: blocks of weights with a scale each, and activations in fp32.

The graph has ONNX's DequantizeLinear with blocks (opset 21). When it is loaded, ONNX Runtime fuses that with its matmul
into MatMulNBits, and OpenVINO into its own 4-bit matmul.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.exporters.graph import name_nodes, replace_nodes
from bbt_accel.exporters.int8 import is_transposed, quantizable_matmuls

OPSET = 21
"""The first in which DequantizeLinear takes blocks and 4-bit integers."""
BLOCK = 32
"""Weights along the input's channels that share a scale."""
SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)
"""Scales to choose from, relative to the one that clips no weight."""


def to_int4(file: Path) -> tuple[onnx.ModelProto, list[str]]:
    """The graph of a file with its weights beside it, and the names of its matmuls whose weights now have 4 bits.

    A Gemm becomes a MatMul and, with a bias, an Add: that is what runtimes fuse.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    name_nodes(graph)
    weights = {t.name: t for t in graph.initializer}
    chosen = {node.name: node for node in quantizable_matmuls(graph)}
    nodes: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        name = f"{node.input[1]}_int4"
        if name not in done:
            exact = numpy_helper.to_array(weights[node.input[1]], str(file.parent))
            nodes.append(quantize_weight(graph, exact.T if is_transposed(node) else exact, name))
            done.add(name)
        bias = node.input[2] if len(node.input) > 2 else None
        product = f"{node.name}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], node.name))
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], list(node.output), f"{node.name}_bias"))
    replace_nodes(graph, nodes)
    (own,) = (opset for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    own.version = max(own.version, OPSET)
    return model, list(chosen)


def quantize_weight(graph: onnx.GraphProto, exact: NDArray[np.float32], name: str) -> onnx.NodeProto:
    """A weight (K, M) as symmetric 4-bit integers with a scale for each block of `BLOCK` of its K rows."""
    values, scale = quantize_blocks(exact)
    graph.initializer.append(numpy_helper.from_array(values.astype(ml_dtypes.int4), f"{name}_values"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    inputs = [f"{name}_values", f"{name}_scale"]
    return helper.make_node("DequantizeLinear", inputs, [name], name, axis=0, block_size=BLOCK)


def quantize_blocks(exact: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(K, M) → values in -8 … 7, (K, M), and scales, (⌈K / BLOCK⌉, M), with the least squared error of `SHRINK`."""
    rows = exact.shape[0]
    blocks = np.pad(exact, ((0, -rows % BLOCK), (0, 0))).reshape(-1, BLOCK, exact.shape[1])
    widest = np.maximum(np.abs(blocks).max(axis=1) / 7, 1e-12).astype(np.float32)
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for shrink in SHRINK:
        scale = widest * shrink
        error = ((rounded(blocks, scale) * scale[:, None] - blocks) ** 2).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return rounded(blocks, best).reshape(-1, exact.shape[1])[:rows].astype(np.int8), best


def rounded(blocks: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.rint(blocks / scale[:, None]), -8, 7)
