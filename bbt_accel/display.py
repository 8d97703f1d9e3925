"""What the commands print: tables for a terminal, JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def print_json(value: object) -> None:
    """One JSON value on one line; paths and the like as text."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values; what is None is left out."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(text(value)))
    Console().print(table)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(text(value)) for value in row))
    Console().print(table)


def print_markdown(content: str) -> None:
    from rich.markdown import Markdown

    Console().print(Markdown(content))


class StderrBar:
    """A progress bar on a terminal's standard error while the block runs; elsewhere, or unless `shown`, silent."""

    def __init__(self, shown: bool, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


@contextmanager
def busy(message: str, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal's standard error while the block runs; elsewhere nothing.

    Gives a function to call with what is being done, how many steps are done, and of how many.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with StderrBar(shown, *columns) as it:
        task = it.bar.add_task(message, total=None)

        def tell(what: str, done: int, of: int) -> None:
            it.bar.update(task, description=f"{message}: {what}", completed=done, total=of)

        yield tell


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table in Markdown: the first columns hold text, the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def text(value: object) -> str:
    """A value as a reader wants it: four digits, lists with commas, sizes of a mapping's entries side by side."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    return str(value)
