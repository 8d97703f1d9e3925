"""The few-shot split: which rows of a train file a search uses, chooses by, shows or leaves
over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bbt_accel.core.settings import Settings
from bbt_accel.errors import DataError, UsageError
from bbt_accel.io.tables import distinct
from bbt_accel.tasks.data import Row, has_test_file, load_rows
from bbt_accel.tasks.task import Task


class FewShot(NamedTuple):
    """The rows of a search, and those of the train file that it leaves over. repeated: left out by
    `load_split`.
    """

    train: list[Row]
    dev: list[Row]
    rest: list[Row]
    repeated: int = 0


def few_shot(rows: Sequence[Row], n_classes: int, k: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and dev rows, k per class in each, after a shuffle by `seed`.

    Raises DataError for a label that is no class and for a class with fewer than 2 k rows,
    UsageError for n_classes or k below 1.
    """
    if min(n_classes, k) < 1:
        raise UsageError(f"n_classes and k must be at least 1, not {n_classes} and {k}")
    if others := {row.label for row in rows} - {None, *range(n_classes)}:
        raise DataError(
            f"a row has the label {others.pop()}, classes are 0..{n_classes - 1}; correct one"
        )
    found = split_rows(rows, n_classes, k, seed)
    return found.train, found.dev


def split_rows(
    rows: Sequence[Row],
    n_classes: int,
    k: int,
    seed: int,
    parts: int | None = None,
    names: Sequence[str] | None = None,
) -> FewShot:
    """The train and dev rows of `few_shot`, and all other rows in their order.

    parts: see `examples`. names: of the classes, for the error.
    """
    train: list[Row] = []
    dev: list[Row] = []
    rest = set(range(len(rows)))
    counts = Counter(row.label for row in rows)
    names = names or list(map(str, range(n_classes)))
    named = {name: counts[label] for label, name in enumerate(names)}
    require_examples(
        named, k, parts, "lower it, add rows or, with tune and sweep, --set allow_rare_classes=true"
    )
    wanted = {label: examples(counts[label], k, parts) for label in range(n_classes)}
    seen = Counter[int | None]()
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        row = rows[index]
        seen[row.label] += 1
        if row.label is not None and seen[row.label] <= 2 * wanted[row.label]:
            (train if seen[row.label] <= wanted[row.label] else dev).append(row)
            rest.remove(index)
    return FewShot(train, dev, [rows[index] for index in sorted(rest)])


def examples(count: int, k: int, parts: int | None) -> int:
    """Examples of a class with `count` rows to search with, and as many to choose by: k, or no more
    than a part.

    parts: into how many parts its rows are divided at least, 3 where the last are to be test rows;
    None for k in any case.
    """
    return k if parts is None else max(1, min(k, count // parts))


def require_examples(counts: Mapping[str, int], k: int, parts: int | None, hint: str) -> None:
    """Raises DataError for the rarest class if it has too few rows for train and dev. hint: how to
    help where k asks for them, and the class has two rows."""
    name = min(counts, key=lambda name: counts[name])
    if (count := counts[name]) < 2 * examples(count, k, parts):
        needed = f"--k-shot {k} needs {2 * k} (train and dev); {hint if count > 1 else 'add rows'}"
        if parts is not None:
            needed = "two are needed, one to search with and one to choose by; add rows"
        raise DataError(f"class {name!r} has {count} rows, {needed}")


def load_few_shot(task: Task, data: Path | None, settings: Settings) -> tuple[list[Row], list[Row]]:
    """The train and dev rows that a search with these settings uses. Raises DataError."""
    found = load_split(task, data, settings)
    return found.train, found.dev


def load_split(task: Task, data: Path | None, settings: Settings) -> FewShot:
    """The train and dev rows that a search with these settings uses, and the others of the train
    file.

    Where those others are test rows, each text counts once, without the white space around it: a
    copy of a train row would be no test.
    """
    given = rows = load_rows(task, "train", data)
    if settings.hold_out:
        rows = distinct(
            rows, lambda row: tuple(task.cleaned(text).strip() for text in row.fields.values())
        )
    found = split_rows(
        rows, task.n_classes, settings.k_shot, settings.seed, settings.parts, task.classes
    )
    return found._replace(repeated=len(given) - len(rows))


def check_rows(task: Task, data: Path, settings: Settings) -> None:
    """Raises DataError for train or test rows that a run with these settings would miss, before it
    is begun.
    """
    load_few_shot(task, data, settings)
    if not has_test_rows(data, settings):
        raise DataError(
            f"{data} has no test rows; add a file of them or, with tune and sweep, --set "
            "hold_out=true"
        )
    if not settings.hold_out:
        load_rows(task, "test", data)


def has_test_rows(data: Path | None, settings: Settings) -> bool:
    """Whether a run with these settings can be scored on test rows."""
    return settings.hold_out or data is None or has_test_file(data)


def choose_demonstrations(
    train: Sequence[Row], n_classes: int, count: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Some of the train rows as demonstrations, and the others: a search does not score a row whose
    label is shown.

    They are drawn by `seed`, as evenly from the classes as `count` allows, and shuffled. Raises
    DataError when no row would be left.
    """
    if count >= len(train):
        raise DataError(
            f"demonstrations={count} leaves none of the {len(train)} train rows; raise --k-shot"
        )
    rng = np.random.default_rng(seed)
    order, rank = rng.permutation(len(train)), dict[int, int]()
    seen, classes = Counter[int | None](), rng.permutation(n_classes).tolist()
    for index in order.tolist():
        label = train[index].label
        rank[index] = seen[label] * n_classes + classes.index(label)
        seen[label] += 1
    chosen = sorted(rank, key=lambda index: rank[index])[:count]
    shown = [train[index] for index in order.tolist() if index in chosen]
    return shown, [row for index, row in enumerate(train) if index not in chosen]
