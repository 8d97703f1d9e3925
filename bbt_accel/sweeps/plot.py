"""The picture of a sweep: the scores of every seed, their mean and deviation, a group a task."""

from __future__ import annotations

from pathlib import Path

from bbt_accel.benchmarks.markdown import METRICS
from bbt_accel.sweeps.markdown import label
from bbt_accel.sweeps.report import Report

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito's palette, which people with any colour vision can tell apart; the marks differ too."""
MARKS = "oDs^vPX"


def draw_sweep(file: Path, report: Report) -> None:
    """Write a PNG."""
    # Not pyplot: it would pick a window system, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = report.rows[0].cells
    figure = Figure(figsize=(2.5 + max(3.5, 1.3 * len(cells)), 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    step = 0.7 / len(report.rows)
    for number, row in enumerate(report.rows):
        colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
        named = label(row)
        for task, cell in enumerate(row.cells):
            x = task + (number - (len(report.rows) - 1) / 2) * step
            if cell.without_prompt is not None:
                axes.plot([x - 0.4 * step, x + 0.4 * step], [100 * cell.without_prompt] * 2, color="grey", linewidth=2)
            axes.plot([x + 0.2 * step] * len(cell.scores), [100 * s for s in cell.scores], ".", color=colour, alpha=0.5)
            if cell.mean is not None:
                error = 100 * cell.std if cell.std is not None else None
                axes.errorbar(
                    x, 100 * cell.mean, yerr=error, fmt=mark, color=colour, markersize=7, capsize=3, label=named
                )
                named = "_"  # one entry a row in the legend
    axes.plot([], [], color="grey", linewidth=2, label="no prompt")
    names = [cell.task if cell.metric == "accuracy" else f"{cell.task}\n({METRICS[cell.metric]})" for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.set_ylabel("test score, percent")
    seeds = len(report.sweep.seeds)
    spread = f"{seeds} seeds (dots), mean ± standard deviation" if seeds > 1 else "one seed"
    axes.set_title(f"Test scores: {spread}", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(fontsize=9, loc="outside lower left", ncols=2, frameon=False)
    figure.savefig(file, metadata={"Software": None})
