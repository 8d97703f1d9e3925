"""Which products of an int8 bundle stay in fp32, decided by what each does to the logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.exporters.calibration import stage_feeds
from bbt_accel.exporters.int8 import products, switch, to_int8
from bbt_accel.exporters.prepare import prepare
from bbt_accel.exporters.sessions import Feeds, RunStage, onnx_stage

Product = tuple[str, str]
"""A stage and the name of a matrix product in it."""


def logit_noise(logits: Float32, wanted: Float32) -> float:
    """Root mean square error of label logits (P, N, C) relative to their spread, both without what all labels share.

    Only differences between labels reach a prediction or a loss.
    """

    def contrasts(x: Float32) -> Float32:
        difference: Float32 = x - x.mean(axis=-1, keepdims=True)
        return difference

    error, spread = contrasts(logits) - contrasts(wanted), contrasts(wanted)
    return float(np.sqrt(np.mean(error**2)) / max(float(np.sqrt(np.mean(spread**2))), 1e-12))


@dataclass(frozen=True)
class SwitchedStage:
    """One stage in which each product is computed in fp32 or in int8, as its switch says."""

    name: str
    run: RunStage
    sizes: dict[str, int]
    """Elements of each product's weight: the work of a product goes with it."""
    feeds: list[Feeds]
    """The stage's inputs, some rows at a time, as the stages before it compute them in fp32."""


def choose_fp32(
    bundle: Bundle, target: str, batch: Batch, prompts: Float32, limit: float, folder: Path
) -> set[Product]:
    """Products to keep in fp32 so that `logit_noise` on these rows and prompts is at most `limit`.

    Each product's share is measured with that product alone in int8; shares add up in squares. Those that bring the
    most noise for their work are kept first. Nothing is measured one by one where all together are near enough.
    """
    stages = switched_stages(bundle, target, batch, prompts, folder)
    everything = {(stage.name, name) for stage in stages for name in stage.sizes}
    wanted = run_from(stages, 0, everything)
    if logit_noise(run_from(stages, 0, set()), wanted) <= limit:
        return set()
    share: dict[Product, float] = {}
    for i, stage in enumerate(stages):
        for name in stage.sizes:
            alone = run_from(stages, i, everything - {(stage.name, name)})
            share[stage.name, name] = logit_noise(alone, wanted) ** 2
    work = {(stage.name, name): size for stage in stages for name, size in stage.sizes.items()}
    kept: set[Product] = set()
    for product in sorted(share, key=lambda p: share[p] / work[p], reverse=True):
        expected = sum(noise for other, noise in share.items() if other not in kept)
        if expected <= limit**2 and logit_noise(run_from(stages, 0, kept), wanted) <= limit:
            break
        kept.add(product)
    return kept


def switched_stages(bundle: Bundle, target: str, batch: Batch, prompts: Float32, folder: Path) -> list[SwitchedStage]:
    found = []
    for stage, feeds in stage_feeds(bundle, batch, prompts, rows=4):
        made = to_int8(prepare(bundle.path / f"{stage}.onnx", target)[0], feeds, folder, switches=True)
        weights = {t.name: int(np.prod(t.dims)) for t in made.model.graph.initializer}
        sizes = {n.name: weights[n.input[1]] for n in products(made.model.graph) if n.name in made.products}
        file = folder / "switched.onnx"
        try:
            onnx.save(made.model, str(file), save_as_external_data=True, location="switched.onnx.data")
            found.append(SwitchedStage(stage, onnx_stage(file), sizes, [dict(feed) for feed in feeds]))
        finally:
            file.unlink(missing_ok=True)
            file.with_suffix(".onnx.data").unlink(missing_ok=True)
    return found


def run_from(stages: list[SwitchedStage], first: int, exact: Collection[Product]) -> Float32:
    """Label logits (P, N, C) from stage `first` upward, with these products in fp32 and the others in int8."""
    parts: list[Float32] = []
    for number in range(len(stages[first].feeds)):
        state: Feeds = {}
        for stage in stages[first:]:
            switches = {switch(name): np.array([(stage.name, name) in exact]) for name in stage.sizes}
            state |= stage.run(stage.feeds[number] | state | switches)
        parts.append(state["label_logits"])
    return np.concatenate(parts, axis=1)
