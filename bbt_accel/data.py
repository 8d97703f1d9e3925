"""Rows of a task, from a folder, the hub or the package; the few-shot split; and texts to predict."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from bbt_accel.batch import Int64
from bbt_accel.errors import DataError, UsageError, check_known, did_you_mean, first_line
from bbt_accel.settings import Settings
from bbt_accel.tables import (
    JSON_LINES,
    READERS,
    Record,
    Table,
    as_utf8,
    distinct,
    no_column,
    parse_object,
    plain,
    read_table,
)
from bbt_accel.tasks import Task

Split = Literal["train", "test"]
SPLIT_FILES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation")}
FORMS = ", ".join(suffix.removeprefix(".") for suffix in READERS if suffix != ".jsonl")
_INTEGER = re.compile(r"\s*-?\d{1,9}\s*")
UNLABELLED = -1  # the label of hub data sets for rows whose label is withheld or disputed


@dataclass(frozen=True, slots=True)
class Row:
    """The text columns of a row, and its class."""

    fields: Annotated[dict[str, str], Field(description="Column → text.")]
    label: Annotated[int | None, Field(description="0 .. C-1; None if it is unknown.")] = None


class FewShot(NamedTuple):
    """The rows of a search, and those of the train file that it leaves over. repeated: left out by `load_split`."""

    train: list[Row]
    dev: list[Row]
    rest: list[Row]
    repeated: int = 0


def labels(rows: Sequence[Row]) -> Int64:
    """The classes of labelled rows, int64 (N,)."""
    return np.array([row.label for row in rows], np.int64)


def load_rows(task: Task, split: Split, data: str | Path | None = None) -> list[Row]:
    """The labelled rows of a split, in file order.

    data: a file, or a folder with {train,validation,test} in one of the formats of `tables.READERS`. Without it, the
    shipped rows of the demo task or the task's data set on the hub. `test` is the test file, or the validation file if
    test has no labels. Rows with the label -1 are skipped. Raises DataError for a missing or malformed file, a missing
    column, a label that is no class of the task, a split without rows, and a data set that cannot be downloaded;
    UsageError for another split.
    """
    check_known("split", split, SPLIT_FILES)
    if data is None and task.name == "demo" and task.hub is None:
        data = Path(__file__).parent / "demo" / "data"
    return _from_hub(task, split) if data is None else _from_folder(task, split, Path(data))


def few_shot(rows: Sequence[Row], n_classes: int, k: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Train and dev rows, k per class in each, after a shuffle by `seed`. DataError for a class with fewer than 2 k."""
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
    require_examples(named, k, parts, "lower it, add rows or pass --allow-rare-classes")
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
    """Examples of a class with `count` rows to search with, and as many to choose by: k, or no more than a part.

    parts: into how many parts its rows are divided at least, 3 where the last are to be test rows; None for k in any
    case.
    """
    return k if parts is None else max(1, min(k, count // parts))


def require_examples(counts: Mapping[str, int], k: int, parts: int | None, hint: str) -> None:
    """Raises DataError for the rarest class if it has too few rows for train and dev. hint: how to help where k asks
    for them."""
    name = min(counts, key=lambda name: counts[name])
    if (count := counts[name]) < 2 * examples(count, k, parts):
        needed = f"--k-shot {k} needs {2 * k} (train and dev); {hint}"
        if parts is not None:
            needed = "two are needed, one to search with and one to choose by; add rows"
        raise DataError(f"class {name!r} has {count} rows, {needed}")


def load_few_shot(task: Task, data: Path | None, settings: Settings) -> tuple[list[Row], list[Row]]:
    """The train and dev rows that a search with these settings uses. Raises DataError."""
    found = load_split(task, data, settings)
    return found.train, found.dev


def load_split(task: Task, data: Path | None, settings: Settings) -> FewShot:
    """The train and dev rows that a search with these settings uses, and the others of the train file.

    Where those others are test rows, each text counts once, without the white space around it: a copy of a train
    row would be no test.
    """
    given = rows = load_rows(task, "train", data)
    if settings.hold_out:
        rows = distinct(rows, lambda row: tuple(task.cleaned(text).strip() for text in row.fields.values()))
    found = split_rows(rows, task.n_classes, settings.k_shot, settings.seed, settings.parts, task.classes)
    return found._replace(repeated=len(given) - len(rows))


def check_rows(task: Task, data: Path, settings: Settings) -> None:
    """Raises DataError for train or test rows that a run with these settings would miss, before it is begun."""
    load_few_shot(task, data, settings)
    if not has_test_rows(data, settings):
        raise DataError(f"{data} has no test rows; add a file of them, or hold out rows of the train file")
    if not settings.hold_out:
        load_rows(task, "test", data)


def has_test_rows(data: Path | None, settings: Settings) -> bool:
    """Whether a run with these settings can be scored on test rows."""
    return settings.hold_out or data is None or has_test_file(data)


def has_test_file(data: Path) -> bool:
    """Whether it is a folder with a file of test rows."""
    return data.is_dir() and bool(split_files("test", data))


def choose_demonstrations(train: Sequence[Row], n_classes: int, count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Some of the train rows as demonstrations, and the others: a search does not score a row whose label is shown.

    They are drawn by `seed`, as evenly from the classes as `count` allows, and shuffled. Raises DataError when no row
    would be left.
    """
    if count >= len(train):
        raise DataError(f"--demonstrations {count} leaves none of the {len(train)} train rows; raise --k-shot")
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


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 (hex) of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.fields, row.label], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def read_texts(texts: Sequence[str], file: Path | None, columns: Sequence[str]) -> list[dict[str, str]]:
    """Texts by column, for each of `texts` or for each line of `file` (`-` is standard input).

    Without either, lines are read from standard input unless that is a terminal. A file with columns (`tables.READERS`)
    is read by column, and so are lines of JSON objects, whatever the file is called. Another line is a text for a task
    with one text column; for one with more it is a JSON object or tab-separated columns. Raises UsageError, DataError.
    """
    if texts and file is not None:
        raise UsageError("give texts or --file, not both")
    if texts:
        return [_parse_text(text, columns, f"text {number}") for number, text in enumerate(texts, 1)]
    if file is not None and file.suffix.lower() in READERS.keys() - JSON_LINES:
        return _columns(read_table(file), columns, file)
    standard = file is None or str(file) == "-"
    if standard and (sys.stdin is None or sys.stdin.closed or (file is None and sys.stdin.isatty())):
        raise UsageError("give a text, --file FILE, or lines on standard input")
    name = "standard input" if file is None or standard else str(file)
    try:
        content = sys.stdin.read().removeprefix("\ufeff") if file is None or standard else file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {name} ({error.strerror})") from None
    if not content:
        raise DataError(f"{name} is empty")
    lines = content.removesuffix("\n").split("\n")
    filled = [(f"{name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    one_column_of_objects = len(columns) == 1 and bool(filled) and _is_object(filled[0][1], columns)
    if one_column_of_objects or (file is not None and file.suffix.lower() in JSON_LINES):
        return [_parse_object(line, columns, where) for where, line in filled]
    return [_parse_text(line, columns, f"{name} line {number}") for number, line in enumerate(lines, 1)]


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
        if file == files[-1] or any(plain(record.get(task.label)) not in ("", str(UNLABELLED)) for record in records):
            break
    return _rows(task, records, file)


def split_files(split: Split, folder: Path) -> list[Path]:
    """The files of a split, those to prefer first. Raises DataError for one in several formats."""
    return [file for name in SPLIT_FILES[split] for file in _find(folder, name)]


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

        records = datasets.load_dataset(hub.path, hub.config, split="train" if split == "train" else hub.test).to_list()
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(
            f"cannot load {source} from the hub ({type(error).__name__}: {first_line(error):.200}); "
            f"pass --data DIR with train.jsonl and test.jsonl (or {FORMS})"
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
            rows.append(Row({name: _text(record.get(name), name, where) for name in task.text}, label))
    if not rows:
        raise DataError(f"{source} has no labelled rows (every label is {UNLABELLED})")
    return rows


def _label(value: object, task: Task, where: str) -> int | None:
    """The class of a label: by its name where the task has names, else an integer. None for an unlabelled row."""
    if task.classes is not None:
        name = plain(value)
        if name in task.classes:
            return task.classes.index(name)
        if any(re.fullmatch(r"-?\d+", known) for known in task.classes) or not _INTEGER.fullmatch(name):
            hint = did_you_mean(name, task.classes)
            raise DataError(f"{where}: {task.label} is {value!r:.50}, no class of task {task.name}; {hint}")
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        problem = f"{where}: {task.label} is {value!r:.50}, not an integer from 0 to {task.n_classes - 1}"
        raise DataError(f"{problem}; name classes of another kind in the task file: classes = [...]")
    if value == UNLABELLED:
        return None
    if not 0 <= value < task.n_classes:
        raise DataError(f"{where}: {task.label} {value} is outside 0..{task.n_classes - 1} of task {task.name}")
    return value


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{value!r:.50}, not text"
        raise DataError(f"{where}: {column} is {kind}")
    return as_utf8(value)


def _columns(table: Table, columns: Sequence[str], file: Path) -> list[dict[str, str]]:
    for column in columns:
        if column not in table.columns:
            raise no_column(column, table.columns, file)
    numbered = enumerate(table.records, 1)
    return [{name: _text(row.get(name), name, f"{file} row {number}") for name in columns} for number, row in numbered]


def _parse_text(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    """One row. Raises DataError, naming `where`, when a column is missing."""
    text = as_utf8(text)
    if len(columns) == 1:
        return {columns[0]: text}
    needed = f"the task needs {', '.join(columns)}"
    if text.lstrip().startswith("{"):
        return _parse_object(text, columns, where)
    values = text.split("\t")
    if len(values) != len(columns):
        problem = f"{where} has {len(values)} column(s), {needed}"
        raise DataError(f"{problem}: separate them with tabs, or write a JSON object")
    return dict(zip(columns, values, strict=True))


def _is_object(line: str, columns: Sequence[str]) -> bool:
    """Whether a line is a JSON object with a text in each of the columns."""
    try:
        return bool(_parse_object(line, columns, ""))
    except DataError:
        return False


def _parse_object(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    record = parse_object(text, where)
    for column in columns:
        if not isinstance(record.get(column), str):
            raise DataError(f"{where} has no text {column!r}; the task needs {', '.join(columns)}")
    return {column: as_utf8(str(record[column])) for column in columns}
