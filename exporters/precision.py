"""Sensitivity fallback: which matmuls of an int8 bundle stay in fp32, decided by the effect of each on the logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.exporters.calibration import stage_feeds
from bbt_accel.exporters.convert import read_graph
from bbt_accel.exporters.fidelity import relative_rmse
from bbt_accel.exporters.int8 import quantizable_matmuls, switch, to_int8
from bbt_accel.exporters.sessions import Feeds, RunStage, onnx_stage, temporary_graph

Matmul = tuple[str, str]
"""A stage and the name of a matmul in it."""


@dataclass(frozen=True)
class SwitchableStage:
    """One stage in which every matmul runs in fp32 or int8, as its switch says."""

    name: str
    run: RunStage
    sizes: dict[str, int]
    """Elements of each matmul's weight, to which its cost is proportional."""
    feeds: list[Feeds]
    """The stage's inputs, some rows at a time, as the stages before it compute them in fp32."""


def select_fp32(bundle: Bundle, target: str, batch: Batch, prompts: Float32, limit: float, folder: Path) -> set[Matmul]:
    """Matmuls to keep in fp32 so that the relative logit RMSE on these rows and prompts is at most `limit`.

    Each matmul's error is measured with that matmul alone in int8; squared errors add up. Those with the largest error
    for their cost are kept first. None is measured by itself if int8 throughout is within the limit.
    """
    stages = switchable_stages(bundle, target, batch, prompts, folder)
    sizes = {(stage.name, name): size for stage in stages for name, size in stage.sizes.items()}
    reference = run_from(stages, 0, sizes)
    if relative_rmse(run_from(stages, 0, ()), reference) <= limit:
        return set()
    error = {
        (stage.name, name): relative_rmse(run_from(stages, i, sizes.keys() - {(stage.name, name)}), reference) ** 2
        for i, stage in enumerate(stages)
        for name in stage.sizes
    }
    kept: set[Matmul] = set()
    for matmul in sorted(error, key=lambda m: error[m] / sizes[m], reverse=True):
        expected = sum(error[m] for m in error if m not in kept)
        if expected <= limit**2 and relative_rmse(run_from(stages, 0, kept), reference) <= limit:
            break
        kept.add(matmul)
    return kept


def switchable_stages(
    bundle: Bundle, target: str, batch: Batch, prompts: Float32, folder: Path
) -> list[SwitchableStage]:
    found = []
    for stage, feeds in stage_feeds(bundle, batch, prompts, rows=4):
        model, _ = read_graph(bundle.path / f"{stage}.onnx", target)
        quantized, _ = to_int8(model, feeds, folder, switchable=True)
        elements = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
        sizes = {n.name: elements[n.input[1]] for n in quantizable_matmuls(model.graph) if n.name in quantized}
        with temporary_graph(model, folder) as file:
            found.append(SwitchableStage(stage, onnx_stage(file), sizes, [dict(feed) for feed in feeds]))
    return found


def run_from(stages: list[SwitchableStage], first: int, fp32: Collection[Matmul]) -> Float32:
    """Label logits (P, N, C) from stage `first` on, with these matmuls in fp32 and the others in int8."""
    parts: list[Float32] = []
    for number in range(len(stages[first].feeds)):
        state: Feeds = {}
        for stage in stages[first:]:
            switches = {switch(name): np.array([(stage.name, name) in fp32]) for name in stage.sizes}
            state |= stage.run(stage.feeds[number] | state | switches)
        parts.append(state["label_logits"])
    return np.concatenate(parts, axis=1)
