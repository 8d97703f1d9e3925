"""The graphs before and after the backbone, for engines on a GPU: from z to prompts, and from label
logits to batch statistics. A generation then transfers z, and five numbers per candidate.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from bbt_accel.core.bundle import PROJECT, STATISTICS, BundleInfo
from bbt_accel.engines.torch_statistics import batch_statistics

PROJECTION = """
<ir_version: 10, opset_import: ["" : {opset}]>
project (float[candidates, dim] z, float[{size}, dim] matrix, float[{size}] p0)
     => (float[candidates, {n}, {hidden}] prompts)
<int64[3] shape = {{-1, {n}, {hidden}}}> {{
    flat = Gemm <transB = 1> (z, matrix, p0)
    prompts = Reshape (flat, shape)
}}
"""
"""prompts = reshape(z Aᵀ + p0): A is `matrix`, (n·H, d)."""


@cache
def statistics_graph() -> bytes:
    import onnx_ir as ir

    from bbt_accel.exporters.trace.graph import Stage, trace

    inputs = {
        "label_logits": torch.zeros(2, 3, 5),
        "targets": torch.zeros(3, 5),
        "classes": torch.zeros(5),
    }
    traced = SimpleNamespace(run=lambda stage, inputs: {stage: batch_statistics(**inputs)})
    return bytes(
        ir.to_proto(trace(Stage(STATISTICS, inputs, [STATISTICS]), traced)).SerializeToString()
    )


def write_device_graphs(folder: Path, info: BundleInfo) -> None:
    """Write project.onnx and statistics.onnx beside the stages of the backbone."""
    from onnx import parser

    n, hidden = info.prompt_shape[-2:]
    projection = parser.parse_model(
        PROJECTION.format(opset=info.opset, n=n, hidden=hidden, size=n * hidden)
    )
    (folder / f"{PROJECT}.onnx").write_bytes(projection.SerializeToString())
    (folder / f"{STATISTICS}.onnx").write_bytes(statistics_graph())
