"""The rows of a benchmark, and what its processes do with them: time, compare, search. Large arrays are files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.benchmarks.timing import count_flops, generation, milliseconds, peak_mib
from bbt_accel.data import Row, few_shot, load_rows
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import DataError
from bbt_accel.run import Run
from bbt_accel.tasks import Task

SEED = 42
"""Seed of the timed and compared rows, of the random prompts and of the first search."""
ROWS = 64
"""Test rows per call."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Calls before the timed ones, by device: buffers, kernels and CUDA graphs are made in them."""
LoadArguments = dict[str, Any]
"""Arguments of `load_engine`: bundle, name, device, threads, without."""


def measure(engine: LoadArguments, batch: str, popsize: int, repeats: int, flops: bool = False) -> dict[str, Any]:
    """Time generations of candidates, after some to warm up. flops: count the operations of a candidate too."""
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        evaluate = generation(bound, popsize)
        milliseconds(evaluate, WARM_UP[engine["device"]])
        return {
            "ms": milliseconds(evaluate, repeats),
            "peak_mib": peak_mib(),
            "versions": loaded.versions(),
            "flops": count_flops(evaluate) if flops else None,
        }


def compare(engine: LoadArguments, batch: str, prompt: str) -> list[list[float]]:
    """Label logits (N, C) of the batch for the prompt, both files."""
    with load_engine(**engine) as loaded:
        found: list[list[float]] = row_logits(loaded, load_batch(batch), np.load(prompt)).tolist()
        return found


def search(engine: LoadArguments, run: str, data: str | None, **arguments: Any) -> dict[str, Any]:
    """A whole search into the folder `run`: its seconds and API calls; the prompt goes into prompt.npy there."""
    from bbt_accel.tuning import tune

    options = {("engine" if name == "name" else name): value for name, value in engine.items()}
    tune(data=None if data is None else Path(data), output=run, progress=False, **options, **arguments)
    done = Run.read(run)
    np.save(Path(run) / "prompt.npy", done.prompt)
    return {"seconds": done.info.seconds, "calls": done.info.calls}


def row_logits(engine: Engine, batch: Batch, prompt: Float32) -> Float32:
    """Label logits (N, C) of all rows for one prompt, a few rows at a time."""
    parts = []
    for start in range(0, len(batch), ROWS):
        with engine.bind(batch.rows(slice(start, start + ROWS))) as bound:
            parts.append(bound.label_logits(prompt[None])[0])
    return np.concatenate(parts)


def timed_rows(task: Task, data: Path | None, k_shot: int, count: int | None = None) -> list[Row]:
    """The few-shot train rows, k per class; or `count` rows drawn from the train split. Raises DataError."""
    rows = load_rows(task, "train", data)
    return few_shot(rows, task.n_classes, k_shot, SEED)[0] if count is None else _draw(rows, count)


def compared_rows(task: Task, data: Path | None, most: int) -> list[Row]:
    """The test rows, or a random `most` of them where there are more."""
    rows = load_rows(task, "test", data)
    return _draw(rows, min(most, len(rows)))


def _draw(rows: list[Row], count: int) -> list[Row]:
    if count > len(rows):
        raise DataError(f"--rows {count} is more than the {len(rows)} rows of the train split")
    return [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))[:count]]


def save_batch(file: Path, batch: Batch) -> None:
    np.savez(file, **batch.arrays())  # type: ignore[arg-type]


def load_batch(file: str | Path) -> Batch:
    with np.load(file) as arrays:
        return Batch(**arrays)
