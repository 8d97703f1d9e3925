"""The learning curve of a run, curve.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bbt_accel.core.backbone_names import backbone_name
from bbt_accel.core.objective import wilson
from bbt_accel.io.reporting import BLUE, GREEN, GREY, METRICS, ORANGE, RED, figure, tidy
from bbt_accel.search.history import Generation
from bbt_accel.search.run import RunInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES = {"chance": GREY, "without_prompt": ORANGE, "batch_calibrated": GREEN}


def draw_curve(file: Path, generations: Sequence[Generation], info: RunInfo) -> None:
    """Write a PNG: the train loss of each generation's best candidate, and the dev scores beside
    the baselines.
    """
    backbone = backbone_name(info.bundle.backbone)  # a pushed run shows no path
    title = f"{info.task.name} · {backbone} · {info.bundle.method} · {info.engine.name}"
    with figure(file, 8, 6, nrows=2, sharex=True) as (drawn, (losses, scores)):
        drawn.suptitle(title, fontsize=12)
        losses.plot(
            [g.calls for g in generations],
            [g.best_loss for g in generations],
            color=BLUE,
            linewidth=1.3,
        )
        losses.set_ylabel("train loss")
        losses.set_title("Train loss of each generation's best candidate", fontsize=10, loc="left")
        draw_scores(scores, generations, info)
        for axes in (losses, scores):
            tidy(axes)
            if info.best is not None:
                axes.axvline(info.best.calls, color=GREY, linewidth=0.8, linestyle=":")


def draw_scores(axes: Axes, generations: Sequence[Generation], info: RunInfo) -> None:
    """Dev scores from 0 to 1, where accuracy with its 95 % interval, the best prompt, and what
    takes no search.
    """
    name = METRICS[info.task.metric]
    calls, found = zip(
        *((g.calls, g.dev_score) for g in generations if g.dev_score is not None), strict=True
    )
    if info.task.metric == "accuracy":
        low, high = wilson(np.array(found), info.data.dev_rows)
        label = f"95 % interval, {info.data.dev_rows} rows"
        axes.fill_between(calls, low, high, color=RED, alpha=0.15, linewidth=0, label=label)
        axes.vlines(calls, low, high, color=RED, alpha=0.3, linewidth=1.5)
    axes.plot(calls, found, ".-", color=RED, linewidth=1.1, markersize=4, label=f"dev {name}")
    for key, color in BASELINES.items() if info.baselines is not None else ():
        value = getattr(info.baselines, key)
        axes.axhline(
            value,
            color=color,
            linewidth=1.1,
            linestyle="--",
            label=f"{key.replace('_', ' ')} {value:.3f}",
        )
    if info.best is not None:
        score, after = info.best.dev_score, info.best.calls
        axes.plot(
            [after], [score], "*", color=RED, markersize=15, markeredgecolor="black", zorder=5
        )
        axes.set_title(
            f"Dev {name}   (★ best prompt: {score:.3f} at {after:,} calls)", fontsize=10, loc="left"
        )
    axes.set(xlabel="calls", ylabel=f"dev {name}", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.22),
        ncols=5,
        frameon=False,
        columnspacing=1,
    )
