"""The run folder while it is being made: hidden beside its final name, which it takes when whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bbt_accel.curve import draw_curve
from bbt_accel.errors import RunError
from bbt_accel.history import read_history
from bbt_accel.run import CURVE, HISTORY, INFO, Best, Run, RunInfo, read_info, write_info, write_prompt
from bbt_accel.tuning.search import Outcome


class Workspace:
    """`.NAME.partial` beside the run NAME.

    It holds run.json and history.jsonl while the search goes on. A process that is killed leaves it there, and an
    interrupted run is copied back into it to go on, so that whatever happens NAME is a whole run or nothing.
    """

    def __init__(self, final: Path) -> None:
        self.final = final.absolute()
        self.folder = self.final.with_name(f".{self.final.name}.partial")

    def found(self) -> RunInfo | None:
        """run.json of what can be resumed, or is done; None when there is nothing. Raises RunError if unreadable."""
        self._tidy()
        # The hidden folder first: where both are there, it continues the other or is to replace it.
        for folder in (self.folder, self.final):
            if folder.exists():
                return read_info(folder)
        return None

    def require_free(self, overwrite: bool) -> None:
        """Raises RunError when the run exists, whole or not; with `overwrite` only when something else stands there."""
        self._tidy()
        if overwrite:
            if self.final.exists() and not (self.final / INFO).is_file():
                raise RunError(f"{self.final} is not a run, so --overwrite does not replace it; choose another -o")
            return
        if self.final.exists():
            raise RunError(f"{self.final} exists already; use --resume, --overwrite or another -o")
        if self.folder.exists():
            raise RunError(f"there is an unfinished run {self.final}; use --resume to continue it, or --overwrite")

    def open(self, info: RunInfo, resume: bool) -> None:
        """Have the folder ready, with what can be resumed in it or (not `resume`) empty but for run.json."""
        self._tidy()
        if not resume:
            self.discard()
        if not self.folder.exists():
            self._appear(info, source=self.final if resume and self.final.exists() else None)
        write_info(self.folder, info)

    def is_whole(self) -> bool:
        """Whether the run has its name, and nothing waits to replace it."""
        return self.final.exists() and not self.folder.exists()

    def finish(self, info: RunInfo, outcome: Outcome) -> Run:
        """Add the prompt, the picture and the final run.json, and give the folder its name."""
        generations, kept = read_history(self.folder / HISTORY), outcome.kept
        calls = generations[kept.generation].calls
        info = info.model_copy(
            update={
                "status": "interrupted" if outcome.interrupted else "done",
                "calls": generations[-1].calls,
                "best": Best(generation=kept.generation, calls=calls, dev_score=kept.dev_score, dev_loss=kept.dev_loss),
                "seconds": sum(g.seconds for g in generations),
                "prompt_shape": list(kept.prompt.shape),
                "prompt_sha256": write_prompt(self.folder, kept.prompt),
            }
        )
        title = f"{info.task.name} · {info.bundle.backbone} · {info.bundle.method} · {info.engine.name}"
        draw_curve(self.folder / CURVE, generations, kept.generation, kept.dev_score, info.task.metric, title)
        write_info(self.folder, info)
        self._swap()
        return Run.read(self.final)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _appear(self, info: RunInfo, source: Path | None = None) -> None:
        """Make the folder in one step, with the run.json and history.jsonl of `source` in it."""
        fresh = self._new
        try:
            fresh.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"cannot write to {self.final.parent} ({error.strerror}); choose another -o") from None
        if source is None:
            write_info(fresh, info)
            (fresh / HISTORY).touch()
        else:
            for name in (INFO, HISTORY):
                shutil.copy(source / name, fresh)
        os.rename(fresh, self.folder)

    @property
    def _new(self) -> Path:
        return self.final.with_name(f".{self.final.name}.new")

    @property
    def _old(self) -> Path:
        return self.final.with_name(f".{self.final.name}.old")

    def _swap(self) -> None:
        shutil.rmtree(self._old, ignore_errors=True)
        if self.final.exists():
            os.rename(self.final, self._old)
        os.rename(self.folder, self.final)
        shutil.rmtree(self._old, ignore_errors=True)

    def _tidy(self) -> None:
        """Clear up after a process that was killed while it renamed."""
        shutil.rmtree(self._new, ignore_errors=True)
        if self._old.exists() and not self.final.exists():
            os.rename(self._old, self.final)
        shutil.rmtree(self._old, ignore_errors=True)
