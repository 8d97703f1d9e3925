"""The generations of a search so far, one line each: its log, and its checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Self

import numpy as np
from pydantic import BaseModel, Field

from bbt_accel.batch import Float64
from bbt_accel.errors import RunError


class Generation(BaseModel, extra="forbid", frozen=True):
    """One line of history.jsonl."""

    generation: int = Field(description="Counted from 0.")
    calls: int = Field(description="API calls up to and including this generation.")
    layer: int = Field(description="The layer that was searched; 0 in BBT.")
    candidates: str = Field(description="`fingerprint` of the candidates, which a resumed search must ask for again.")
    losses: list[float] = Field(description="Train loss of every candidate, in full precision.")
    best_loss: float
    mean_loss: float
    metric: float = Field(description="Train metric of the best candidate.")
    step_size: float
    dev_score: float | None = Field(default=None, description="Metric of the generation's prompt on the dev rows.")
    dev_loss: float | None = Field(default=None, description="Its loss there; None if it was not scored.")
    seconds: float = Field(description="Duration of the generation, dev score included.")
    evaluations_per_second: float = Field(description="Candidates per second, without CMA-ES and the dev score.")


class History:
    """Generations, in memory and in a file to which each is appended as soon as it ends. A context manager.

    A search follows from its seed and its losses, so these lines are all that a resumed run needs. A line that a crash
    left incomplete is dropped, and its generation repeated. Raises RunError if another process has the file open.
    """

    def __init__(self, file: Path) -> None:
        self._stream: IO[bytes] = file.open("ab")
        try:
            import fcntl

            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no flock
        except BlockingIOError:
            self._stream.close()
            problem = f"{file.parent} is in use by another bbt-accel tune"
            raise RunError(f"{problem}; wait for it or choose another -o") from None
        self.generations = read_history(file)
        self._stream.truncate(file.read_bytes().rfind(b"\n") + 1)

    def append(self, generation: Generation) -> None:
        self._stream.write(json.dumps(generation.model_dump()).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.generations.append(generation)

    def __len__(self) -> int:
        return len(self.generations)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def fingerprint(candidates: Float64) -> str:
    """Digest of float64 candidates, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()[:16]


def read_history(file: Path) -> list[Generation]:
    """The complete lines of history.jsonl. Raises RunError for one that is not a generation, or out of order."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {file} ({error.strerror})") from None
    generations: list[Generation] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines()):
        try:
            generation = Generation.model_validate(json.loads(line))
        except ValueError:  # pydantic's error is one
            raise RunError(f"{file} is damaged in line {number + 1}; tune again with --overwrite") from None
        if generation.generation != number:
            raise RunError(f"{file} is damaged: line {number + 1} is generation {generation.generation}; tune again")
        generations.append(generation)
    return generations
