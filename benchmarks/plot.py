"""The picture of a report: speed-up on the left, the score on the right, one line a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bbt_accel.benchmarks.markdown import METRICS, digits
from bbt_accel.benchmarks.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EAGER, PASSED, DIFFERS, TUNED = "#7f7f7f", "#0072b2", "#e69f00", "#000000"
"""Of Okabe and Ito's palette, which people with any colour vision can tell apart; `differs` is hatched too."""


PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
"""Keeps lines from running through a text."""


def draw_report(file: Path, report: Report) -> None:
    """Write a PNG."""
    # Not pyplot: it would pick a window system, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 2.4 + 0.42 * len(report.rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    work, name = report.workload, Path(report.backbone).name
    title = (
        f"{name} on {report.task}: {report.method}, {report.prompt_mode} mode, {report.n_prompt_tokens} prompt tokens"
    )
    gpus, cpu = "; ".join(report.machine.gpus), f"{report.machine.cpu}, {work.threads} threads"
    where = f"{work.rows} rows × {work.length} tokens, {work.popsize} candidates a call; "
    figure.suptitle(f"{title}\n{where}{cpu if work.device == 'cpu' else gpus}", fontsize=11)
    draw_speed(left, report.rows)
    draw_scores(right, report)
    left.set_yticks(range(len(report.rows)), [row.label.replace(" without", "\nwithout") for row in report.rows])
    left.set_ylim(len(report.rows) - 0.4, -0.6)  # the baseline on top
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(file, metadata={"Software": None})


def draw_speed(axes: Axes, rows: list[Row]) -> None:
    most = max((row.speedup or 0.0 for row in rows), default=1.0)
    for place, row in enumerate(rows):
        if row.speedup is None:
            axes.text(1 + 0.015 * most, place, row.status, va="center", fontsize=9, style="italic", color="#444444")
            continue
        colour = EAGER if row.engine == "eager" else PASSED if row.status == "passed" else DIFFERS
        hatch = None if row.status == "passed" else "///"
        axes.barh(place, row.speedup, color=colour, height=0.66, hatch=hatch, edgecolor="white")
        note = f"{row.speedup:.2f}×  ({digits(row.ms_median or 0.0)} ms)" + (
            "" if row.status == "passed" else f"  {row.status}"
        )
        axes.text(row.speedup + 0.015 * most, place, note, va="center", fontsize=9, bbox=PAPER)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.42 * max(most, 1.0))
    axes.set_xlabel("times as fast as eager PyTorch (in brackets: milliseconds a candidate)")
    axes.set_title("Speed", fontsize=11, loc="left")


def draw_scores(axes: Axes, report: Report) -> None:
    name = METRICS[report.metric]
    for place, row in enumerate(report.rows):
        if row.score is not None:
            axes.plot(row.score, place, "o", color=PASSED, markersize=8, label=f"one {report.workload.prompt} prompt")
        if row.tuned is not None:
            axes.errorbar(
                row.tuned.mean,
                place,
                xerr=row.tuned.std or 0.0,
                fmt="D",
                color=TUNED,
                markerfacecolor="none",
                markersize=8,
                capsize=3,
                label=f"tuned on the row's engine, {len(row.tuned.seeds)} seeds (mean ± std)",
            )
    handles, labels = axes.get_legend_handles_labels()
    if shown := dict(zip(labels, handles, strict=True)):
        axes.figure.legend(shown.values(), shown.keys(), fontsize=9, loc="outside lower right", ncols=2, frameon=False)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(f"test {name}, {report.workload.test_rows} rows")
    axes.set_title(name[0].upper() + name[1:], fontsize=11, loc="left")
