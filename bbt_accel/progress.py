"""Progress bars on a terminal's standard error; elsewhere they are silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from bbt_accel.history import Generation

Tell = Callable[[str, int, int], None]
"""Called with the current step, the number of steps done, and their total."""
SEARCH = "{task.completed:.0f}/{task.total:.0f} calls · {task.fields[rate]} · loss {task.fields[loss]} · "
SEARCH += "dev {task.fields[dev]} · {task.fields[left]} left"


class StderrBar:
    """A progress bar while the block runs, on a terminal and if `shown`."""

    def __init__(self, shown: bool, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


@contextmanager
def progress_bar(message: str, shown: bool = True) -> Iterator[Tell]:
    """A bar with a message while the block runs, and the function that advances it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with StderrBar(shown, *columns) as it:
        task = it.bar.add_task(message, total=None)

        def tell(step: str, done: int, of: int) -> None:
            it.bar.update(task, description=f"{message}: {step}", completed=done, total=of)

        yield tell


def silent(step: str, done: int, of: int) -> None:
    """A `Tell` that shows nothing."""


class StepProgress(StderrBar):
    """Steps done, and the name of the current one."""

    def __init__(self, shown: bool = True) -> None:
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        super().__init__(shown, *columns)
        self._task = self.bar.add_task("", total=None)
        self._begun = 0

    def expect(self, total: int) -> None:
        """Set the number of steps."""
        self.bar.update(self._task, total=total)

    def __call__(self, step: str) -> None:
        """Begin a step; the one before it is done."""
        self.bar.update(self._task, completed=self._begun, description=step)
        self._begun += 1


class SearchProgress(StderrBar):
    """Calls, calls/s, train loss, best dev score and time left of a search."""

    def __init__(self, total_calls: int, shown: bool = True) -> None:
        super().__init__(shown, BarColumn(24), TextColumn(SEARCH))
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


class SweepProgress(StderrBar):
    """Trials done, failed and running, and the time left."""

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
