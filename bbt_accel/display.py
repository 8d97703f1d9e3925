"""Tables for a terminal, JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbt_accel.reporting import plain


def print_json(value: object) -> None:
    """One JSON value on one line; paths become strings."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values, without those that are None."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(plain(value)))
    Console().print(table)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(plain(value)) for value in row))
    Console().print(table)


def print_markdown(content: str) -> None:
    from rich.markdown import Markdown

    Console().print(Markdown(content))
