"""What every command and script shares: errors in one line, exit codes, lists on the command line,
output.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bbt_accel.errors import BbtError, clipped, missing_module
from bbt_accel.io.machine import extra_of
from bbt_accel.io.processes import interrupted_by_sigterm
from bbt_accel.io.reporting import plain

INTERRUPTED = 130
LONGEST_LINE = 1000  # characters of an error's line: names in it may come from damaged files


@contextmanager
def exit_on_error(debug: bool = False) -> Iterator[None]:
    """An error in the block, Ctrl-C or SIGTERM ends the process with one line on standard error and
    an exit code.
    """
    try:
        with interrupted_by_sigterm():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        line = clipped(printable(" ".join(message.split())), LONGEST_LINE)
        print("error:", line, file=sys.stderr)
        sys.exit(code)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and the line that says what to do."""
    if isinstance(error, BbtError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):  # a usage error of click, or of the click inside typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "bbt-accel"
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        return getattr(error, "exit_code", 2), f"{message}; see {command} --help"
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name or "")):
        package = (error.name or "").partition(".")[0]
        return 1, f'{package} is not installed: pip install "bbt-accel[{extra}]"'
    if isinstance(error, ImportError):
        return 1, f"{missing_module(error)}; see bbt-accel doctor"
    if isinstance(error, ValueError) and "embedded null" in str(error):  # of the system's calls
        return 1, "a path holds a NUL character; correct it"
    if isinstance(error, RecursionError):
        return 1, "a file is nested too deeply to be read; correct it"
    if isinstance(error, MemoryError):
        return 1, "out of memory; use a smaller backbone, --popsize or --k-shot"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some space" if error.errno == errno.ENOSPC else ""
        return 1, f"{where}{error.strerror or type(error).__name__}{hint}"
    found = f"internal error: {type(error).__name__}: {error}"
    return 1, f"{found}; run again with --debug for the traceback"


def comma_separated(text: str) -> list[str]:
    """The entries of a comma-separated list, without spaces around them."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def printable(text: str) -> str:
    """A text without control characters, by which a name in somebody else's file could steer the
    terminal.
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def print_json(value: object) -> None:
    """One JSON value on one line; paths become strings. Escaped where the output's encoding is not
    UTF-8.
    """
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not unicode, default=str), flush=True)


def print_table(title: str, rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> None:
    # Text, not markup: names of paths and columns may have brackets.
    columns = [Column(Text(name)) for name in header]
    table = Table(*columns, title=Text(title), title_justify="left", show_header=bool(header))
    for row in rows:
        table.add_row(*(Text(printable(plain(value))) for value in row))
    Console().print(table)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """A table of names and values, without those that are None."""
    print_table(title, [(name, value) for name, value in facts.items() if value is not None])


def print_markdown(content: str) -> None:
    """A report, without its pictures."""
    from rich.markdown import Markdown

    Console().print(
        Markdown("\n".join(line for line in content.splitlines() if not line.startswith("![")))
    )
