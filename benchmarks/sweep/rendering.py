"""The report of a sweep as Markdown, its table in the form of the papers, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bbt_accel.benchmarks.sweep.report import CrossEvaluation, ScoreCell, SweepReport, SweepRow
from bbt_accel.io.report_page import hover
from bbt_accel.io.reporting import (
    GREY,
    MARKERS,
    PALETTE,
    PLOT,
    figure,
    markdown_list,
    markdown_table,
    mean_and_std,
    percent,
    tidy,
    with_metric,
)

METHODS = {"bbt": "BBT", "bbtv2": "BBTv2"}
STYLES = ("-", "--", ":", "-.")  # of tasks


def markdown(report: SweepReport, plot: bool = True) -> str:
    """report.md; `plot`: whether report.png lies beside it."""
    image = [f"![Test scores by task]({PLOT})"] if plot else []
    parts = [
        "# Sweep",
        summary(report),
        *image,
        "## Trials",
        _trials(report),
        "## What was run",
        _facts(report),
    ]
    return "\n\n".join(parts) + "\n"


def summary(report: SweepReport) -> str:
    """The table of scores, what failed, and the cross-evaluation."""
    counts = [
        f"{report.count(status)} {status}"
        for status in ("done", "failed", "not run")
        if report.count(status)
    ]
    hint = " Interrupted; continue with --resume." if report.interrupted else ""
    seeds = len(report.sweep.seeds)
    mean = f"mean over {seeds} seeds and (standard deviation, n − 1)" if seeds > 1 else "one seed"
    legend = (
        f"Percent on the test rows, {mean}. `without_prompt` is the same bundle before the search, "
    )
    legend += "`batch_calibrated` the same with the label bias removed."
    parts = [f"{len(report.trials)} trials: {', '.join(counts)}.{hint}", scores(report), legend]
    failures = {trial.name: trial.reason for trial in report.trials if trial.reason}
    if report.cross_evaluation is not None:
        parts += _cross_evaluation(report.cross_evaluation)
        failures |= report.cross_evaluation.failures
    return "\n\n".join([*parts, *(["## Failed", markdown_list(failures)] if failures else [])])


def scores(report: SweepReport) -> str:
    """Mean and standard deviation, one column per task; below each bundle its scores without a
    search.
    """
    cells = report.rows[0].cells
    several = len(cells) > 1
    titles = [with_metric(cell.task, cell.metric) for cell in cells]
    header = ["method", "bundle", "engine", *titles, *(["mean"] if several else [])]
    lines = []
    for row in report.rows:
        seeds = len(report.sweep.seeds)
        tuned = [
            *(_cell(cell, seeds) for cell in row.cells),
            *([percent(row.mean)] if several else []),
        ]
        lines.append([METHODS[row.method], row.bundle, row.engine, *tuned])
        for name in ("without_prompt", "batch_calibrated"):
            values = [getattr(cell, name) for cell in (*row.cells, *([row] if several else []))]
            lines.append([name, row.bundle, row.engine, *map(percent, values)])
    return markdown_table(header, lines, text_columns=3)


def draw(file: Path, report: SweepReport) -> None:
    """The test scores by task above, and below them the dev scores of every trial during its
    search.
    """
    cells = report.rows[0].cells
    width = 2.5 + max(4.5, 1.9 * len(cells))
    with figure(file, width, 7.6, nrows=2, height_ratios=(3, 2)) as (drawn, (above, below)):
        step = 0.7 / len(report.rows)
        for number, row in enumerate(report.rows):
            offset = (number - (len(report.rows) - 1) / 2) * step
            colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            _draw_row(above, row, offset, step, colour, marker)
            _draw_curves(below, report, row, colour)
        above.plot([], [], color=GREY, linewidth=2, label="without a prompt")
        above.set_xticks(
            range(len(cells)), [with_metric(cell.task, cell.metric, "\n") for cell in cells]
        )
        above.set_xlim(-0.6, len(cells) - 0.4)
        above.set_ylabel("test score, percent")
        seeds = len(report.sweep.seeds)
        spread = f"{seeds} seeds (dots), mean ± standard deviation" if seeds > 1 else "one seed"
        above.set_title(f"Test scores: {spread}", fontsize=11, loc="left")
        tidy(above, "y")
        below.set(xlabel="calls", ylabel="dev score, percent")
        below.set_title("Dev scores of the prompts during each search", fontsize=11, loc="left")
        tidy(below)
        drawn.legend(fontsize=9, loc="outside lower left", ncols=2, frameon=False)


def _draw_curves(axes: Any, report: SweepReport, row: SweepRow, colour: str) -> None:
    """A line for each trial of a row, of a style for each task."""
    for number, cell in enumerate(row.cells):
        for t in report.trials:
            if t.curve and (t.task, t.bundle, t.engine) == (cell.task, row.bundle, row.engine):
                calls, scores = zip(*t.curve, strict=True)
                style = {
                    "color": colour,
                    "linestyle": STYLES[number % len(STYLES)],
                    "marker": ".",
                    "alpha": 0.7,
                }
                (line,) = axes.plot(
                    calls, [100 * score for score in scores], linewidth=1.2, **style
                )
                name = f"{t.task}, {t.bundle}, {t.engine}, seed {t.seed}"
                hover(line, [f"{name}, {n:,} calls: {percent(s)}" for n, s in t.curve])


def _draw_row(
    axes: Any, row: SweepRow, offset: float, step: float, colour: str, marker: str
) -> None:
    label = name = f"{METHODS[row.method]}, {row.bundle}, {row.engine}"
    style = {"fmt": marker, "color": colour, "markersize": 7, "capsize": 3}
    for task, cell in enumerate(row.cells):
        x = task + offset
        if cell.without_prompt is not None:
            at = [x - 0.4 * step, x + 0.4 * step]
            (line,) = axes.plot(at, [100 * cell.without_prompt] * 2, color=GREY, linewidth=2)
            hover(line, [f"{name}, {cell.task}: {percent(cell.without_prompt)} without a prompt"])
        scores = [100 * s for s in cell.scores]
        (dots,) = axes.plot([x + 0.2 * step] * len(scores), scores, ".", color=colour, alpha=0.5)
        hover(
            dots,
            [
                f"{name}, {cell.task}, seed {n}: {s:.2f}"
                for n, s in zip(cell.seeds, scores, strict=True)
            ],
        )
        if cell.mean is not None:
            spread = None if cell.std is None else 100 * cell.std
            drawn = axes.errorbar(x, 100 * cell.mean, yerr=spread, label=label, **style)
            hover(drawn[0], [f"{name}, {cell.task}: mean {mean_and_std(cell.scores)}"])
            label = "_"  # one entry per row in the legend


def _cell(cell: ScoreCell, seeds: int) -> str:
    """89.56 (0.25), and how many trials it has, where some are missing or have failed."""
    if cell.mean is None:
        return "failed" if cell.failed else "–"
    return mean_and_std(cell.scores) + (
        f", {len(cell.seeds)} of {seeds} seeds" if len(cell.seeds) < seeds else ""
    )


def _cross_evaluation(found: CrossEvaluation) -> list[str]:
    lines = [
        [s.task, s.engine, s.tuned_in, s.scored_in, str(len(s.seeds)), mean_and_std(s.scores)]
        for s in found.scores
    ]
    agreements = [
        f"- {a.task}, {a.engine}, prompts tuned in {a.tuned_in}: {a.bundles[0]} and "
        f"{a.bundles[1]} predict the same "
        f"class for {percent(a.agreement)} % of the test rows."
        for a in found.agreements
    ]
    return [
        "## Cross-evaluation",
        "The prompts of each bundle, scored in every bundle that takes them.",
        markdown_table(
            ["task", "engine", "tuned in", "scored in", "seeds", "score"], lines, text_columns=4
        ),
        *(["\n".join(agreements)] if agreements else []),
    ]


def _trials(report: SweepReport) -> str:
    header = [
        "task",
        "bundle",
        "engine",
        "seed",
        "status",
        "test",
        "without_prompt",
        "batch_calibrated",
        "dev",
        "calls",
        "search s",
    ]
    lines = []
    for t in report.trials:
        measured = [
            percent(value) for value in (t.score, t.without_prompt, t.batch_calibrated, t.dev_score)
        ]
        spent = (
            ["–", "–"]
            if t.calls is None or t.seconds is None
            else [f"{t.calls:,}", f"{t.seconds:,.0f}"]
        )
        lines.append([t.task, t.bundle, t.engine, str(t.seed), t.status, *measured, *spent])
    return markdown_table(header, lines, text_columns=5)


def _facts(report: SweepReport) -> str:
    sweep = report.sweep
    settings = ", ".join(f"{name} {value}" for name, value in sweep.settings.items())
    rows = {trial.task: trial.test_rows for trial in report.trials if trial.test_rows is not None}
    versions = dict(report.versions)
    for trial in report.trials:
        versions |= trial.versions
    return markdown_list(
        {
            "Tasks": sweep.tasks,
            "Seeds": sweep.seeds,
            "Settings": f"{settings}, and otherwise the tasks' presets"
            if settings
            else "the tasks' presets",
            "Device": sweep.device,
            "Test rows": ", ".join(f"{task} {count:,}" for task, count in rows.items()),
            "Versions": versions,
            "Date": report.created,
        }
    )
