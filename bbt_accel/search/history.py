"""The generations of a search so far, one line each: its log, and its checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat

from bbt_accel.core.batch import Float64
from bbt_accel.core.settings import Settings
from bbt_accel.errors import RunError
from bbt_accel.io.files import write_atomically


class Generation(BaseModel, extra="forbid", frozen=True):
    """One line of history.jsonl."""

    generation: int = Field(description="Counted from 0.")
    calls: int = Field(description="Calls up to and including this generation.")
    layer: int = Field(description="The layer that was searched; 0 in BBT.")
    candidates: str = Field(
        description="`fingerprint` of the candidates, which a resumed search must ask for again."
    )
    losses: list[FiniteFloat] = Field(
        description="Train loss of every candidate, in full precision."
    )
    best_loss: FiniteFloat = Field(description="The lowest of them.")
    mean_loss: FiniteFloat = Field(description="Their mean.")
    metric: FiniteFloat = Field(description="Train metric of the best candidate.")
    step_size: FiniteFloat = Field(description="σ of CMA-ES, from which the candidates were drawn.")
    dev_score: FiniteFloat | None = Field(
        default=None, description="Metric of its prompt on the dev rows."
    )
    dev_loss: FiniteFloat | None = Field(
        default=None, description="Its loss there; None if it was not scored."
    )
    seconds: FiniteFloat = Field(
        ge=0, lt=1e9, description="Duration of the generation, dev score included."
    )
    calls_per_second: FiniteFloat = Field(
        description="Candidates per second, without CMA-ES and the dev score."
    )


AGAIN = "--resume (fit: the same command, without --overwrite)"
"""How an interrupted search is continued."""


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """An OSError while a run is written becomes a RunError that says how the search goes on."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {folder} ({error.strerror or error})"
        raise RunError(f"{problem}; free some space, then {AGAIN}") from error


class History:
    """Generations, in memory and in a file to which each is appended as soon as it ends. A context
    manager.

    A search follows from its seed and its losses, so these lines are all that a resumed run needs.
    A line that a crash left incomplete is dropped, and its generation repeated. One process at a
    time may have the file open.
    """

    def __init__(self, file: Path) -> None:
        self._stream: IO[bytes] = file.open("ab")
        self.generations = read_history(file)
        self._stream.truncate(file.read_bytes().rfind(b"\n") + 1)

    def append(self, generation: Generation) -> None:
        """Raises RunError where it cannot be written; the search can be resumed then."""
        with resumable(Path(self._stream.name).parent):
            self._stream.write(_line(generation))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.generations.append(generation)

    def replace(self, generation: Generation) -> None:
        """Replace the generation of the same number, in memory and in the file."""
        self.generations[generation.generation] = generation
        file = Path(self._stream.name)
        with resumable(file.parent):
            self._stream.close()
            write_atomically(file, b"".join(map(_line, self.generations)))
            self._stream = file.open("ab")

    def __len__(self) -> int:
        return len(self.generations)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(
            OSError
        ):  # on a full disk, which `append` has reported, this writes the rest of a line again
            self._stream.close()


def _line(generation: Generation) -> bytes:
    return json.dumps(generation.model_dump()).encode() + b"\n"


def fingerprint(candidates: Float64) -> str:
    """Digest of float64 candidates, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(candidates).tobytes()).hexdigest()[:16]


def read_history(file: Path) -> list[Generation]:
    """The complete lines of history.jsonl. Raises RunError for one that is not a generation, or out
    of order.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {file} ({error.strerror})") from None
    generations: list[Generation] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines()):
        try:
            generation = Generation.model_validate(json.loads(line))
        except (ValueError, RecursionError):  # pydantic's error is one of the first
            raise RunError(
                f"{file} is damaged in line {number + 1}; tune again with --overwrite"
            ) from None
        if generation.generation != number:
            raise RunError(
                f"{file} is damaged: line {number + 1} is generation {generation.generation}; "
                "tune again"
            )
        generations.append(generation)
    return generations


def check_history(
    generations: Sequence[Generation], settings: Settings, layers: int, most: int
) -> None:
    """Raises RunError for generations that no search makes with these settings and as many searched
    layers.

    most: generations within the budget.
    """
    if len(generations) > most:
        problem = (
            f"the run cannot be resumed: it has {len(generations)} generations, its budget {most}"
        )
        raise RunError(f"{problem}; tune again")
    for g in generations:
        unscored = g.generation == most - 1 and g.dev_score is None
        for name, wanted, found in (
            ("losses", settings.popsize, len(g.losses)),
            ("calls", settings.calls(g.generation + 1), g.calls),
            ("layer", g.generation % layers, g.layer),
            ("dev_loss", g.dev_score is None, g.dev_loss is None),
            ("dev_score", False, unscored),
        ):
            if found != wanted:
                problem = f"generation {g.generation} is damaged ({name})"
                raise RunError(f"the run cannot be resumed: {problem}; tune again with --overwrite")
