"""Rows of a task, from a file, a folder, the hub or the package."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bbt_accel.core import demo
from bbt_accel.core.batch import Int64
from bbt_accel.errors import DataError, check_known, did_you_mean, first_line
from bbt_accel.io.tables import READERS, Record, Table, no_column, plain, read_table, require_text
from bbt_accel.tasks.task import Task

Split = Literal["train", "test"]
SPLIT_FILES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation")}
FORMS = ", ".join(suffix.removeprefix(".") for suffix in READERS if suffix != ".jsonl")
_INTEGER = re.compile(r"\s*-?\d{1,9}\s*")
_DIGIT = re.compile(r"\d")  # in the name of a class: 1 may mean "1 star", not the second class
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
UNLABELLED = -1  # the label of hub data sets for rows whose label is withheld or disputed


@dataclass(frozen=True, slots=True)
class Row:
    """The text columns of a row, and its class."""

    fields: Annotated[dict[str, str], Field(description="Column → text.")]
    label: Annotated[int | None, Field(description="0 .. C-1; None if it is unknown.")] = None


def labels(rows: Sequence[Row]) -> Int64:
    """The classes of labelled rows, int64 (N,)."""
    return np.array([row.label for row in rows], np.int64)


def load_rows(task: Task, split: Split, data: str | Path | None = None) -> list[Row]:
    """The labelled rows of a split, in file order.

    data: a file, or a folder with {train,validation,test} in one of the formats of
    `tables.READERS`. Without it, the shipped rows of the demo task or the task's data set on the
    hub. `test` is the test file, or the validation file if test has no labels. Rows with the label
    -1 are skipped. Raises DataError for a missing or malformed file, a missing column, a label that
    is no class of the task, a split without rows, and a data set that cannot be downloaded;
    UsageError for another split.
    """
    check_known("split", split, SPLIT_FILES)
    if data is None and task.name == "demo" and task.hub is None:
        data = demo.DATA
    return _from_hub(task, split) if data is None else _from_folder(task, split, Path(data))


def task_folders(data: str | Path | None, names: Sequence[str]) -> dict[str, str | None]:
    """Where the rows of each task lie, as an absolute path: in the subfolder of its name; None
    without `data`.

    Those of the only task may be in `data` itself.
    """
    if data is None:
        return dict.fromkeys(names)
    data = Path(data).absolute()
    found: dict[str, str | None] = {name: str(data / name) for name in names}
    if (
        len(names) == 1
        and not (data / names[0]).exists()
        and (data.is_file() or split_files("train", data))
    ):
        found[names[0]] = str(data)
    return found


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 (hex) of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.fields, row.label], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def has_test_file(data: Path) -> bool:
    """Whether it is a folder with a file of test rows."""
    return data.is_dir() and bool(split_files("test", data))


def split_files(split: Split, folder: Path) -> list[Path]:
    """The files of a split, those to prefer first. Raises DataError for one in several formats."""
    return [file for name in SPLIT_FILES[split] for file in _find(folder, name)]


def _from_folder(task: Task, split: Split, folder: Path) -> list[Row]:
    if folder.is_file():
        return _rows(task, read_table(folder).records, folder)
    if not folder.is_dir():
        wanted = f"a folder should hold train.jsonl and test.jsonl (or {FORMS})"
        raise DataError(f"--data {folder} is not a folder, or a file of rows; {wanted}")
    files = split_files(split, folder)
    if not files:
        wanted = " or ".join(f"{name}.jsonl" for name in SPLIT_FILES[split]) + f" (or {FORMS})"
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder} has no {wanted}; it holds {found}")
    for file in files:
        records = read_table(file).records
        names = {plain(record.get(task.label)) for record in records}
        if file == files[-1] or any(name and not _unlabelled(name) for name in names):
            break
    return _rows(task, records, file)


def _find(folder: Path, name: str) -> list[Path]:
    files = [file for suffix in READERS if (file := folder / f"{name}{suffix}").is_file()]
    if len(files) > 1:
        raise DataError(f"{folder} has {' and '.join(f.name for f in files)}; keep one of them")
    return files


def _from_hub(task: Task, split: Split) -> list[Row]:
    hub = task.hub
    if hub is None:
        raise DataError(f"task {task.name} has no data set on the hub; pass --data DIR")
    source = "/".join(filter(None, (hub.path, hub.config)))
    try:
        import datasets

        records = datasets.load_dataset(
            hub.path, hub.config, split="train" if split == "train" else hub.test
        ).to_list()
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(
            f"cannot load {source} from the hub ({type(error).__name__}: "
            f"{first_line(error):.200}); pass --data DIR with train.jsonl and test.jsonl "
            f"(or {FORMS})"
        ) from None
    return _rows(task, records, source)


def _rows(task: Task, records: Sequence[Record], source: Path | str) -> list[Row]:
    if not records:
        raise DataError(f"{source} has no rows")
    columns = Table(list(records)).columns
    for name in (*task.text, task.label):
        if name not in columns:
            raise no_column(name, columns, source)
    rows = []
    for number, record in enumerate(records, 1):
        where = f"{source} row {number}"
        if (label := _label(record.get(task.label), task, where)) is not None:
            rows.append(
                Row(
                    {name: require_text(record.get(name), name, where) for name in task.text}, label
                )
            )
    if not rows:
        raise DataError(f"{source} has no labelled rows (every label is {UNLABELLED})")
    return rows


def _label(value: object, task: Task, where: str) -> int | None:
    """The class of a label: by its name where the task has names, else an integer. None for an
    unlabelled row.
    """
    name = plain(value)
    if task.classes is not None and (known := _class_of(name, task.classes)) is not None:
        return known
    if _unlabelled(name):
        return None
    if task.classes is not None and (
        any(map(_DIGIT.search, task.classes)) or not _INTEGER.fullmatch(name)
    ):
        hint = did_you_mean(name, task.classes)
        raise DataError(
            f"{where}: {task.label} is {value!r:.50}, no class of task {task.name}; {hint}"
        )
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        problem = (
            f"{where}: {task.label} is {value!r:.50}, not an integer from 0 to {task.n_classes - 1}"
        )
        raise DataError(
            f"{problem}; name classes of another kind in the task file: classes = [...]"
        )
    if not 0 <= value < task.n_classes:
        raise DataError(
            f"{where}: {task.label} {value} is outside 0..{task.n_classes - 1} of task {task.name}"
        )
    return value


def _class_of(name: str, classes: Sequence[str]) -> int | None:
    """The class of this name, or of the same number: 1 is 1.0 in a file of another format."""
    if name in classes:
        return classes.index(name)
    number = _number(name)
    return None if number is None else _by_number(tuple(classes)).get(number)


@lru_cache
def _by_number(classes: tuple[str, ...]) -> dict[Decimal, int]:
    """The classes that are numbers, without those that are the same number."""
    numbers = list(map(_number, classes))
    count = Counter(numbers)
    return {
        number: i for i, number in enumerate(numbers) if number is not None and count[number] == 1
    }


def _number(name: str) -> Decimal | None:
    return Decimal(name) if _NUMBER.fullmatch(name) else None


def _unlabelled(name: str) -> bool:
    return _number(name) == UNLABELLED
