"""The progress bar of a sweep."""

from __future__ import annotations

from datetime import timedelta
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class SweepProgress:
    """Trials done, failed and running, and the time left, on a terminal's standard error; elsewhere silent."""

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
        disable = not (shown and console.is_terminal)
        self._bar = Progress(*columns, console=console, disable=disable, transient=True)
        self._task = self._bar.add_task("", total=total, completed=done)
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
        self._bar.update(
            self._task, completed=self._before + self._ended, description=" · ".join([*words, *self._running])
        )

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
