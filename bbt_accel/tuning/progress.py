"""The progress bar of a search."""

from __future__ import annotations

from datetime import timedelta

from rich.progress import BarColumn, TextColumn

from bbt_accel.display import StderrBar
from bbt_accel.history import Generation

TEXT = "{task.completed:.0f}/{task.total:.0f} calls · {task.fields[rate]} · loss {task.fields[loss]} · "
TEXT += "dev {task.fields[dev]} · {task.fields[left]} left"


class SearchProgress(StderrBar):
    """Calls, rate, train loss, best dev score and time left, on a terminal's standard error; elsewhere silent."""

    def __init__(self, total_calls: int, shown: bool = True) -> None:
        super().__init__(shown, BarColumn(24), TextColumn(TEXT))
        self._task = self.bar.add_task("", total=total_calls, rate="-", loss="-", dev="-", left="-")
        self._total = total_calls
        self._dev: float | None = None

    def __call__(self, generation: Generation) -> None:
        g = generation
        if g.dev_score is not None:
            self._dev = max(g.dev_score, self._dev or 0.0)
        seconds_left = (self._total - g.calls) * g.seconds / len(g.losses)
        self.bar.update(
            self._task,
            completed=g.calls,
            rate=f"{g.evaluations_per_second:.1f}/s",
            loss=f"{g.best_loss:.3f}",
            dev="-" if self._dev is None else f"{self._dev:.3f}",
            left=str(timedelta(seconds=round(seconds_left))),
        )
