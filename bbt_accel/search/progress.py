"""The progress bar of a search."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from rich.progress import BarColumn

from bbt_accel.io.progress import StderrBar
from bbt_accel.search.history import Generation

SEARCH = (
    "{task.completed:.0f}/{task.total:.0f} calls · {task.fields[rate]} · loss "
    "{task.fields[loss]} · "
)
SEARCH += "dev {task.fields[dev]} · {task.fields[left]} left"


class SearchProgress(StderrBar):
    """Calls, calls/s, train loss, best dev score and time left of a search."""

    def __init__(self, total_calls: int, shown: bool = True) -> None:
        super().__init__(shown, BarColumn(24), SEARCH)
        self._task = self.add_task("", total=total_calls, rate="-", loss="-", dev="-", left="-")
        self._total = total_calls
        self._dev = 0.0

    def __call__(self, g: Generation) -> None:
        fields: dict[str, Any] = {
            "rate": f"{g.calls_per_second:.1f}/s",
            "loss": f"{g.best_loss:.3f}",
        }
        if g.dev_score is not None:
            self._dev = max(g.dev_score, self._dev)
            fields["dev"] = f"{self._dev:.3f}"
        seconds_left = (self._total - g.calls) * g.seconds / len(g.losses)
        self.update(
            self._task,
            completed=g.calls,
            left=str(timedelta(seconds=round(seconds_left))),
            **fields,
        )
