"""Every prompt of a sweep scored in each bundle that takes it: what a lower precision costs, apart
from the search.

Two searches in two precisions diverge after a few generations and end at different prompts, so
their scores differ by chance too. The same prompt in two precisions does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.benchmarks.sweep.grid import RUN, Trial
from bbt_accel.benchmarks.sweep.report import Agreement, CrossEvaluation, CrossScore
from bbt_accel.core.bundle import PROMPT_FACTS, Bundle
from bbt_accel.core.objective import Objective
from bbt_accel.engines.registry import load_engine
from bbt_accel.io.pools import Pool, PoolJob
from bbt_accel.predict.inference import class_scores
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import labels, load_rows
from bbt_accel.tasks.encoding import Encoder


def cross_evaluate(
    trials: Sequence[Trial], folder: Path, pool: Pool, progress: bool
) -> CrossEvaluation:
    """Score the prompts of trials that are done; `folder` holds the trials' folders."""
    groups: dict[Hashable, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[_exchange(trial)].append(trial)
    jobs = []
    for group in groups.values():
        shared = {
            "runs": [str(folder / trial.name / RUN) for trial in group],
            "threads": pool.threads,
        }
        for trial in {trial.bundle: trial for trial in group}.values():
            own = trial.model_dump(include={"bundle", "engine", "device", "data"})
            jobs.append(PoolJob(_name(trial), score_prompts, own | shared))
    replies = dict(pool.run(jobs, progress=progress))
    found = CrossEvaluation(
        failures={name: reply["message"] for name, reply in replies.items() if "error" in reply}
    )
    for group in groups.values():
        _add(
            found,
            group,
            {name: reply["value"] for name, reply in replies.items() if "value" in reply},
        )
    return found


def score_prompts(
    bundle: str, runs: list[str], engine: str, device: str, data: str | None, threads: int
) -> dict[str, Any]:
    """Score the prompts of runs of one task in a bundle; returns scores (P) and predictions (P, N)
    as lists.
    """
    found = [Run.read(path) for path in runs]
    task = found[0].task
    rows = load_rows(task, "test", None if data is None else Path(data))
    with load_engine(bundle, engine, device=device, threads=threads) as loaded:
        encoders = (Encoder(loaded.bundle, task, run.info.demonstrations) for run in found)
        logits = np.stack(
            [class_scores(loaded, e, rows, run) for e, run in zip(encoders, found, strict=True)]
        )
    _, scores = Objective("ce", task.metric).score(logits, labels(rows))
    return {"scores": scores.tolist(), "predictions": logits.argmax(2).tolist()}


def _exchange(trial: Trial) -> Hashable:
    """Equal for trials whose prompts can be exchanged."""
    info = Bundle.read(trial.bundle, verify=False).info
    return (
        trial.task,
        trial.engine,
        tuple(info.prompt_shape),
        *(getattr(info, name) for name in PROMPT_FACTS),
    )


def _name(trial: Trial) -> str:
    return f"{trial.task_name}-{trial.bundle_name}-{trial.engine}"


def _add(found: CrossEvaluation, group: Sequence[Trial], values: dict[str, Any]) -> None:
    """Add the scores and agreements of a group, whose bundles are those that replied."""
    scored = {trial.bundle_name: values[_name(trial)] for trial in group if _name(trial) in values}
    for tuned_in in dict.fromkeys(trial.bundle_name for trial in group):
        own = [i for i, trial in enumerate(group) if trial.bundle_name == tuned_in]
        shared = {"task": group[0].task_name, "engine": group[0].engine, "tuned_in": tuned_in}
        for name, value in scored.items():
            scores = [value["scores"][i] for i in own]
            found.scores.append(
                CrossScore(
                    **shared, scored_in=name, seeds=[group[i].seed for i in own], scores=scores
                )
            )
        for one, other in combinations(scored, 2):
            first, second = (np.array(scored[name]["predictions"])[own] for name in (one, other))
            agreement = float((first == second).mean())
            found.agreements.append(Agreement(**shared, bundles=(one, other), agreement=agreement))
