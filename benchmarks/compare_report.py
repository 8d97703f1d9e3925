"""The report of a comparison: scores by contender and task, differences in pairs, and accuracy over
calls.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance

from pydantic import Field
from scipy.stats import t

from bbt_accel.core.settings import Metric
from bbt_accel.io.report_page import hover
from bbt_accel.io.reporting import (
    MARKERS,
    PALETTE,
    PLOT,
    Schema,
    digits,
    figure,
    markdown_list,
    markdown_table,
    mean_and_std,
    mean_if_complete,
    percent,
    tidy,
    with_metric,
)

Pair = tuple[str, int]
"""A task and a seed, by which contenders are compared in pairs."""
PAIRS = (
    "Points, over pairs of the same task and seed; the intervals are of the mean over these "
    "tasks, not of others."
)
"""What the tables of differences show."""
NARROW = 5
"""Points that the vertical axis of a plot covers at least."""
ENSEMBLE = ", ensemble"
"""Ends the name of a trained contender that is read by a fitted ensemble instead of the label
words.
"""


class Score(Schema):
    """One contender on one task, seed and budget."""

    contender: str = Field(description="What was compared, by its name in `compare --contenders`.")
    task: str = Field(description="Name of the task.")
    metric: Metric = Field(description="The metric of the task.")
    seed: int = Field(description="Seed of the few-shot rows, the projection and the search.")
    budget: int | None = Field(
        description="Calls that it was allowed; None where it takes a fixed number."
    )
    calls: int
    """Forward passes of the train rows; a training step counts as three. Those for dev scores are
    not counted.
    """
    score: float
    """The task's metric on the test rows."""
    seconds: float
    """Wall clock, from loading the model to the last fit, smaller budgets included; without the
    test rows.
    """
    peak_mib: float | None
    """Largest resident memory of its process so far."""
    chosen: str | None = Field(description="What `auto` chose.")
    test_rows: str | None = Field(
        default=None, description="sha256 of the test rows; None in older reports."
    )

    @property
    def label(self) -> str:
        return self.contender if self.budget is None else f"{self.contender} {self.budget:,}"

    @property
    def pair(self) -> Pair:
        return self.task, self.seed


class Difference(Schema):
    """The reference with a budget, minus another contender, over all tasks and seeds that have
    both.
    """

    reference: str = Field(description="Label of the reference: contender and budget.")
    other: str = Field(description="Label of the other contender.")
    mean: float = Field(description="Mean over the pairs.")
    interval: tuple[float, float] | None
    """95 %, of the mean over these tasks, by Student's t; None where a task has a single pair."""
    worst_task: str = Field(description="The task with the lowest difference.")
    worst: float = Field(description="That difference, mean over seeds.")


class CompareReport(Schema):
    """report.json of `bbt-accel compare`."""

    scores: list[Score] = Field(description="Of every contender, task, seed and budget.")
    differences: list[Difference] = Field(
        description="Of the reference with each budget from every other contender."
    )
    failures: dict[str, str]
    """Trial → why it failed."""
    facts: dict[str, str] = Field(description="The command, the machine and the date.")


def make_report(
    scores: list[Score],
    failures: dict[str, str],
    facts: dict[str, str],
    reference: str | None = "auto",
) -> CompareReport:
    """reference: the contender whose differences from the others are shown; None for no
    differences.
    """
    labels = dict.fromkeys((score.contender, score.label) for score in scores)
    own = [label for contender, label in labels if contender == reference]
    pairs = [(one, other) for one in own for _, other in labels if other not in own]
    differences = [found for pair in pairs if (found := difference(scores, *pair)) is not None]
    return CompareReport(scores=scores, differences=differences, failures=failures, facts=facts)


def difference(scores: Sequence[Score], reference: str, other: str) -> Difference | None:
    """None where no task and seed has both."""
    pairs = paired(
        *(
            {score.pair: score for score in scores if score.label == label}
            for label in (reference, other)
        )
    )
    if not pairs:
        return None
    mean, limits = interval(pairs)
    tasks = {
        task: fmean(value for (name, _), value in pairs.items() if name == task)
        for task, _ in pairs
    }
    worst = min(tasks, key=lambda task: tasks[task])
    return Difference(
        reference=reference,
        other=other,
        mean=mean,
        interval=limits,
        worst_task=worst,
        worst=tasks[worst],
    )


def paired(own: Mapping[Pair, Score], other: Mapping[Pair, Score]) -> dict[Pair, float]:
    """The difference of two contenders for each task and seed that has both, in their order."""
    return {pair: own[pair].score - other[pair].score for pair in sorted(own.keys() & other.keys())}


def interval(pairs: Mapping[Pair, float]) -> tuple[float, tuple[float, float] | None]:
    """The mean over tasks of values by task and seed, and its 95 % interval; None for a task with a
    single value.

    By Student's t, from the deviations within each task, with Satterthwaite's degrees of freedom:
    of these tasks, with other seeds; of other tasks it says nothing. Not by the bootstrap, whose
    intervals of so few values are too narrow.
    """
    by_task = defaultdict[str, list[float]](list)
    for (task, _), value in pairs.items():
        by_task[task].append(value)
    tasks = list(by_task.values())
    mean = fmean(map(fmean, tasks))
    if min(map(len, tasks)) < 2:
        return mean, None
    parts = [variance(own) / len(own) / len(tasks) ** 2 for own in tasks]
    total = sum(parts)
    freedom = (
        total**2 / sum(part**2 / (len(own) - 1) for part, own in zip(parts, tasks, strict=True))
        if total
        else 1
    )
    half = float(t.ppf(0.975, freedom)) * total**0.5
    return mean, (mean - half, mean + half)


