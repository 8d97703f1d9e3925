"""Matmuls of an activation with a constant weight: those that are quantized."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import numpy_helper


def quantizable_matmuls(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Matmuls of an activation with a constant weight."""
    rank = {t.name: len(t.dims) for t in graph.initializer}
    matmuls = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node for node in matmuls if node.input[0] not in rank and rank.get(node.input[1]) == 2]


def content_hash(tensor: onnx.TensorProto, folder: Path) -> str:
    return hashlib.sha256(numpy_helper.to_array(tensor, str(folder)).tobytes()).hexdigest()


def is_transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def input_channels(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Channels of a matmul's input."""
    (dims,) = (t.dims for t in graph.initializer if t.name == node.input[1])
    return int(dims[1 if is_transposed(node) else 0])
