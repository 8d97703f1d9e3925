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
    try:
        content = file.read_text("utf-8-sig") if file is not None and str(file) != "-" else sys.stdin.read()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {name} ({error.strerror})") from None
    if not content:
        raise DataError(f"{name} is empty")
    lines = content.removesuffix("\n").split("\n")
    return [parse(line, columns, f"{name} line {number}") for number, line in enumerate(lines, 1)]


def parse(text: str, columns: Sequence[str], where: str) -> dict[str, str]:
    """One row. Raises DataError, naming `where`, when a column is missing."""
    if len(columns) == 1:
        return {columns[0]: text}
    needed = f"the task needs {', '.join(columns)}"
    if text.lstrip().startswith("{"):
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error})") from None
        for column in columns:
            if not isinstance(record.get(column), str):
                raise DataError(f"{where} has no text {column!r}; {needed}")
        return {column: record[column] for column in columns}
    values = text.split("\t")
    if len(values) != len(columns):
        problem = f"{where} has {len(values)} column(s), {needed}"
        raise DataError(f"{problem}: separate them with tabs, or write a JSON object")
    return dict(zip(columns, values, strict=True))
