"""report.md and report.png of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbt_accel.benchmarks.measurements import LARGEST_ERROR, LEAST_AGREEMENT, BenchReport, Measurement, TuningScores
from bbt_accel.benchmarks.script import Columns, columns_legend, page, rows_table
from bbt_accel.reporting import (
    BLUE,
    GREY,
    METRICS,
    ORANGE,
    PLOT,
    digits,
    figure,
    markdown_list,
    markdown_table,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEADY = 0.1
"""Drift of the machine beyond which the report warns."""
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
"""Keeps lines from running through a text."""


def tuning_text(tuned: TuningScores) -> str:
    return f"{tuned.mean:.3f}" + (f" ± {tuned.std:.3f}" if tuned.std is not None else "")


ratio: Callable[[Any], str] = "{:.2f}".format
NAMES: Columns = {"row": ("label", str), "status": ("status", str)}
SPEED: Columns = NAMES | {
    "ms": ("ms_median", digits),
    "p90": ("ms_p90", digits),
    "p99": ("ms_p99", digits),
    "candidates/s": ("candidates_per_second", digits),
    "× fastest baseline": ("speedup_over_fastest", ratio),
    "× original": ("speedup", ratio),
    "share of fp32 rate": ("fp32_share", "{:.0%}".format),
    "MiB": ("peak_mib", "{:,.0f}".format),
}
FIDELITY: Columns = NAMES | {
    "bundle MiB": ("bundle_mib", "{:,.1f}".format),
    "logit error": ("max_error", "{:.1e}".format),
    "agreement": ("agreement", "{:.3f}".format),
    "score": ("score", "{:.3f}".format),
}
TUNED: Columns = {"tuned score": ("tuned", tuning_text), "search s": ("tuned", lambda tuned: f"{tuned.seconds:.0f}")}


def bench_markdown(report: BenchReport) -> str:
    fidelity = FIDELITY | (TUNED if any(row.tuned for row in report.rows) else {})
    reasons = [f"- **{row.label}**: {row.status}: {row.reason}" for row in report.rows if row.reason]
    passing = (
        f"- An fp32 row passes with a logit error of at most {LARGEST_ERROR:.0e}, a row of lower precision with an "
        f"agreement of at least {LEAST_AGREEMENT}. Scores are {METRICS[report.metric]}."
    )
    return page(
        f"# {report.options.backbone} on {report.task}",
        summary(report),
        "## Speed",
        rows_table(report.rows, SPEED, text_columns=2),
        f"![Speed and {METRICS[report.metric]} of each row]({PLOT})",
        "## Fidelity",
        rows_table(report.rows, fidelity, text_columns=2),
        ablation(report.rows),
        "## Not passed" * bool(reasons),
        "\n".join(reasons),
        "## What was measured",
        facts(report),
        "## Columns",
        f"{columns_legend(Measurement, SPEED | fidelity)}\n{passing}",
    )


def summary(report: BenchReport) -> str:
    """The result in a sentence, and a warning if the machine was not steady."""
    counts = {status: sum(row.status == status for row in report.rows) for status in (r.status for r in report.rows)}
    text = f"{len(report.rows)} rows: {', '.join(f'{count} {status}' for status, count in counts.items())}."
    text += f" The fastest baseline is {report.fastest_baseline}."
    if (best := report.fastest) is not None:
        text += (
            f" The fastest engine that passed is **{best.label}**: {best.speedup_over_fastest:.2f} times the fastest "
            f"baseline and {best.speedup:.2f} times the original's forward, on {processor(report)}."
        )
    if abs(report.drift.change or 0.0) > STEADY:
        text += (
            f"\n\n**The machine was not steady:** the time of the original's forward changed by "
            f"{report.drift.change:+.0%} from before the other rows to after them, and no ratio here is more precise "
            "than that. Measure again on an idle machine."
        )
    return text


def processor(report: BenchReport) -> str:
    """What computed, by its name."""
    if report.options.device == "cuda":
        return "; ".join(report.machine["gpus"])
    return f"{report.machine['cpu']} ({report.options.threads} threads)"


def setting(report: BenchReport) -> str:
    asked = report.options
    where = f"{Path(asked.backbone).name} on {report.task}"
    return f"{where}: {asked.method}, {asked.prompt_mode} mode, {asked.n_prompt_tokens} prompt tokens"


def rows_of(report: BenchReport) -> str:
    return f"{report.n_rows} rows × {report.length} tokens, {report.options.popsize} candidates per call"


def prompt_of(report: BenchReport) -> str:
    return f"one {'tuned' if report.original.tuned else 'random'} prompt"


def ablation(rows: list[Measurement]) -> str:
    """What each optimization contributes: the time without it over the time of the same row with it."""
    lines, base = [], rows[0]
    for row in rows:
        if not row.ablation:
            base = row
        elif row.ms_median is not None and base.ms_median is not None:
            off = ", ".join(name for name in row.without if name not in base.without)
            factor = ratio(row.ms_median / base.ms_median)
            lines.append([base.label, off, digits(base.ms_median), digits(row.ms_median), factor])
    header = ["row", "optimization", "ms with it", "ms without it", "factor"]
    return f"## Ablation\n\n{markdown_table(header, lines, text_columns=2)}" if lines else ""


def facts(report: BenchReport) -> str:
    machine, flops = report.machine, (report.original.flops or 0) / 1e9
    lines = {
        "Setting": f"{setting(report)}; {report.options.threads} threads, {report.options.device}",
        "Timed": f"{rows_of(report)} ({report.padding:.0%} padding), {report.options.repeats} calls after warm-up",
        "Compared": f"{report.n_test_rows} test rows, {prompt_of(report)} for all rows of the report",
        "Arithmetic": f"{flops:,.1f} GFLOP per candidate in the original's forward",
        "Ceiling": f"fp32 {digits(machine['fp32_rate'])} GFLOP/s by {machine['fp32_rate_by']}",
        "Rates, 10⁹/s": machine["rates"],
        "Rates not measured": machine["unavailable"],
        "Drift of the original's forward": report.drift.model_dump(),
        "Left out": "; ".join(report.notes),
    }
    return markdown_list(lines | report.facts())


# The plot -------------------------------------------------------------------------------------------------------


def draw_bench(report: BenchReport, file: Path) -> None:
    """Speed over the fastest baseline on the left, the score on the right, one line per row."""
    rows = report.rows
    title = f"{setting(report)}\n{rows_of(report)}; {processor(report)}"
    layout: dict[str, Any] = {"nrows": 1, "ncols": 2, "sharey": True, "width_ratios": (3, 2)}
    with figure(file, 10.5, 2.4 + 0.42 * len(rows), **layout) as (drawn, (left, right)):
        drawn.suptitle(title, fontsize=11)
        draw_speed(left, report)
        draw_scores(right, report)
        left.set_yticks(range(len(rows)), [row.label.replace(" without", "\nwithout") for row in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)  # the baselines on top
        for axes in (left, right):
            tidy(axes, "x")


def draw_speed(axes: Axes, report: BenchReport) -> None:
    most = max([1.0, *(row.speedup_over_fastest or 0.0 for row in report.rows)])
    for place, row in enumerate(report.rows):
        found, passed = row.speedup_over_fastest, row.status == "passed"
        if found is None:
            axes.text(0.015 * most, place, row.status, va="center", fontsize=9, style="italic", color="#444444")
            continue
        colour = GREY if row.baseline else BLUE if passed else ORANGE
        axes.barh(place, found, color=colour, height=0.66, hatch=None if passed else "///", edgecolor="white")
        note = f"{found:.2f}×  ({digits(row.ms_median)} ms)" + ("" if passed else f"  {row.status}")
        axes.text(found + 0.015 * most, place, note, va="center", fontsize=9, bbox=PAPER)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.42 * most)
    axes.set_xlabel(f"times as fast as the fastest baseline, {report.fastest_baseline} (ms per candidate)")
    axes.set_title(f"Speed on {processor(report)}", fontsize=11, loc="left")


def draw_scores(axes: Axes, report: BenchReport) -> None:
    name = METRICS[report.metric]
    for place, row in enumerate(report.rows):
        if row.score is not None:
            axes.plot(row.score, place, "o", color=BLUE, markersize=8, label=prompt_of(report))
        if row.tuned is not None:
            label = f"tuned on the row's engine, {len(row.tuned.seeds)} seeds (mean ± std)"
            style: dict[str, Any] = {"color": "black", "markerfacecolor": "none", "markersize": 8, "capsize": 3}
            axes.errorbar(row.tuned.mean, place, xerr=row.tuned.std or 0.0, fmt="D", label=label, **style)
    handles, labels = axes.get_legend_handles_labels()
    if shown := dict(zip(labels, handles, strict=True)):
        axes.figure.legend(shown.values(), shown.keys(), fontsize=9, loc="outside lower right", ncols=2, frameon=False)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(f"test {name}, {report.n_test_rows} rows")
    axes.set_title(name[0].upper() + name[1:], fontsize=11, loc="left")
