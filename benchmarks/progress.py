"""What a benchmark is doing, on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class StepProgress:
    """A bar of steps with the name of the present one, on a terminal's standard error; elsewhere silent."""

    def __init__(self, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        disable = not (shown and console.is_terminal)
        self._bar = Progress(*columns, console=console, disable=disable, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._begun = 0

    def expect(self, total: int) -> None:
        """How many steps there are going to be."""
        self._bar.update(self._task, total=total)

    def __call__(self, step: str) -> None:
        """A step begins, and the one before it is done."""
        self._bar.update(self._task, completed=self._begun, description=step)
        self._begun += 1

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
