"""The run folder while it is being made: hidden beside its final name, which it takes when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bbt_accel.errors import RunError
from bbt_accel.history import History, read_history
from bbt_accel.readout import Readout
from bbt_accel.run import (
    CURVE,
    HISTORY,
    INFO,
    READOUT,
    BestRecord,
    ReadoutRecord,
    Run,
    RunInfo,
    read_info,
    write_info,
    write_prompt,
)
from bbt_accel.tuning.monitoring import draw_curve
from bbt_accel.tuning.search import Outcome


class Workspace:
    """`.NAME.partial` beside the run NAME.

    It holds run.json and history.jsonl during the search. A killed process leaves it behind, and an interrupted run is
    copied back into it to continue, so that NAME is always a complete run or absent.
    """

    def __init__(self, final: Path) -> None:
        self.final = final.absolute()
        hidden = (self.final.with_name(f".{self.final.name}.{end}") for end in ("partial", "new", "old"))
        self.folder, self._new, self._old = hidden

    def find(self) -> RunInfo | None:
        """run.json of the run to resume, or of the complete one; None if there is neither. RunError if unreadable."""
        self._recover()
        # The hidden folder first: where both exist, it continues or is to replace the other.
        return next((read_info(folder) for folder in (self.folder, self.final) if folder.exists()), None)

    def require_free(self, overwrite: bool) -> None:
        """Raises RunError when the run exists, complete or not; with `overwrite`, only when NAME is not a run."""
        self._recover()
        if overwrite and self.final.exists() and not (self.final / INFO).is_file():
            raise RunError(f"{self.final} is not a run, so --overwrite does not replace it; choose another -o")
        if not overwrite and self.final.exists():
            raise RunError(f"{self.final} exists already; use --resume, --overwrite or another -o")
        if not overwrite and self.folder.exists():
            raise RunError(f"{self.final} is an unfinished run; use --resume to continue it, or --overwrite")

    @contextmanager
    def open(self, info: RunInfo, resume: bool) -> Iterator[History]:
        """The history in the hidden folder: that of the run to resume, else an empty one.

        The folder is removed if the block fails before the first generation. An OSError in it becomes a RunError.
        """
        self._recover()
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():
            self._create(info, self.final if resume and self.final.exists() else None)
        with History(self.folder / HISTORY) as history:
            complete = False
            try:
                for leftover in self.folder.glob(".*"):  # of a process that was killed while it wrote a file
                    leftover.unlink()
                write_info(self.folder, info)
                yield history
                complete = True
            except OSError as error:
                problem = f"cannot write {self.folder} ({error.strerror})"
                raise RunError(f"{problem}; free some space, then --resume") from error
            finally:
                if not len(history) and not complete:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, info: RunInfo, outcome: Outcome, readout: Readout, record: ReadoutRecord) -> Run:
        """Add prompt, readout, curve and the final run.json, and give the folder its name, in place of a former run."""
        generations, best = read_history(self.folder / HISTORY), outcome.best
        first = int(info.settings.fitted)  # the call that fits the readout without a search
        calls = first if best.generation is None else generations[best.generation].calls
        info = info.model_copy()
        info.status = "interrupted" if outcome.interrupted else "done"
        info.calls = generations[-1].calls if generations else first
        info.seconds = sum(g.seconds for g in generations)
        info.best = BestRecord(
            generation=best.generation, calls=calls, dev_score=best.dev_score, dev_loss=best.dev_loss
        )
        info.prompt_shape, info.prompt_sha256 = list(best.prompt.shape), write_prompt(self.folder, best.prompt)
        info.readout = record.model_copy(update={"sha256": readout.save(self.folder / READOUT)})
        title = f"{info.task.name} · {info.bundle.backbone} · {info.bundle.method} · {info.engine.name}"
        if generations:
            draw_curve(self.folder / CURVE, generations, calls, best.dev_score, info.task.metric, title)
        write_info(self.folder, info)
        if self.final.exists():
            os.rename(self.final, self._old)
        os.rename(self.folder, self.final)
        shutil.rmtree(self._old, ignore_errors=True)
        return Run.read(self.final)

    def _create(self, info: RunInfo, source: Path | None) -> None:
        """Make the folder atomically, with run.json and the history of `source`, if any."""
        try:
            self._new.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"cannot write to {self.final.parent} ({error.strerror}); choose another -o") from None
        write_info(self._new, info)
        if source is not None:
            shutil.copy(source / HISTORY, self._new)
        os.rename(self._new, self.folder)

    def _recover(self) -> None:
        """Clean up after a process that was killed while it renamed."""
        shutil.rmtree(self._new, ignore_errors=True)
        if self._old.exists() and not self.final.exists():
            os.rename(self._old, self.final)
        shutil.rmtree(self._old, ignore_errors=True)
