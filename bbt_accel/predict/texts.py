"""Texts to predict, from arguments, a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path

from bbt_accel.errors import DataError, UsageError
from bbt_accel.io.tables import (
    JSON_LINES,
    READERS,
    Table,
    as_utf8,
    no_column,
    parse_object,
    read_table,
    require_text,
)


def read_texts(
    texts: Sequence[str], file: Path | None, columns: Sequence[str]
) -> list[dict[str, str]]:
    """Texts by column, for each of `texts` or for each line of `file` (`-` is standard input).

    Without either, lines are read from standard input unless that is a terminal. A file with
    columns (`tables.READERS`) is read by column, and so are lines of JSON objects, whatever the
    file is called. Another line is a text for a task with one text column; for one with more it is
    a JSON object or tab-separated columns. Raises UsageError, DataError.
    """
    if texts and file is not None:
        raise UsageError("give texts or --file, not both")
    if texts:
        return [
            _parse_text(text, columns, f"text {number}") for number, text in enumerate(texts, 1)
        ]
    if file is not None and file.suffix.lower() in READERS.keys() - JSON_LINES:
        return _columns(read_table(file), columns, file)
    standard = file is None or str(file) == "-"
    if standard and (
        sys.stdin is None or sys.stdin.closed or (file is None and sys.stdin.isatty())
    ):
        raise UsageError("give a text, --file FILE, or lines on standard input")
    name = "standard input" if file is None or standard else str(file)
    try:
        given = _standard_input() if file is None or standard else file.read_bytes()
        content = TextIOWrapper(BytesIO(given), "utf-8-sig").read()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {name} ({error.strerror})") from None
    if not content:
        raise DataError(f"{name} is empty")
    lines = content.removesuffix("\n").split("\n")
    filled = [
        (f"{name} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    named = file is not None and file.suffix.lower() in JSON_LINES
    if named or (
        len(columns) == 1 and filled and _are_objects([line for _, line in filled], columns[0])
    ):
        return [_parse_object(line, columns, where) for where, line in filled]
    return [
        _parse_text(line, columns, f"{name} line {number}") for number, line in enumerate(lines, 1)
    ]


def _standard_input() -> bytes:
    """All bytes. Read as text, they would be decoded by the locale, and some locales accept any
    byte.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode(errors="replace") if buffer is None else bytes(buffer.read())


def _columns(table: Table, columns: Sequence[str], file: Path) -> list[dict[str, str]]:
    if not table.records:
        raise DataError(f"{file} has no rows")
    for column in columns:
        if column not in table.columns:
            raise no_column(column, table.columns, file)
    numbered = enumerate(table.records, 1)
    return [
        {name: require_text(row.get(name), name, f"{file} row {number}") for name in columns}
        for number, row in numbered
    ]


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


def _are_objects(lines: Sequence[str], column: str) -> bool:
    """Whether all lines are JSON objects, or the first is one with this column, so that another is
    a damaged one.
    """
    try:
        return column in parse_object(lines[0], "") or all(parse_object(line, "") for line in lines)
    except DataError:
        return False


def _parse_object(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    record = parse_object(text, where)
    for column in columns:
        if not isinstance(record.get(column), str):
            raise DataError(f"{where} has no text {column!r}; the task needs {', '.join(columns)}")
    return {column: as_utf8(str(record[column])) for column in columns}
