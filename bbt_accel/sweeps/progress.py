"""The progress bar of a sweep."""

from __future__ import annotations

from datetime import timedelta
from time import perf_counter

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from bbt_accel.display import StderrBar


class SweepProgress(StderrBar):
    """Trials done, failed and running, and the time left, on a terminal's standard error; elsewhere silent."""

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
        super().__init__(shown, *columns)
        self._task = self.bar.add_task("", total=total, completed=done)
        self._before, self._left, self._ended, self._failed = done, total - done, 0, 0
        self._running: list[str] = []
        self._began = perf_counter()

    def start(self, name: str) -> None:
        self._running.append(name)
        self._show()

    def end(self, name: str, failed: bool) -> None:
        self._running.remove(name)
        self._ended += 1
        self._failed += failed
        self._show()

    def _show(self) -> None:
        seconds = (perf_counter() - self._began) / self._ended * (self._left - self._ended) if self._ended else None
        words = [f"{self._failed} failed"] if self._failed else []
        words += [f"{timedelta(seconds=round(seconds))} left"] if seconds is not None else []
        self.bar.update(
            self._task, completed=self._before + self._ended, description=" · ".join([*words, *self._running])
        )
