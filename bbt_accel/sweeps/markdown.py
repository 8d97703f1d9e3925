"""The report of a sweep as Markdown, its table in the form of the papers'."""

from __future__ import annotations

from bbt_accel.benchmarks.markdown import METRICS
from bbt_accel.display import markdown_table, text
from bbt_accel.sweeps.report import Cell, Report, Row

METHODS = {"bbt": "BBT", "bbtv2": "BBTv2"}


def markdown(report: Report, plot: str | None) -> str:
    """The whole report.md; `plot` is the file name of the picture."""
    parts = [
        "# Sweep",
        summary(report),
        scores(report),
        legend(report),
        *([f"![Test scores by task]({plot})"] if plot else []),
        *failures(report),
        "## Trials",
        trials(report),
        "## What was run",
        facts(report),
    ]
    return "\n\n".join(parts) + "\n"


def summary(report: Report) -> str:
    counts = [f"{report.count(status)} {status}" for status in ("done", "failed", "not run") if report.count(status)]
    hint = " It was interrupted; --resume goes on." if report.interrupted else ""
    return f"{len(report.trials)} trials: {', '.join(counts)}.{hint}"


def scores(report: Report) -> str:
    """Mean and standard deviation, a column a task; under each bundle's methods what it does without a prompt."""
    cells = report.rows[0].cells
    several = len(cells) > 1
    header = ["method", "bundle", "engine", *(_task(cell) for cell in cells), *(["mean"] if several else [])]
    lines = []
    for row in report.rows:
        means = [percent(row.mean)] if several else []
        lines.append([METHODS[row.method], row.bundle, row.engine, *map(cell_text, row.cells), *means])
        without = [percent(cell.without_prompt) for cell in row.cells] + (
            [percent(row.without_prompt)] if several else []
        )
        lines.append(["no prompt", row.bundle, row.engine, *without])
    return markdown_table(header, lines, text_columns=3)


def cell_text(cell: Cell) -> str:
    """89.56 (0.25); how many trials it stands for, where some failed."""
    if cell.mean is None:
        return "failed" if cell.failed else "–"
    text = percent(cell.mean) + (f" ({percent(cell.std)})" if cell.std is not None else "")
    return text + (f", {cell.failed} failed" if cell.failed else "")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def legend(report: Report) -> str:
    seeds = len(report.sweep.seeds)
    text = "Percent on the test rows"
    text += f", mean over {seeds} seeds and (standard deviation, n − 1). " if seeds > 1 else ", one seed. "
    return text + "`no prompt` is the same bundle with a zero prompt."


def failures(report: Report) -> list[str]:
    lines = [f"- **{trial.name}**: {trial.reason}" for trial in report.trials if trial.reason]
    return ["## Failed", "\n".join(lines)] if lines else []


def trials(report: Report) -> str:
    header = ["task", "bundle", "engine", "seed", "status", "test", "no prompt", "dev", "calls", "search s"]
    lines = []
    for t in report.trials:
        measured = [percent(t.score), percent(t.without_prompt), percent(t.dev_score)]
        spent = ["–", "–"] if t.calls is None or t.seconds is None else [f"{t.calls:,}", f"{t.seconds:,.0f}"]
        lines.append([t.task, t.bundle, t.engine, str(t.seed), t.status, *measured, *spent])
    return markdown_table(header, lines, text_columns=5)


def facts(report: Report) -> str:
    sweep = report.sweep
    settings = ", ".join(f"{name} {value}" for name, value in sweep.settings.items())
    found = {
        "Tasks": ", ".join(sweep.tasks),
        "Seeds": ", ".join(map(str, sweep.seeds)),
        "Settings": f"{settings}; for the rest the tasks' presets" if settings else "the tasks' presets",
        "Device": sweep.device,
        "Test rows": ", ".join(f"{task} {rows:,}" for task, rows in _test_rows(report).items()),
        "Versions": text(_versions(report)),
        "Date": report.created,
    }
    return "\n".join(f"- **{name}:** {value}" for name, value in found.items() if value)


def label(row: Row) -> str:
    """How pictures name a row."""
    return f"{METHODS[row.method]}, {row.bundle}, {row.engine}"


def _task(cell: Cell) -> str:
    return cell.task if cell.metric == "accuracy" else f"{cell.task} ({METRICS[cell.metric]})"


def _test_rows(report: Report) -> dict[str, int]:
    return {trial.task: trial.test_rows for trial in report.trials if trial.test_rows is not None}


def _versions(report: Report) -> dict[str, str]:
    found = dict(report.versions)
    for trial in report.trials:
        found |= trial.versions
    return found
