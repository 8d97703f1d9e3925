"""Tables from files: CSV whose separator and encoding are detected, TSV, JSON, JSON lines, Parquet
and Excel.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from bbt_accel.errors import DataError, MissingDependency, did_you_mean, first_line

Record = dict[str, object]
T = TypeVar("T")
SEPARATORS = ",;\t|"
WESTERN = 0.15  # largest share of bytes outside ASCII in a text of a Western language
PEEKED = 20  # rows of a CSV file by which its separator is detected


@dataclass(frozen=True)
class Table:
    """Rows by column. encoding, separator: of a text file, as detected; None for other files."""

    records: list[Record]
    encoding: str | None = None
    separator: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record))


def read_table(file: Path) -> Table:
    """The rows of a file, by the ending of its name. In CSV, TSV and Excel every value is text.

    Raises DataError for a file of another kind, and in one line for one that cannot be read.
    """
    if file.suffix.lower() not in READERS:
        raise DataError(f"{file} is none of {', '.join(READERS)}; convert it")
    csv.field_size_limit(2**31 - 1)  # of the process; a long text is no error
    try:
        return READERS[file.suffix.lower()](file)
    except (DataError, MissingDependency):
        raise
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror or first_line(error)})") from None
    except Exception as error:  # pyarrow and openpyxl raise errors of many kinds
        raise DataError(f"cannot read {file} ({first_line(error):.200})") from None


def distinct(rows: Sequence[T], key: Callable[[T], Hashable]) -> list[T]:
    """The first of the rows with each key, in their order."""
    found: dict[Hashable, T] = {}
    for row in rows:
        found.setdefault(key(row), row)
    return list(found.values())


def no_column(name: str, columns: list[str], source: object) -> DataError:
    """The error for a column that is not there; it names the closest one, or those that are."""
    found = ", ".join(f"{column!r:.40}" for column in islice(columns, 8)) + (
        ", …" if len(columns) > 8 else ""
    )
    hint = did_you_mean(name, columns)
    hint = f"; {hint}" if hint.startswith("did") else ""
    return DataError(f"{source} has no column {name!r}; it has {found}{hint}")


def parse_object(line: str, where: str) -> Record:
    """A JSON object. Raises DataError, naming `where`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({first_line(error):.200})") from None
    if not isinstance(record, dict):
        raise DataError(f'{where} is not an object like {{"text": "...", "label": 0}}')
    return record


def _read_json_lines(file: Path) -> Table:
    # Not pyarrow: it converts texts that look like dates, and refuses long lines.
    with file.open(encoding="utf-8-sig") as lines:
        found = [
            parse_object(line, f"{file} line {n}")
            for n, line in enumerate(lines, 1)
            if line.strip()
        ]
    return Table(found, "utf-8")


def _read_json(file: Path) -> Table:
    """A list of objects, an object with one such list in it, or lines of objects."""
    text = file.read_text("utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_json_lines(file)
        raise
    lists = (
        [value for value in found.values() if isinstance(value, list)]
        if isinstance(found, dict)
        else [found]
    )
    if (
        len(lists) != 1
        or not isinstance(lists[0], list)
        or not all(isinstance(row, dict) for row in lists[0])
    ):
        raise DataError(f'{file} is not a list of objects like {{"text": "...", "label": 0}}')
    return Table(lists[0], "utf-8")


def _read_csv(file: Path) -> Table:
    text, encoding = _decoded(file)
    return _separated(file, text, encoding, _separator(text))


def _read_tsv(file: Path) -> Table:
    """With quoted fields, or without, as most TSV files are: there a quote is a character like
    others.

    Where both fit, quotes that span lines have swallowed rows, so the reading with more of them is
    right.
    """
    text, encoding = _decoded(file)
    found, problems = list[Table](), list[Exception]()
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if '"' in text else (csv.QUOTE_MINIMAL,):
        try:
            found.append(_separated(file, text, encoding, "\t", quoting))
        except (csv.Error, DataError) as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return max(found, key=lambda table: len(table.records))  # the first of as many, with quoting


def _separated(
    file: Path, text: str, encoding: str, separator: str, quoting: Any = csv.QUOTE_MINIMAL
) -> Table:
    # Not pyarrow: every column is text, so that "1984" and "NA" remain texts.
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True
    )
    reader.fieldnames = [
        name.strip() for name in reader.fieldnames or ()
    ]  # no option can name a space in front
    check_column_names(reader.fieldnames, file)
    return Table(list(_complete(file, reader)), encoding, separator)


