"""What a search has done so far, one line a generation. It is also the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from bbt_accel.errors import RunError
from bbt_accel.objective import Float64


class Generation(BaseModel):
    """One line of history.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    generation: int
    """Counted from 0."""
    calls: int
    """API calls up to and with this generation."""
    layer: int
    """The layer that was searched; 0 in BBT."""
    candidates: str
    """Digest of the candidates' coordinates, by which a resumed search knows that it walks the same way."""
    losses: list[float]
    """Train loss of every candidate, exact."""
    best_loss: float
    mean_loss: float
    metric: float
    """Train metric of the best candidate."""
    step_size: float
    dev_score: float | None = None
    dev_loss: float | None = None
    """Of the generation's prompt, where it was scored on the dev set."""
    seconds: float
    evaluations_per_second: float


class History:
    """Generations, in memory and in a file to which each is appended as soon as it is known.

    A search follows from its seed and its losses, so these lines are all that a resumed run needs: a line that was
    cut off by a crash is dropped, and its generation is done again. Only one process may have the file open.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream: IO[bytes] = file.open("ab")
        _lock(self._stream, file)
        self.generations, whole = _parse(file)
        self._stream.truncate(whole)

    def append(self, generation: Generation) -> None:
        self._stream.write(json.dumps(generation.model_dump()).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.generations.append(generation)

    def close(self) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self.generations)

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_history(file: Path) -> list[Generation]:
    """The whole lines of history.jsonl. Raises RunError when one is no generation, or out of order."""
    return _parse(file)[0]


def fingerprint(candidates: Float64) -> str:
    """Digest of float64 candidates, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()[:16]


def _parse(file: Path) -> tuple[list[Generation], int]:
    """The generations, and the bytes that their lines take."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {file} ({error.strerror})") from None
    whole = content.rfind(b"\n") + 1
    generations = []
    for number, line in enumerate(content[:whole].splitlines()):
        try:
            generation = Generation.model_validate(json.loads(line))
        except (ValueError, ValidationError):
            raise RunError(f"{file} is damaged in line {number + 1}; tune again with --overwrite") from None
        if generation.generation != number:
            raise RunError(f"{file} is damaged: line {number + 1} is generation {generation.generation}; tune again")
        generations.append(generation)
    return generations, whole


def _lock(stream: IO[bytes], file: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, which has no flock
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise RunError(f"{file.parent} is in use by another bbt-accel tune; wait for it or choose another -o") from None
