"""The rows that are timed and the rows that are compared, and how they travel between processes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from bbt_accel.batch import Batch
from bbt_accel.data import Row, few_shot, load_rows
from bbt_accel.errors import DataError
from bbt_accel.tasks import Task


def timed_rows(task: Task, data: Path | None, k_shot: int, count: int | None, seed: int) -> list[Row]:
    """The few-shot train rows, k a class; or `count` rows drawn from the train split. Raises DataError."""
    rows = load_rows(task, "train", data)
    return few_shot(rows, task.n_classes, k_shot, seed)[0] if count is None else draw(rows, count, seed)


def compared_rows(task: Task, data: Path | None, most: int, seed: int) -> list[Row]:
    """The test rows, or `most` of them drawn by `seed` where there are more."""
    rows = load_rows(task, "test", data)
    return draw(rows, min(most, len(rows)), seed)


def draw(rows: list[Row], count: int, seed: int) -> list[Row]:
    if count > len(rows):
        raise DataError(f"--rows {count} is more than the {len(rows)} rows of the train split")
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]


def save_batch(file: Path, batch: Batch) -> None:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    np.savez(file, **{name: value for name, value in values.items() if value is not None})


def load_batch(file: str | Path) -> Batch:
    with np.load(file) as values:
        return Batch(**values)