def check_column_names(names: Sequence[str], source: object) -> None:
    """Raises DataError for two columns of the same name, of which one would be lost; several may
    have none.
    """
    for name, times in Counter(filter(None, names)).most_common(1):
        if times > 1:
            raise DataError(
                f"{source} has {times} columns named {name!r:.50}; rename or remove one"
            )


def _complete(file: Path, reader: csv.DictReader[str]) -> Iterator[Record]:
    for record in reader:
        values: Mapping[str | None, object] = record
        if None in values or None in values.values():
            raise DataError(
                f"cannot read {file} (line {reader.line_num} has more or fewer columns than the "
                "first)"
            )
        yield dict(record)


def _decoded(file: Path) -> tuple[str, str]:
    """The text of a file, and its encoding: UTF-8, by a byte order mark UTF-16, else what the bytes
    make likely.

    Statistics of characters need long texts, but most old files of Western languages are
    Windows-1252, and few of their bytes are outside ASCII. Raises DataError for UTF-8 with damaged
    bytes: any other encoding would garble every text.
    """
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), "utf-16"
    try:
        return content.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError as error:
        repaired = content.decode("utf-8", "replace")
        if sum(character > "\x7f" for character in repaired) > 2 * repaired.count("\ufffd"):
            raise DataError(
                f"{file} is UTF-8 but for byte {error.start:,}; repair it, or save it as UTF-8"
            ) from None
        if sum(byte > 127 for byte in content) < WESTERN * len(content):
            with suppress(UnicodeDecodeError):
                return content.decode("cp1252"), "cp1252"
        from charset_normalizer import from_bytes

        if (found := from_bytes(content).best()) is None:
            raise DataError(
                f"the encoding of {file} cannot be detected; save it as UTF-8"
            ) from None
        return str(found), found.encoding


def _separator(text: str) -> str:
    """The separator with which the first rows have equally many columns, at least two; else the
    comma.
    """
    columns = {}
    for separator in SEPARATORS:
        try:
            rows = list(
                islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), PEEKED)
            )
        except csv.Error:
            continue
        widths = {len(row) for row in rows if row}
        columns[separator] = widths.pop() if len(widths) == 1 else 0
    best = max(columns, key=lambda separator: columns[separator], default=",")
    return best if columns.get(best, 0) > 1 else ","


def _read_parquet(file: Path) -> Table:
    from pyarrow import parquet

    return Table(parquet.read_table(file).to_pylist())


def _read_excel(file: Path) -> Table:
    """The first sheet; its first row names the columns."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise MissingDependency(
            f"{file} needs openpyxl: pip install openpyxl, or save it as CSV"
        ) from None
    book = load_workbook(file, read_only=True, data_only=True)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # what the file says of its size is often wrong
        cells = [[plain(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    finally:
        book.close()
    width = max(map(len, cells), default=0)
    names, *rows = ([*row, *[""] * (width - len(row))] for row in cells or [[]])
    check_column_names(names, file)
    return Table([dict(zip(names, row, strict=True)) for row in rows if any(row)])


def as_utf8(text: str) -> str:
    """A text with a question mark for every lone surrogate: JSON and arguments can carry one, and
    UTF-8 cannot.
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def require_text(value: object, column: str, where: str) -> str:
    """The text of a column. Raises DataError, naming `where`, for another value."""
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{value!r:.50}, not text"
        raise DataError(f"{where}: {column} is {kind}")
    return as_utf8(value)


def plain(value: object) -> str:
    """A cell as text: empty for a missing one (None, NaN), whole numbers without a decimal
    point.
    """
    if (
        value is None or type(value).__name__ == "NAType" or value != value
    ):  # pandas' NA; NaN differs from itself
        return ""
    return (
        str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    )


JSON_LINES = {".jsonl", ".ndjson"}
READERS = {
    **dict.fromkeys(sorted(JSON_LINES), _read_json_lines),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".xlsx": _read_excel,
}
