"""The report of a sweep, as report.json holds it: the table of scores and every trial behind it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

from pydantic import Field

from bbt_accel.benchmarks.sweep.grid import Sweep, Trial
from bbt_accel.core.bundle import Method
from bbt_accel.core.settings import Metric
from bbt_accel.io.machine import installed_versions
from bbt_accel.io.reporting import Schema, mean_if_complete, now


class TrialResult(Schema):
    """score.json in the folder of a trial."""

    trial: Trial
    score: float = Field(description="Test score of the tuned prompt, by the task's metric.")
    without_prompt: float = Field(description="Test score of the label words before the search.")
    batch_calibrated: float = Field(
        description="The same with the label bias removed, without labels."
    )
    dev_score: float = Field(description="Dev score of the tuned prompt, by which it was chosen.")
    test_rows: int = Field(description="Test rows behind score and without_prompt.")
    calls: int = Field(description="Candidates evaluated; passes for dev scores are not counted.")
    seconds: float = Field(description="Duration of the search.")
    curve: list[tuple[int, float]] = Field(
        default=[], description="Calls and dev score, wherever a prompt was scored."
    )
    versions: dict[str, str] = Field(description="Versions of the libraries that ran the backbone.")


class TrialRow(Schema):
    """One trial: a task, a bundle, an engine and a seed."""

    name: str = Field(description="Name of its folder under trials/.")
    task: str = Field(description="Name of the task.")
    bundle: str = Field(description="Name of the bundle's folder.")
    engine: str = Field(description="Engine of the search and of the test.")
    seed: int = Field(description="Seed of the few-shot rows, the projection and the search.")
    status: Literal["done", "failed", "not run"] = Field(
        description="not run: the sweep was interrupted."
    )
    reason: str | None = Field(default=None, description="Why it failed, in one line.")
    score: float | None = Field(default=None, description="Test score of the tuned prompt.")
    without_prompt: float | None = Field(
        default=None, description="Test score of the label words before the search."
    )
    batch_calibrated: float | None = Field(
        default=None, description="The same with the label bias removed, without labels."
    )
    dev_score: float | None = Field(
        default=None, description="Dev score of the tuned prompt, by which it was chosen."
    )
    test_rows: int | None = Field(
        default=None, description="Test rows behind score and without_prompt."
    )
    calls: int | None = Field(
        default=None, description="Candidates evaluated; passes for dev scores are not counted."
    )
    seconds: float | None = Field(default=None, description="Duration of the search.")
    curve: list[tuple[int, float]] = Field(
        default=[], description="Calls and dev score, wherever a prompt was scored."
    )
    versions: dict[str, str] = Field(
        default={}, description="Versions of the libraries that ran the backbone."
    )


class ScoreCell(Schema):
    """One task in a row of the table."""

    task: str = Field(description="Name of the task.")
    metric: Metric = Field(description="Metric of the scores.")
    seeds: list[int] = Field(description="Seeds whose trial is done.")
    scores: list[float] = Field(description="Test scores, in the order of the seeds.")
    mean: float | None = Field(description="Mean of the scores; None without any.")
    std: float | None = Field(
        description="Standard deviation of the scores (n − 1); None for fewer than two."
    )
    without_prompt: float | None = Field(
        description="Mean test score of the label words before the search."
    )
    batch_calibrated: float | None = Field(
        description="The same with the label bias removed, without labels."
    )
    failed: int = Field(description="Trials that failed.")


class SweepRow(Schema):
    """One row of the table: a method, a bundle and an engine."""

    method: Method = Field(description="Method that the bundle was exported for.")
    bundle: str = Field(description="Name of the bundle's folder.")
    engine: str = Field(description="Engine of the searches and of the tests.")
    cells: list[ScoreCell] = Field(description="One per task.")
    mean: float | None = Field(
        description="Mean of the cells' means; None unless every task has one."
    )
    without_prompt: float | None = Field(description="The same before the search.")
    batch_calibrated: float | None = Field(
        description="The same before the search, with the label bias removed."
    )


class CrossScore(Schema):
    """Prompts tuned in one bundle, scored in one bundle."""

    task: str = Field(description="Name of the task.")
    engine: str = Field(description="Engine of the searches and of the scores.")
    tuned_in: str = Field(description="Name of the bundle that the prompts were tuned in.")
    scored_in: str = Field(description="Name of the bundle that they are scored in.")
    seeds: list[int] = Field(description="Seeds of the searches.")
    scores: list[float] = Field(description="Test scores, in the order of the seeds.")


class Agreement(Schema):
    """How often two bundles predict the same class with the same prompt."""

    task: str = Field(description="Name of the task.")
    engine: str = Field(description="Engine of both.")
    tuned_in: str = Field(description="Name of the bundle that the prompts were tuned in.")
    bundles: tuple[str, str] = Field(description="Names of the two bundles.")
    agreement: float = Field(description="Share of the test rows, mean over the prompts.")


class CrossEvaluation(Schema):
    """Every prompt of a sweep, scored in each bundle that takes it."""

    scores: list[CrossScore] = Field(
        default=[], description="One per task, engine and pair of bundles."
    )
    agreements: list[Agreement] = Field(
        default=[], description="One per task, engine, tuned_in and pair of bundles."
    )
    failures: dict[str, str] = Field(
        default={}, description="Why a bundle has no scores, by task, bundle and engine."
    )


class SweepReport(Schema):
    """report.json."""

    version: int = Field(default=3, description="Version of this schema.")
    created: str = Field(default_factory=now, description="When it was written, UTC, ISO 8601.")
    interrupted: bool = Field(description="Whether the sweep was interrupted.")
    sweep: Sweep = Field(description="The sweep as requested.")
    rows: list[SweepRow] = Field(description="The table.")
    trials: list[TrialRow] = Field(description="Everything behind it.")
    cross_evaluation: CrossEvaluation | None = Field(
        default=None, description="The prompts in other bundles."
    )
    versions: dict[str, str] = Field(description="Versions of bbt-accel and Python.")

    def count(self, status: str) -> int:
        return sum(trial.status == status for trial in self.trials)


def make_report(
    sweep: Sweep,
    trials: Sequence[Trial],
    results: Mapping[str, TrialResult],
    failures: Mapping[str, str],
    interrupted: bool = False,
    cross_evaluation: CrossEvaluation | None = None,
) -> SweepReport:
    """results, failures: by the names of trials; a trial in neither was not run."""
    rows = []
    for (method, bundle, engine), group in groupby(
        trials, lambda t: (t.method, t.bundle_name, t.engine)
    ):
        cells = [
            _cell(list(some), results, failures)
            for _, some in groupby(group, lambda t: t.task_name)
        ]
        names = ("mean", "without_prompt", "batch_calibrated")
        means = {name: mean_if_complete([getattr(cell, name) for cell in cells]) for name in names}
        rows.append(SweepRow(method=method, bundle=bundle, engine=engine, cells=cells, **means))
    versions = installed_versions()
    return SweepReport(
        interrupted=interrupted,
        sweep=sweep,
        rows=rows,
        trials=[_trial_row(t, results.get(t.name), failures.get(t.name)) for t in trials],
        cross_evaluation=cross_evaluation,
        versions={name: versions[name] for name in ("bbt-accel", "python")},
    )


def _cell(
    trials: Sequence[Trial], results: Mapping[str, TrialResult], failures: Mapping[str, str]
) -> ScoreCell:
    done = [results[t.name] for t in trials if t.name in results]
    scores = [result.score for result in done]
    return ScoreCell(
        task=trials[0].task_name,
        metric=trials[0].definition.metric,
        seeds=[result.trial.seed for result in done],
        scores=scores,
        mean=statistics.fmean(scores) if scores else None,
        std=statistics.stdev(scores) if len(scores) > 1 else None,
        without_prompt=statistics.fmean(result.without_prompt for result in done) if done else None,
        batch_calibrated=statistics.fmean(result.batch_calibrated for result in done)
        if done
        else None,
        failed=sum(t.name in failures for t in trials),
    )


def _trial_row(trial: Trial, result: TrialResult | None, failure: str | None) -> TrialRow:
    return TrialRow(
        name=trial.name,
        task=trial.task_name,
        bundle=trial.bundle_name,
        engine=trial.engine,
        seed=trial.seed,
        status="done" if result else "failed" if failure else "not run",
        reason=failure,
        **(result.model_dump(exclude={"trial"}) if result else {}),
    )
