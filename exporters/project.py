"""The projection of Black-Box Tuning as a graph, for engines that compute it where the backbone is."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.bundle import BundleInfo


def projection_graph(info: BundleInfo) -> onnx.ModelProto:
    """prompts = reshape(z Aᵀ + p0), float32: z (P, d), matrix A (n·H, d) and p0 (n·H,) to prompts (P, n, H)."""
    n, hidden = info.prompt_shape[-2:]
    inputs = {"z": ["candidates", "dim"], "matrix": [n * hidden, "dim"], "p0": [n * hidden]}
    shape = numpy_helper.from_array(np.array([-1, n, hidden], np.int64), "shape")
    nodes = [
        helper.make_node("Gemm", ["z", "matrix", "p0"], ["flat"], transB=1),
        helper.make_node("Reshape", ["flat", "shape"], ["prompts"]),
    ]
    graph = helper.make_graph(
        nodes,
        "project",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in inputs.items()],
        [helper.make_tensor_value_info("prompts", TensorProto.FLOAT, ["candidates", n, hidden])],
        [shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", info.opset)], ir_version=10)
