"""What a benchmark is doing, on a terminal."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from bbt_accel.display import StderrBar


class StepProgress(StderrBar):
    """A bar of steps with the name of the present one, on a terminal's standard error; elsewhere silent."""

    def __init__(self, shown: bool = True) -> None:
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        super().__init__(shown, *columns)
        self._task = self.bar.add_task("", total=None)
        self._begun = 0

    def expect(self, total: int) -> None:
        """How many steps there are going to be."""
        self.bar.update(self._task, total=total)

    def __call__(self, step: str) -> None:
        """A step begins, and the one before it is done."""
        self.bar.update(self._task, completed=self._begun, description=step)
        self._begun += 1
