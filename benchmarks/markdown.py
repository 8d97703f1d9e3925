"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bbt_accel.benchmarks.accuracy import LARGEST_ERROR, LEAST_AGREEMENT
from bbt_accel.benchmarks.report import Report, Row, Tuned
from bbt_accel.display import markdown_table, text

METRICS = {"accuracy": "accuracy", "f1": "F1"}
STEADY = 0.1
"""Drift of the baseline beyond which the report warns."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, the field of `Row` that it shows, and how."""

    header: str
    field: str
    write: Callable[[Any], str]

    def cell(self, row: Row) -> str:
        value = getattr(row, self.field)
        return "–" if value is None else self.write(value)


def digits(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def tuned_text(tuned: Tuned) -> str:
    return f"{tuned.mean:.3f}" + (f" ± {tuned.std:.3f}" if tuned.std is not None else "")


SPEED = (
    Column("status", "status", str),
    Column("ms", "ms_median", digits),
    Column("p90", "ms_p90", digits),
    Column("p99", "ms_p99", digits),
    Column("cand./s", "candidates_per_second", digits),
    Column("× eager", "speedup", "{:.2f}".format),
    Column("rate", "matrix_share", "{:.0%}".format),
    Column("MiB", "peak_mib", "{:,.0f}".format),
)
FIDELITY = (
    Column("status", "status", str),
    Column("bundle", "bundle_mib", "{:,.1f}".format),
    Column("logit error", "max_error", "{:.1e}".format),
    Column("agreement", "agreement", "{:.3f}".format),
    Column("{metric}", "score", "{:.3f}".format),
)
TUNED = (
    Column("tuned {metric}", "tuned", tuned_text),
    Column("search s", "tuned", lambda tuned: f"{tuned.seconds:.0f}"),
)


def markdown(report: Report, plot: str) -> str:
    """The whole report.md; `plot` is the file name of the picture."""
    columns = FIDELITY + (TUNED if any(row.tuned for row in report.rows) else ())
    parts = [
        f"# {report.backbone} on {report.task}",
        summary(report),
        "## Speed",
        table(report, SPEED),
        f"![Speed and {METRICS[report.metric]} of each row]({plot})",
        "## Fidelity",
        table(report, columns),
        *savings(report),
        *reasons(report),
        "## What was measured",
        facts(report),
        "## Columns",
        legend((*SPEED, *columns[1:]), report),
    ]
    return "\n\n".join(parts) + "\n"


def summary(report: Report) -> str:
    counts = {status: sum(row.status == status for row in report.rows) for status in (r.status for r in report.rows)}
    found = ", ".join(f"{count} {status}" for status, count in counts.items())
    timed = [row for row in report.rows if row.speedup and row.status == "passed" and row is base_of(row, report)]
    best = max(timed, key=lambda row: row.speedup or 0.0, default=None)
    text = f"{len(report.rows)} rows: {found}."
    if best is not None and best.engine != "eager":
        text += f" Fastest that passed: **{best.label}**, {best.speedup:.2f} times eager PyTorch."
    if abs(report.baseline.drift or 0.0) > STEADY:
        text += (
            f"\n\n**The machine was not steady:** eager's own time changed by {report.baseline.drift:+.0%} from before "
            "the other rows to after them, and no ratio here is better than that. Measure again on an idle machine."
        )
    return text


def base_of(row: Row, report: Report) -> Row:
    """The row of the same engine and precision with the fewest savings switched off, which comes first."""
    return next(r for r in report.rows if (r.engine, r.precision) == (row.engine, row.precision))


def table(report: Report, columns: Sequence[Column]) -> str:
    headers = [column.header.format(metric=METRICS[report.metric]) for column in columns]
    lines = [[row.label, *(column.cell(row) for column in columns)] for row in report.rows]
    return markdown_table(["row", *headers], lines, text_columns=1 + sum(c.field == "status" for c in columns))


def savings(report: Report) -> list[str]:
    """What each saving brings: the time without it, over the time of the same row with it."""
    lines = []
    for row in report.rows:
        base = base_of(row, report)
        if row is base or row.ms_median is None or base.ms_median is None:
            continue
        off = ", ".join(name for name in row.without if name not in base.without)
        ratio = row.ms_median / base.ms_median
        lines.append([base.label, off, digits(base.ms_median), digits(row.ms_median), f"{ratio:.2f}"])
    header = ["row", "saving", "ms with it", "ms without it", "factor"]
    return ["## What each saving brings", markdown_table(header, lines, text_columns=2)] if lines else []


def reasons(report: Report) -> list[str]:
    lines = [f"- **{row.label}**: {row.status}: {row.reason}" for row in report.rows if row.reason]
    return ["## Not passed", "\n".join(lines)] if lines else []


def facts(report: Report) -> str:
    work, machine, steady = report.workload, report.machine, report.baseline
    int8 = machine.int8_rate_by if machine.int8_rate is None else f"{machine.int8_rate:,.0f} Gop/s"
    again = (
        f"{digits(steady.last_ms)} ms after them, drift {steady.drift:+.1%}" if steady.last_ms else "no second timing"
    )
    lines = [
        f"**Backbone:** {report.backbone} ({report.family}), {report.method}, {report.prompt_mode} mode, "
        f"{report.n_prompt_tokens} prompt tokens",
        f"**Timed:** {work.rows} rows padded to {work.length} tokens ({work.padding:.0%} padding), "
        f"{work.popsize} candidates a call, {work.repeats} calls after one to warm up",
        f"**Compared:** {work.test_rows} test rows, one {work.prompt} prompt for all rows, seed {work.seed}",
        f"**Arithmetic:** {work.naive_flops / 1e9:,.1f} GFLOP a candidate in eager PyTorch",
        f"**Machine:** {machine.cpu}, {machine.cores} cores, {work.threads} threads, {work.device}"
        + "".join(f"; {gpu}" for gpu in machine.gpus),
        f"**Matrix rate:** fp32 {machine.fp32_rate:,.0f} GFLOP/s, int8 {int8}",
        f"**Steadiness:** eager took {digits(steady.first_ms)} ms a candidate before the rows, {again}",
        f"**Versions:** {text(report.versions)}",
        f"**Date:** {report.created}",
        f"**Command:** `{report.command}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def legend(columns: Sequence[Column], report: Report) -> str:
    """Each column in a sentence or two: the schema's own."""
    lines = []
    for field in dict.fromkeys(column.field for column in columns):
        headers = [c.header.format(metric=METRICS[report.metric]) for c in columns if c.field == field]
        text = " ".join((Row.model_fields[field].description or "").split())
        lines.append(f"- **{' and '.join(headers)}**: {text}")
    lines.append(
        f"- An fp32 row passes with a logit error of at most {LARGEST_ERROR:.0e}, a row of lower precision with an "
        f"agreement of at least {LEAST_AGREEMENT}."
    )
    return "\n".join(lines)