def points(mean: float, limits: tuple[float, float] | None) -> tuple[str, str]:
    """A difference and its interval, for a table."""
    return f"{100 * mean:+.1f}", "–" if limits is None else " to ".join(
        f"{100 * limit:+.1f}" for limit in limits
    )


def markdown(report: CompareReport, plot: bool = True) -> str:
    """report.md. plot: whether there is one."""
    parts = ["# Comparison"]
    if report.scores:
        parts += [summary(report), *([f"![Accuracy over calls]({PLOT})"] if plot else [])]
    if report.differences:
        parts += ["## Differences", gains(report)]
    if report.failures:
        parts += ["## Failed", markdown_list(report.failures)]
    return "\n\n".join([*parts, "## What was run", markdown_list(report.facts)]) + "\n"


def summary(report: CompareReport) -> str:
    """Scores by contender and task, their cost, and the legend."""
    metrics = dict.fromkeys((score.task, score.metric) for score in report.scores)
    tasks = [task for task, _ in metrics]
    header = ["contender", *(with_metric(task, metric) for task, metric in metrics)]
    header += ["mean", "calls", "seconds", "MiB"]
    lines = []
    for own in by_label(report.scores).values():
        cells = [[s.score for s in own if s.task == task] for task in tasks]
        peaks = [s.peak_mib for s in own if s.peak_mib is not None]
        cost = [digits(fmean(s.calls for s in own)), digits(fmean(s.seconds for s in own))]
        cost.append(digits(max(peaks)) if peaks else "–")
        scores = [mean_and_std(cell, 1, "{} ± {}") for cell in cells]
        lines.append([own[0].label, *scores, percent(mean_of_tasks(own, tasks), 1), *cost])
    counts = Counter((score.label, score.task) for score in report.scores).values()
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    over = "one seed" if seeds == "1" else f"mean over {seeds} seeds ± standard deviation"
    legend = (
        f"Percent on the test rows, {over}. Calls, seconds: mean per search. MiB: largest "
        "memory of a process so far."
    )
    return f"{markdown_table(header, lines)}\n\n{legend}"


def gains(report: CompareReport) -> str:
    lines = []
    for d in report.differences:
        worst = f"{d.worst_task} {100 * d.worst:+.1f}"
        lines.append([d.reference, d.other, *points(d.mean, d.interval), worst])
    legend = f"{PAIRS} In the last column the task where the first gains least."
    header = ["contender", "minus", "mean", "95 % interval", "least"]
    return f"{markdown_table(header, lines, text_columns=2)}\n\n{legend}"


def mean_of_tasks(scores: Sequence[Score], tasks: Sequence[str]) -> float | None:
    """The mean over tasks of the means over seeds; None unless every task has a score."""
    of_task = ([score.score for score in scores if score.task == task] for task in tasks)
    return mean_if_complete([fmean(own) if own else None for own in of_task])


def by_label(scores: Sequence[Score]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.label, []).append(score)
    return found


def draw(file: Path, report: CompareReport) -> None:
    """Mean score over all tasks against forward passes, on a logarithmic axis, of contenders that
    have them all.
    """
    lines: dict[str, list[tuple[float, float, str]]] = {}
    tasks = list(dict.fromkeys(score.task for score in report.scores))
    for label, own in by_label(report.scores).items():
        calls, score = fmean(s.calls for s in own), mean_of_tasks(own, tasks)
        if score is None:
            continue
        value = f"{label}: {percent(score, 1)} %, calls {digits(calls)}"
        lines.setdefault(own[0].contender, []).append((max(1.0, calls), 100 * score, value))
    with figure(file, 9, 5.2) as (drawn, axes):
        for name, style in styles({name: len(points) for name, points in lines.items()}).items():
            x, y, values = zip(*sorted(lines[name]), strict=True)
            (line,) = axes.plot(
                x, y, label=name, linewidth=1.4 if len(x) > 1 else 0, markersize=6, **style
            )
            hover(line, values)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        first, last = axes.get_xlim()
        if last < 10 * first:  # no decade between the ends: only minor ticks have numbers
            axes.xaxis.set_minor_formatter("{x:,.0f}")
        low, high = axes.get_ylim()
        if high - low < NARROW:  # so that noise does not look like a trend
            middle = (low + high) / 2
            axes.set_ylim(middle - NARROW / 2, middle + NARROW / 2)
        zero = " (0 is drawn at 1)" if any(score.calls < 1 for score in report.scores) else ""
        axes.set(
            xlabel=f"forward passes of the train rows{zero}", ylabel="mean test score, percent"
        )
        axes.set_title(
            "Accuracy per forward pass, mean over tasks and seeds", fontsize=11, loc="left"
        )
        tidy(axes)
        drawn.legend(fontsize=9, loc="outside right upper", frameon=False)


def styles(counts: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """How matplotlib draws each contender: curves first, in distinct colours; an ensemble as what
    it reads, dashed.

    counts: contender → its points.
    """
    order = sorted(counts, key=lambda name: counts[name] == 1)
    numbers = {
        name: number
        for number, name in enumerate(dict.fromkeys(n.removesuffix(ENSEMBLE) for n in order))
    }
    found = dict[str, dict[str, str]]()
    for name in order:
        mark, colour = divmod(numbers[name.removesuffix(ENSEMBLE)], len(PALETTE))
        line = "--" if name.endswith(ENSEMBLE) else "-"
        found[name] = {
            "color": PALETTE[colour],
            "marker": MARKERS[mark % len(MARKERS)],
            "linestyle": line,
        }
    return found
