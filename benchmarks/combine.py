"""One report of several: the contenders of all of them in one table and one plot.

python -m bbt_accel.benchmarks.combine compare-four-tasks compare-budgets -o accuracy

All reports must have the same backbone, examples per class, engine, precision and test rows. Where
several have a contender with the same task and seed, the first counts.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from bbt_accel.benchmarks.compare_report import (
    CompareReport,
    Pair,
    Score,
    draw,
    make_report,
    markdown,
)
from bbt_accel.benchmarks.options import DECISIVE, CompareOptions
from bbt_accel.errors import DataError, translated
from bbt_accel.io.command import exit_on_error, print_markdown
from bbt_accel.io.files import new_folder
from bbt_accel.io.reporting import JSON, TABLE, now, write_report

SHARED = tuple(name for name in DECISIVE if name != "test_rows")
"""Options that must be the same in all reports; their test rows are compared themselves."""


def read_reports(folders: Iterable[Path]) -> dict[str, CompareReport]:
    """Folder → its report.

    Raises OSError, and DataError for a file of another kind, for other test rows, and for others of
    `SHARED`.
    """
    reports, rows, shared = dict[str, CompareReport](), dict[str, str](), dict[str, str]()
    for folder in folders:
        file = folder / JSON
        with translated(DataError, f"{file} is not a report of bbt-accel compare"):
            reports[str(folder)] = found = CompareReport.model_validate_json(file.read_bytes())
        for option, value in given(found).items():
            if shared.setdefault(option, value) != value:
                problem = f"{folder} was measured with {option} {value}, the reports before it with {shared[option]}"
                raise DataError(f"{problem}; combine reports of one setting")
        for score in found.scores:
            if score.test_rows and rows.setdefault(score.task, score.test_rows) != score.test_rows:
                raise DataError(
                    f"{folder} has other test rows of {score.task} than the reports before it"
                )
    return reports


def given(report: CompareReport) -> dict[str, str]:
    """The options of `SHARED` by which a report was made, from its command; none if it is not of
    one command.
    """
    words = shlex.split(report.facts.get("command", ""))
    if not words:
        return {}
    found = dict(pairwise(words))
    defaults = {
        f"--{name.replace('_', '-')}": CompareOptions.model_fields[name].default for name in SHARED
    }
    return {option: found.get(option, str(default)) for option, default in defaults.items()}


def combine(reports: dict[str, CompareReport]) -> CompareReport:
    """All scores, of equal trials the first, and what was run for each report; without its
    failures.
    """
    scores = dict[tuple[str, Pair], Score]()
    for report in reports.values():
        for score in report.scores:
            scores.setdefault((score.label, score.pair), score)
    facts = {name: ", ".join(report.facts.values()) for name, report in reports.items()}
    if len(machines := {report.facts.get("machine") for report in reports.values()}) > 1:
        facts["seconds"] = (
            f"on {len(machines)} kinds of processors, so to be compared within one report only"
        )
    return make_report(list(scores.values()), {}, facts | {"date": now()}, reference=None)


def combined_again(folder: Path) -> CompareReport:
    """What a combined report says, from the reports that it lists, which are folders beside it."""
    listed = re.findall(
        r"^- \*\*(.+?):\*\* bbt-accel compare", (folder / TABLE).read_text(encoding="utf-8"), re.M
    )
    return combine(read_reports(folder.parent / name for name in listed))


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.combine", description=about)
    parser.add_argument(
        "reports", type=Path, nargs="+", help="folders that bbt-accel compare wrote"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="new folder for the report"
    )
    given = parser.parse_args(arguments)
    with exit_on_error():
        report = combine(read_reports(given.reports))
        with new_folder(given.output) as folder:
            write_report(folder, report, markdown(report), partial(draw, report=report))
        print_markdown(markdown(report))


if __name__ == "__main__":
    main()
