"""Which weights stay in fp32 where int8 is not exact enough: chosen by the effect of each on the
logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bbt_accel.core.batch import Float32
from bbt_accel.core.comparison import relative_rmse
from bbt_accel.exporters.convert.int8 import switch, to_int8
from bbt_accel.exporters.convert.int8_calibration import CalibratedStage
from bbt_accel.exporters.trace.sessions import Feeds, RunStage, onnx_stage, temporary_graph

MEASUREMENTS = 32
"""Groups of weights whose error is measured, at most; each measurement is a run of the network on
one call's rows.
"""


@dataclass(frozen=True)
class SwitchableStage:
    """One stage in which the matmuls of every weight run in fp32 or int8, as its switch says."""

    run: RunStage
    weights: set[str]  # those that have a switch here
    feeds: list[
        Feeds
    ]  # the stage's inputs, some rows at a time, as the stages before it compute them in fp32


def by_sensitivity(
    stages: list[SwitchableStage], work: dict[str, tuple[int, ...]]
) -> list[tuple[str, float]]:
    """The quantized weights, those with the largest error for their cost first, and the squared
    error of each.

    work: as from `frequent`.
    """
    error = measure_errors(stages, work)
    order = sorted(
        error, key=lambda weight: error[weight] / max(1, math.prod(work[weight])), reverse=True
    )
    return [(weight, error[weight]) for weight in order]


def keep_more(ranked: list[tuple[str, float]], kept: int, share: float) -> int:
    """How many weights to keep in fp32, more than `kept`, for at most this share of the squared
    error that is left.

    Squared errors of weights add up, but for a factor that changes little.
    """
    allowed = share * sum(error for _, error in ranked[kept:])
    kept += 1
    while sum(error for _, error in ranked[kept:]) > allowed:
        kept += 1
    return kept


def measure_errors(
    stages: list[SwitchableStage], work: dict[str, tuple[int, ...]]
) -> dict[str, float]:
    """The squared relative logit RMSE, on the rows of one call, that each weight in int8 adds.

    Weights of one shape that meet as many tokens form a group, which is measured as a whole; then
    the group with the largest error is split into its lower and its upper layers, and so on. Those
    of one group share its error.
    """
    reference = run_from(stages, 0, work, calls=1)

    def measured(group: list[str]) -> tuple[float, list[str]]:
        first = next(i for i, stage in enumerate(stages) if not stage.weights.isdisjoint(group))
        return relative_rmse(
            run_from(stages, first, work.keys() - set(group), calls=1), reference
        ) ** 2, group

    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for weight, product in work.items():
        alike[product].append(weight)
    groups = [measured(group) for group in alike.values()]
    for _ in range((MEASUREMENTS - len(groups)) // 2):
        largest = max(groups, key=lambda group: group[0] if len(group[1]) > 1 else -1)
        if len(largest[1]) == 1:
            break
        groups.remove(largest)
        half = len(largest[1]) // 2
        groups += [measured(largest[1][:half]), measured(largest[1][half:])]
    return {weight: error / len(group) for error, group in groups for weight in group}


def make_switchable(
    stages: list[CalibratedStage], weights: Collection[str], folder: Path
) -> list[SwitchableStage]:
    found = []
    for stage in stages:
        model, _, _ = to_int8(stage, weights, switchable=True)
        with temporary_graph(model, folder) as file:
            own = {use.weight for use in stage.uses.values() if use.weight in weights}
            found.append(SwitchableStage(onnx_stage(file), own, stage.feeds))
    return found


def run_from(
    stages: list[SwitchableStage], first: int, fp32: Collection[str], calls: int | None = None
) -> Float32:
    """Label logits (P, N, C) from stage `first` on, with these weights in fp32 and the others in
    int8.

    calls: run on the rows of the first calls alone.
    """
    exact = set(fp32)
    parts: list[Float32] = []
    for number in range(len(stages[first].feeds[:calls])):
        state: Feeds = {}
        for stage in stages[first:]:
            switches = {switch(weight): np.array([weight in exact]) for weight in stage.weights}
            state |= stage.run(stage.feeds[number] | state | switches)
        parts.append(state["label_logits"])
    return np.concatenate(parts, axis=1)
