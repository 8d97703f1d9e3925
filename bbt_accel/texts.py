"""Texts to predict: from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bbt_accel.errors import DataError, UsageError


def read_texts(texts: Sequence[str], file: Path | None, columns: Sequence[str]) -> list[dict[str, str]]:
    """Texts by column, for each of `texts` or for each line of `file` (`-` is standard input).

    Without either, lines are read from standard input unless that is a terminal. For a task with one text column a
    line is a text; for one with more it is a JSON object or tab-separated columns. Raises UsageError and DataError.
    """
    if texts and file is not None:
        raise UsageError("give texts or --file, not both")
    if texts:
        return [parse(text, columns, f"text {number}") for number, text in enumerate(texts, 1)]
    if file is None and sys.stdin.isatty():
        raise UsageError("give a text, --file FILE, or lines on standard input")
    name = "standard input" if file is None or str(file) == "-" else str(file)
    lines = _lines(file, name)
    if not lines:
        raise DataError(f"{name} is empty")
    return [parse(line, columns, f"{name} line {number}") for number, line in enumerate(lines, 1)]


def parse(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    """One row. Raises DataError, naming `where`, when a column is missing."""
    if len(columns) == 1:
        return {columns[0]: text}
    if text.lstrip().startswith("{"):
        return _from_json(text, columns, where)
    values = text.split("\t")
    if len(values) != len(columns):
        raise DataError(
            f"{where} has {len(values)} column(s), the task needs {', '.join(columns)}: separate them with tabs, "
            "or write a JSON object"
        )
    return dict(zip(columns, values, strict=True))


def _from_json(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})") from None
    for column in columns:
        if not isinstance(record.get(column), str):
            raise DataError(f"{where} has no text {column!r}; the task needs {', '.join(columns)}")
    return {column: record[column] for column in columns}


def _lines(file: Path | None, name: str) -> list[str]:
    try:
        content = sys.stdin.read() if name == "standard input" else file.read_text("utf-8-sig")  # type: ignore[union-attr]
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {name} ({error.strerror})") from None
    lines = content.split("\n")
    return lines[:-1] if lines[-1] == "" else lines
