"""The picture of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbt_accel.history import Generation

LOSS, SCORE = "#4878a8", "#c8553d"
NAMES = {"accuracy": "accuracy", "f1": "F1"}


def draw_curve(
    file: Path, generations: Sequence[Generation], kept: int, kept_score: float, metric: str, title: str
) -> None:
    """Write a PNG: train loss of each generation's best candidate, dev score, and the prompt that was kept.

    kept: the generation whose prompt was kept, with the dev score kept_score.
    """
    # Not pyplot: it would pick a window system, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=12)

    above.plot([g.calls for g in generations], [g.best_loss for g in generations], color=LOSS, linewidth=1.3)
    above.set_ylabel("train loss")
    above.set_title("Train loss of the best candidate of each generation", fontsize=10, loc="left")

    name, calls = NAMES.get(metric, metric), generations[kept].calls
    scored = [(g.calls, g.dev_score) for g in generations if g.dev_score is not None]
    below.plot([c for c, _ in scored], [s for _, s in scored], ".-", color=SCORE, linewidth=1.1, markersize=4)
    below.plot([calls], [kept_score], "*", color=SCORE, markersize=15, markeredgecolor="black", zorder=5)
    below.set_ylabel(f"dev {name}")
    below.set_xlabel("API calls")
    below.xaxis.set_major_formatter("{x:,.0f}")
    found = f"★ the prompt that was kept: {kept_score:.3f} at {calls:,} calls"
    below.set_title(f"Dev {name}   ({found})", fontsize=10, loc="left")

    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(calls, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(file, metadata={"Software": None})
