"""What a search shows: TensorBoard events, and the learning curve of the run, curve.png."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bbt_accel.engines.base import Closing
from bbt_accel.errors import MissingDependency
from bbt_accel.history import Generation
from bbt_accel.reporting import BLUE, GREY, METRICS, RED, figure, tidy

FIELDS = ("best_loss", "mean_loss", "metric", "step_size", "dev_score", "dev_loss", "evaluations_per_second")


class Events(Closing):
    """Writes scalars of each generation, over API calls. Raises MissingDependency without tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise MissingDependency(
                'tensorboard is not installed; pip install "bbt-accel[tensorboard]", or omit --tensorboard'
            ) from None
        for old in folder.glob("events.out.tfevents.*"):  # a resumed search writes all of its events again
            old.unlink()
        self._event, self._writer = Event, EventFileWriter(str(folder))

    def __call__(self, generation: Generation) -> None:
        event = self._event(wall_time=time.time(), step=generation.calls)
        for name in FIELDS:
            if (value := getattr(generation, name)) is not None:
                event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def draw_curve(
    file: Path, generations: Sequence[Generation], calls: int, best_score: float, metric: str, title: str
) -> None:
    """Write a PNG: train loss of each generation's best candidate, dev scores, and the best prompt, after `calls`."""
    name = METRICS.get(metric, metric)
    scored = [(g.calls, g.dev_score) for g in generations if g.dev_score is not None]
    with figure(file, 8, 5.5, nrows=2, sharex=True) as (drawn, (losses, scores)):
        drawn.suptitle(title, fontsize=12)
        losses.plot([g.calls for g in generations], [g.best_loss for g in generations], color=BLUE, linewidth=1.3)
        losses.set_ylabel("train loss")
        losses.set_title("Train loss of each generation's best candidate", fontsize=10, loc="left")
        scores.plot([c for c, _ in scored], [s for _, s in scored], ".-", color=RED, linewidth=1.1, markersize=4)
        scores.plot([calls], [best_score], "*", color=RED, markersize=15, markeredgecolor="black", zorder=5)
        scores.set(xlabel="API calls", ylabel=f"dev {name}")
        scores.xaxis.set_major_formatter("{x:,.0f}")
        scores.set_title(f"Dev {name}   (★ best prompt: {best_score:.3f} at {calls:,} calls)", fontsize=10, loc="left")
        for axes in (losses, scores):
            tidy(axes)
            axes.axvline(calls, color=GREY, linewidth=0.8, linestyle=":")
