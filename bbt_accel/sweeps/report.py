"""The report of a sweep, as report.json holds it."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

import bbt_accel
from bbt_accel.benchmarks.report import Part
from bbt_accel.bundle import Method
from bbt_accel.sweeps.plan import Sweep, Trial
from bbt_accel.sweeps.trial import Result

VERSION = 1


class TrialRow(Part):
    """One trial: a task, a bundle, an engine and a seed."""

    name: str
    """Of its folder under trials/."""
    task: str
    """Its name."""
    bundle: str
    """Name of its folder."""
    engine: str
    """Of the search and of the test."""
    seed: int
    """Of rows, projection and search."""
    status: Literal["done", "failed", "not run"]
    """done; failed; not run, for someone interrupted the sweep."""
    reason: str | None = None
    """Why it failed, in one line."""
    score: float | None = None
    """Of the tuned prompt on the test rows."""
    without_prompt: float | None = None
    """Of a zero prompt on the test rows."""
    dev_score: float | None = None
    """Of the tuned prompt on the dev rows, by which it was chosen."""
    test_rows: int | None = None
    """Rows behind score and without_prompt."""
    calls: int | None = None
    """Candidates that were evaluated."""
    seconds: float | None = None
    """Duration of the search."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the libraries that computed."""


class Cell(Part):
    """One task in a row of the table."""

    task: str
    """Its name."""
    metric: Literal["accuracy", "f1"]
    """What the scores are."""
    seeds: list[int]
    """Those whose trial is done."""
    scores: list[float]
    """Test scores, in the order of the seeds."""
    mean: float | None
    """Of the scores; None where there is none."""
    std: float | None
    """Their standard deviation (n − 1); None for fewer than two."""
    without_prompt: float | None
    """Test score of a zero prompt, mean over the seeds, which choose no test rows."""
    failed: int
    """Trials that failed."""


class Row(Part):
    """A method, a bundle and an engine: one row of the table."""

    method: Method
    """That the bundle was exported for."""
    bundle: str
    """Name of its folder."""
    engine: str
    """Of the searches and of the tests."""
    cells: list[Cell]
    """In the order of the tasks."""
    mean: float | None
    """Of the cells' means; None unless every task has one."""
    without_prompt: float | None
    """The same of a zero prompt."""


class Report(Part):
    """report.json."""

    version: int = VERSION
    """Of this schema."""
    created: str
    """When it was written, UTC, ISO 8601."""
    interrupted: bool
    """Whether trials were left out because someone interrupted the sweep."""
    sweep: Sweep
    """What was asked for."""
    rows: list[Row]
    """The table."""
    trials: list[TrialRow]
    """Everything behind it."""
    versions: dict[str, str]
    """Of bbt-accel and Python."""

    def count(self, status: str) -> int:
        return sum(trial.status == status for trial in self.trials)


def make_report(
    sweep: Sweep,
    trials: Sequence[Trial],
    results: Mapping[str, Result],
    failures: Mapping[str, str],
    interrupted: bool = False,
) -> Report:
    """results, failures: by the names of trials; what is in neither was not run."""
    groups: dict[tuple[Method, str, str], dict[str, list[Trial]]] = {}
    for t in trials:
        groups.setdefault((t.method, t.bundle_name, t.engine), {}).setdefault(t.task_name, []).append(t)
    rows = []
    for (method, bundle, engine), tasks in groups.items():
        cells = [_cell(task, some, results, failures) for task, some in tasks.items()]
        mean = _mean_of_all([cell.mean for cell in cells])
        without = _mean_of_all([cell.without_prompt for cell in cells])
        rows.append(Row(method=method, bundle=bundle, engine=engine, cells=cells, mean=mean, without_prompt=without))
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        interrupted=interrupted,
        sweep=sweep,
        rows=rows,
        trials=[_trial_row(t, results.get(t.name), failures.get(t.name)) for t in trials],
        versions={"bbt-accel": bbt_accel.__version__, "python": platform.python_version()},
    )


def _cell(task: str, trials: Sequence[Trial], results: Mapping[str, Result], failures: Mapping[str, str]) -> Cell:
    done = [results[t.name] for t in trials if t.name in results]
    scores = [result.score for result in done]
    return Cell(
        task=task,
        metric=trials[0].metric,
        seeds=[result.trial.seed for result in done],
        scores=scores,
        mean=statistics.fmean(scores) if scores else None,
        std=statistics.stdev(scores) if len(scores) > 1 else None,
        without_prompt=statistics.fmean(result.without_prompt for result in done) if done else None,
        failed=sum(t.name in failures for t in trials),
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found and len(found) == len(values) else None


def _trial_row(trial: Trial, result: Result | None, failure: str | None) -> TrialRow:
    row = TrialRow(
        name=trial.name,
        task=trial.task_name,
        bundle=trial.bundle_name,
        engine=trial.engine,
        seed=trial.seed,
        status="done" if result else "failed" if failure else "not run",
        reason=failure,
    )
    if result is not None:
        row.score, row.without_prompt, row.dev_score = result.score, result.without_prompt, result.dev_score
        row.test_rows, row.calls, row.seconds = result.rows, result.calls, result.seconds
        row.versions = result.versions
    return row
