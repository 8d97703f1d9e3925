"""The graphs before and after the backbone, for engines on a GPU: from z to prompts, and from label logits to batch
statistics. A generation then transfers z, and five numbers per candidate.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from bbt_accel.bundle import PROJECT, STATISTICS, BundleInfo
from bbt_accel.objective import MARGIN

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


def batch_statistics(label_logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """`objective.batch_statistics` in fp32: (P, N, C), one-hot targets (N, C), classes 0 … C-1 → float32 (P, 5).

    A logit that is not finite makes `target` NaN, be it the target's or another times 0. Of equal logits the first
    class is predicted, as by numpy's argmax; TensorRT's ArgMax does not guarantee that.
    """
    shifted = label_logits - label_logits.amax(2, keepdim=True)
    target = (shifted * targets).sum(2)
    ce = shifted.exp().sum(2).log() - target
    hinge = (torch.relu(shifted - target[..., None] + MARGIN) * (1 - targets)).sum(2)
    predicted, actual = torch.where(shifted == 0, classes, 1e6).amin(2), (targets * classes).sum(1)
    correct, positives = predicted == actual, predicted == 1
    columns = [ce, hinge, correct.float(), (correct & positives).float(), positives.float()]
    return torch.stack(columns, dim=2).sum(1)


@cache
def statistics_graph() -> bytes:
    import onnx_ir as ir

    from bbt_accel.exporters.graph import Stage, trace

    inputs = {"label_logits": torch.zeros(2, 3, 5), "targets": torch.zeros(3, 5), "classes": torch.zeros(5)}
    traced = SimpleNamespace(run=lambda stage, inputs: {stage: batch_statistics(**inputs)})
    return bytes(ir.to_proto(trace(Stage(STATISTICS, inputs, [STATISTICS]), traced)).SerializeToString())


def write_device_graphs(folder: Path, info: BundleInfo) -> None:
    """Write project.onnx and statistics.onnx beside the stages of the backbone."""
    from onnx import parser

    n, hidden = info.prompt_shape[-2:]
    projection = parser.parse_model(PROJECTION.format(opset=info.opset, n=n, hidden=hidden, size=n * hidden))
    (folder / f"{PROJECT}.onnx").write_bytes(projection.SerializeToString())
    (folder / f"{STATISTICS}.onnx").write_bytes(statistics_graph())
