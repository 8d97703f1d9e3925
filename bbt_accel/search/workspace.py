"""The run folder while it is being made: hidden beside its final name, which it takes when
complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from bbt_accel.errors import RunError
from bbt_accel.io.files import remove_leftovers, rename_new, reserved, write_atomically
from bbt_accel.search.history import AGAIN, History, read_history, resumable
from bbt_accel.search.learning_curve import draw_curve
from bbt_accel.search.loop import SearchOutcome
from bbt_accel.search.model_card import model_card
from bbt_accel.search.readout import Readout
from bbt_accel.search.run import (
    CARD,
    CURVE,
    HISTORY,
    INFO,
    PROMPT,
    READOUT,
    TASK,
    BestRecord,
    ReadoutRecord,
    Run,
    RunInfo,
    read_info,
    write_info,
    write_prompt,
)
from bbt_accel.tasks.task import to_toml

WRITTEN = frozenset({INFO, PROMPT, READOUT, CURVE, TASK, CARD})
"""Files that the end of a search writes."""


class Workspace:
    """`.NAME.partial` beside the run NAME.

    It holds run.json and history.jsonl during the search. A killed process leaves it behind, and an
    interrupted run is copied back into it to continue, so that NAME is always a complete run or
    absent.

    A context manager, which keeps the name for this process from before anything is looked at or
    discarded until the run is complete. Raises BbtError where another process has it.
    """

    def __init__(self, final: Path) -> None:
        self.final = final.absolute()
        self._reserved = reserved(self.final)

    def __enter__(self) -> Self:
        self._reserved.__enter__()
        self.folder, self._new, self._old = (
            hidden(self.final, end) for end in ("partial", "new", "old")
        )
        self._recover()
        self._replaced = (self.final / INFO).is_file()
        return self

    def __exit__(self, *error: object) -> None:
        self._reserved.__exit__(None, None, None)

    def require_free(self, overwrite: bool) -> None:
        """Raises RunError when the run exists, complete or not; with `overwrite`, only when NAME is
        not a run.
        """
        if overwrite and os.path.lexists(self.final) and not self._replaced:
            raise RunError(
                f"{self.final} is not a run, so --overwrite does not replace it; choose another -o"
            )
        if not overwrite and os.path.lexists(self.final):
            raise RunError(f"{self.final} exists already; use --resume, --overwrite or another -o")
        if not overwrite and self.folder.exists():
            raise RunError(
                f"{self.final} is an unfinished run; use --resume to continue it, or --overwrite"
            )

    def keeps_former(self, info: RunInfo, history: History) -> bool:
        """Whether there is a run that a search which ended early must not replace, because it does
        not continue it.
        """
        if not self._replaced:
            return False
        try:
            former = read_info(self.final)
        except RunError:  # of an older version
            return True
        calls = history.generations[-1].calls if len(history) else 0
        return bool(former.differences(info)) or calls < former.calls

    @contextmanager
    def open(self, info: RunInfo, resume: bool) -> Iterator[History]:
        """The history in the hidden folder: that of the run to resume, else an empty one.

        The folder is removed if the block fails before the first generation. RunError where it
        cannot be written.
        """
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        with resumable(self.folder):
            if not self.folder.exists():
                self._create(info, self.final if resume and self.final.exists() else None)
            history = History(self.folder / HISTORY)
        with history:
            complete = False
            try:
                with resumable(self.folder):
                    remove_leftovers(self.folder)
                self.update(info)
                yield history
                complete = True
            finally:
                if not len(history) and not complete:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def update(self, info: RunInfo) -> None:
        """Replace run.json of the search."""
        with resumable(self.folder):
            write_info(self.folder, info)

    def finish(
        self,
        info: RunInfo,
        outcome: SearchOutcome,
        readout: Readout,
        record: ReadoutRecord,
        report: Callable[[str], object] = lambda _: None,
    ) -> Run:
        """Add prompt, readout, curve and the final run.json, and give the folder its name,
        replacing a former run.

        report: called with a line if the curve cannot be written. Raises RunError for whatever else
        cannot; the search can then be resumed.
        """
        with resumable(self.folder):
            self._complete(info, outcome, readout, record, report)
            if self._replaced:
                os.rename(self.final, self._old)
            try:
                rename_new(self.folder, self.final)
            except FileExistsError:
                problem = f"{self.final} appeared during the search, which is in {self.folder}"
                raise RunError(f"{problem}; remove or rename {self.final}, then {AGAIN}") from None
        discard(self._old)
        return Run.read(self.final)

    def _complete(
        self,
        info: RunInfo,
        outcome: SearchOutcome,
        readout: Readout,
        record: ReadoutRecord,
        report: Callable[[str], object],
    ) -> None:
        generations, best = read_history(self.folder / HISTORY), outcome.best
        first = info.settings.calls(0)  # the call that fits the readout without a search
        calls = first if best.generation is None else generations[best.generation].calls
        info = info.model_copy()
        info.status = "interrupted" if outcome.interrupted else "done"
        info.calls = generations[-1].calls if generations else first
        info.seconds = max(
            info.seconds, sum(g.seconds for g in generations)
        )  # those before a resume too
        info.best = BestRecord(
            generation=best.generation,
            calls=calls,
            dev_score=best.dev_score,
            dev_loss=best.dev_loss,
        )
        info.prompt_shape, info.prompt_sha256 = (
            list(best.prompt.shape),
            write_prompt(self.folder, best.prompt),
        )
        info.readout = record.model_copy(update={"sha256": readout.save(self.folder / READOUT)})
        write_atomically(self.folder / TASK, to_toml(info.task).encode())
        write_atomically(self.folder / CARD, model_card(info).encode())
        try:
            if any(g.dev_score is not None for g in generations):
                draw_curve(self.folder / CURVE, generations, info)
        except OSError as error:  # a full disk: the run is worth more than its plot
            (self.folder / CURVE).unlink(missing_ok=True)
            report(
                f"{self.final} has no {CURVE}, which could not be written "
                f"({error.strerror or error})"
            )
        write_info(self.folder, info)

    def _create(self, info: RunInfo, source: Path | None) -> None:
        """Make the folder atomically, with run.json and the history of `source`, if any, and what
        others put there.
        """
        if source is None:
            self._new.mkdir()
        else:  # links as such: what somebody else's run has may lead anywhere
            own = WRITTEN | {HISTORY}
            shutil.copytree(
                source, self._new, True, lambda folder, _: own if Path(folder) == source else ()
            )
            shutil.copy(source / HISTORY, self._new)
        write_info(self._new, info)
        os.rename(self._new, self.folder)

    def _recover(self) -> None:
        """Clean up after a process that was killed while it renamed."""
        shutil.rmtree(self._new, ignore_errors=True)
        if self._old.exists() and not self.final.exists():
            os.rename(self._old, self.final)
        discard(self._old)


def hidden(final: Path, end: str = "partial") -> Path:
    """A folder beside a run; the run itself while it is being made."""
    final = final.absolute()  # `.` has no name
    return final.with_name(f".{final.name}.{end}")


def find_info(final: Path) -> RunInfo | None:
    """run.json of the run to resume, or of the complete one; None if there is neither. RunError if
    unreadable.
    """
    # The hidden folder first: where both exist, it continues or is to replace the other.
    return next((read_info(folder) for folder in (hidden(final), final) if folder.exists()), None)


def discard(folder: Path) -> None:
    """Remove a folder if it is there; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
