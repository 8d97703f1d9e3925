"""Messages on standard error, and progress bars where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Tell = Callable[
    [str, int, int], None
]  # called with the current step, the number of steps done, and their total


def note(line: str) -> None:
    """A line on standard error, about what went another way than was asked for. Logging is off on
    the command line.
    """
    print(line, file=sys.stderr)


class StderrBar(Progress):
    """A progress bar while the block runs, on a terminal and if `shown`."""

    def __init__(self, shown: bool, *columns: str | ProgressColumn) -> None:
        console = Console(stderr=True)
        super().__init__(
            *columns, console=console, disable=not (shown and console.is_terminal), transient=True
        )


def description() -> TextColumn:
    """What a bar is about, which may be a path: no brackets in it are markup."""
    return TextColumn("{task.description}", markup=False)


@contextmanager
def progress_bar(message: str, shown: bool = True) -> Iterator[Tell]:
    """A bar with a message while the block runs, and the function that advances it."""
    with StderrBar(shown, SpinnerColumn(), description(), BarColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(message, total=None)
        yield lambda step, done, of: bar.update(
            task, description=f"{message}: {step}", completed=done, total=of
        )


def silent(step: str, done: int, of: int) -> None:
    """A `Tell` that shows nothing."""


class StepProgress(StderrBar):
    """Steps done, and the name of the current one."""

    def __init__(self, shown: bool = True) -> None:
        super().__init__(
            shown, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), description()
        )
        self._task = self.add_task("", total=None)
        self._begun = 0

    def expect(self, total: int) -> None:
        """Set the number of steps."""
        self.update(self._task, total=total)

    def __call__(self, step: str) -> None:
        """Begin a step; the one before it is done."""
        self.update(self._task, completed=self._begun, description=step)
        self._begun += 1


class JobProgress(StderrBar):
    """Trials done, failed and running, and the time left."""

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        super().__init__(
            shown, BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), description()
        )
        self._task = self.add_task("", total=total, completed=done)
        self._failed = 0
        self._running: list[str] = []

    def begin(self, name: str) -> None:
        self._running.append(name)
        self._show()

    def end(self, name: str, failed: bool) -> None:
        self._running.remove(name)
        self._failed += failed
        self.advance(self._task)
        self._show()

    def _show(self) -> None:
        failed = [f"{self._failed} failed"] if self._failed else []
        self.update(self._task, description=" · ".join([*failed, *self._running]))
