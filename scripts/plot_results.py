"""Draw docs/images/results.svg from recorded reports: `python scripts/plot_results.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from bbt_accel.benchmarks.compare_report import CompareReport, by_label, mean_of_tasks
from bbt_accel.io.report_page import themed
from bbt_accel.io.reporting import BLUE, GREEN, GREY, ORANGE, RED, figure, tidy

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "images" / "results.svg"
COLOURS = """<style>svg { --ink: #1b1f24; --paper: #ffffff; --grey: #767676;
  background: var(--paper) }
text { fill: var(--ink) }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6e9ed; --paper: #15181c; --grey: #9aa1a9 } }</style>"""


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name / "report.json").read_text(encoding="utf-8"))
    return found


def draw_speed(axes: Any) -> None:
    """Milliseconds per candidate of the baselines and of every engine and precision that passed."""
    rows = [row for row in read("roberta-base-baselines")["rows"] if row["status"] == "passed"]
    for place, row in enumerate(rows):
        axes.barh(place, row["ms_median"], color=GREY if row["baseline"] else BLUE, height=0.7)
        note = f"{row['ms_median']:,.0f} ms, {row['speedup_over_fastest']:.2f}×"
        axes.text(row["ms_median"] + 80, place, note, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['engine']} {row['precision']}" for row in rows])
    axes.set(
        ylim=(len(rows) - 0.5, -0.5),
        xlim=(0, 10_500),
        xlabel="ms per candidate, × fastest PyTorch (grey)",
    )
    axes.set_title("RoBERTa-base's shapes, two cores of an AMD EPYC", fontsize=11, loc="left")
    tidy(axes, "x")


def draw_accuracy(axes: Any) -> None:
    """Mean test score over forward passes of the train rows, on all tasks."""
    scores = CompareReport.model_validate(read("accuracy")).scores
    tasks = list(dict.fromkeys(score.task for score in scores))
    styles = {
        "without_prompt": (GREY, "s"),
        "batch_calibrated": (ORANGE, "D"),
        "bbt": (RED, "o"),
        "auto": (BLUE, "o"),
        "ensemble": (GREEN, "^"),
    }
    shown = {
        "batch_calibrated": "label bias removed",
        "ensemble": "readout fitted (ensemble)",
        "bbt": "BBT",
    }
    for contender, (colour, marker) in styles.items():
        points = []
        for own in by_label([score for score in scores if score.contender == contender]).values():
            mean = mean_of_tasks(own, tasks)
            assert mean is not None
            points.append((max(1, fmean(score.calls for score in own)), 100 * mean))
        line = {
            "marker": marker,
            "color": colour,
            "markersize": 7,
            "linewidth": 1.5 if len(points) > 1 else 0,
        }
        axes.plot(*zip(*points, strict=True), label=shown.get(contender, contender), **line)
    axes.set(
        xlabel="forward passes (0 is drawn at 1)",
        ylabel="test score, %",
        ylim=(0, 100),
        xscale="log",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Mean over seven tasks and five seeds", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    tidy(axes)


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with figure(PICTURE, 11, 4.4, nrows=1, ncols=2, width_ratios=(3, 2)) as (_, (left, right)):
        draw_speed(left)
        draw_accuracy(right)
    first, rest = themed(PICTURE.read_text(encoding="utf-8")).split(">", 1)
    PICTURE.write_text(f"{first}>{COLOURS}{rest}\n", encoding="utf-8")
