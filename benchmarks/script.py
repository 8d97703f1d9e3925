"""The frame of every benchmark: options, one-line errors, the report with its tables and plot, and
its folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from bbt_accel.errors import BbtError, MissingDependency
from bbt_accel.io.command import comma_separated, exit_on_error, print_markdown
from bbt_accel.io.files import new_folder
from bbt_accel.io.machine import describe_machine, installed_versions
from bbt_accel.io.progress import StepProgress
from bbt_accel.io.reporting import (
    PLOT,
    Schema,
    digits,
    markdown_list,
    markdown_table,
    now,
    write_report,
)

Columns = dict[
    str, tuple[str, Callable[[Any], str]]
]  # header → the attribute shown, and how it is written


class Outcome(Schema):
    """Base of whatever is measured or checked: a failure is a row of the report."""

    status: Literal["passed", "differs", "failed", "not installed"] = "passed"
    """passed; differs (from the reference by more than allowed); failed; not installed."""
    reason: str | None = Field(
        default=None, description="Why the status is not `passed`, in one line."
    )

    @contextmanager
    def capture_errors(self) -> Iterator[None]:
        """An error in the block becomes the status and its reason."""
        try:
            yield
        except BbtError as error:
            self.status = "not installed" if isinstance(error, MissingDependency) else "failed"
            self.reason = str(error)


class Timed(Schema):
    """Base of whatever is timed."""

    ms_median: float | None = None
    """Milliseconds, median of the timed calls; per candidate unless the report says otherwise."""
    ms_p90: float | None = Field(default=None, description="The 90th percentile of the same.")
    ms_p99: float | None = Field(
        default=None,
        description="The 99th percentile; with few calls it is close to the slowest one.",
    )

    def set_times(self, milliseconds: Sequence[float]) -> float:
        """Set the percentiles, and return the median."""
        self.ms_median, self.ms_p90, self.ms_p99 = map(
            float, np.percentile(milliseconds, (50, 90, 99))
        )
        return self.ms_median


class Report(Schema):
    """Base of every report.json: what was run, when, where, and its rows."""

    caption: ClassVar[str] = ""
    """Of the plot; empty for a report without one."""
    created: str = Field(
        default_factory=now, description="When the measurement ended, UTC, ISO 8601."
    )
    command: str = Field(description="The command line that repeats it.")
    options: Any = Field(description="What was asked for.")
    machine: dict[str, Any] = Field(default_factory=lambda: dict(describe_machine()))
    """Where it ran, by the names in `bbt_accel.io.machine.Machine`."""
    versions: dict[str, str] = Field(default_factory=installed_versions)
    """Versions of Python, bbt-accel and its installed dependencies."""
    rows: Sequence[Schema] = Field(description="What was measured.")

    def provenance(self) -> dict[str, object]:
        """What was run, when and where, for a Markdown list."""
        machine = [f"{self.machine['cpu']}, {self.machine['cores']} cores", *self.machine["gpus"]]
        where = {"Machine": "; ".join(machine), "Versions": self.versions}
        return {**where, "Date": self.created, "Command": f"`{self.command}`"}

    def markdown(self) -> str:
        """report.md: the plot, the rows, the facts, and what the columns mean."""
        row = type(self.rows[0])
        own = {n: getattr(self, n) for n in type(self).model_fields if n not in Report.model_fields}
        shown = sorted(row.model_fields, key=lambda name: name in Timed.model_fields)
        columns: Columns = {name.replace("_", " "): (name, written) for name in shown}
        title = f"# {(type(self).__doc__ or '').removesuffix('.')}"
        facts = markdown_list(own | self.options | self.provenance())
        return page(
            title, self.image(), rows_table(self.rows, columns), facts, columns_legend(row, columns)
        )

    def image(self) -> str:
        return f"![{self.caption}]({PLOT})" if self.caption else ""

    def draw(self, file: Path) -> None:
        """Write the plot, report.png; only called where there is a caption."""


R = TypeVar("R", bound=Report)


def record(output: Path, measure: Callable[[Path, StepProgress], R], progress: bool = True) -> R:
    """Measure, and write report.json, report.md and, if the report has a caption, report.png into a
    new folder.

    measure: gets a folder for its own files, which is removed at the end, and the progress bar.
    Raises BbtError when `output` exists, and what `measure` raises; then nothing is written.
    """
    with new_folder(output) as folder, StepProgress(progress) as tell:
        work = folder / "work"
        work.mkdir()
        report = measure(work, tell)
        shutil.rmtree(work)
        write_report(folder, report, report.markdown(), report.draw if report.caption else None)
    return report


def run_script(
    name: str,
    about: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace, Path, StepProgress], R],
    arguments: Sequence[str] | None = None,
) -> R:
    """Run the script `name` of this package: parse its options, record its report and print it.

    about: the script's docstring. measure: gets the options; `report` among them goes into its
    report. An error ends the process with one line and its exit code.
    """
    module = f"{__package__}.{name}"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=(about or "").partition("\n")[0]
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="new folder for the report"
    )
    add_options(parser)
    words = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(words)
    options = json.loads(json.dumps(vars(given), default=str))
    given.report = {"command": shlex.join(["python", "-m", module, *words]), "options": options}
    with exit_on_error():
        report = record(given.output, partial(measure, given))
        print_markdown(report.markdown())
    return report


def count(text: str) -> int:
    """An option that is an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def counts(text: str) -> list[int]:
    """A comma-separated option of integers of at least 1."""
    return list(map(count, names(text)))


def names(text: str) -> list[str]:
    """A comma-separated option of at least one name."""
    found = comma_separated(text)
    if not found:
        raise argparse.ArgumentTypeError("needs a value")
    return found


def page(*parts: str) -> str:
    """A Markdown page of those parts that are not empty."""
    return "\n\n".join(filter(None, parts)) + "\n"


def rows_table(rows: Sequence[Schema], columns: Columns, text_columns: int = 1) -> str:
    """A Markdown table of the rows' attributes; None is a dash."""
    values = [[(getattr(row, name), write) for name, write in columns.values()] for row in rows]
    cells = [["–" if value is None else write(value) for value, write in line] for line in values]
    return markdown_table(list(columns), cells, text_columns)


def written(value: object) -> str:
    return digits(value) if isinstance(value, float) else str(value)


def columns_legend(schema: type[Schema], columns: Columns) -> str:
    """A Markdown list that explains the columns which show fields of the schema."""
    fields = [(header, schema.model_fields.get(name)) for header, (name, _) in columns.items()]
    return "\n".join(
        f"- **{name}**: {' '.join((f.description or '').split())}"
        for name, f in fields
        if f is not None
    )
