"""How far one contender is ahead of another, from the scores in one or more reports of `bbt-accel compare`.

python -m bbt_accel.benchmarks.differences "auto 64" "bbt 4000" compare-four-tasks compare-budgets
python -m bbt_accel.benchmarks.differences "auto 300" lora compare-gradients --within-seconds

All reports must have the same test rows. Where several have a contender with the same task and seed, the first counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bbt_accel.benchmarks.compare_report import CompareReport, Pair, Score, interval
from bbt_accel.command import exit_on_error, print_markdown
from bbt_accel.errors import DataError, check_known, translated
from bbt_accel.reporting import JSON, markdown_table


def read_scores(folders: Iterable[Path]) -> list[Score]:
    """The scores of reports, in their order. Raises DataError for a file that is no such report, OSError for none."""
    scores = list[Score]()
    for folder in folders:
        file = folder / JSON
        with translated(DataError, f"{file} is not a report of bbt-accel compare"):
            scores += CompareReport.model_validate_json(file.read_bytes()).scores
    return scores


def by_pair(scores: Iterable[Score], label: str) -> dict[Pair, Score]:
    """The scores of a contender, with its budget if it has one ("auto 64"), by task and seed."""
    scores = list(scores)
    labels = {score.label.replace(",", ""): score.label for score in scores}
    check_known("contender", label.replace(",", ""), labels)
    found = dict[Pair, Score]()
    for score in scores:
        if score.label == labels[label.replace(",", "")]:
            found.setdefault(score.pair, score)
    return found


def within_seconds(scores: Iterable[Score], contender: str, limits: Mapping[Pair, Score]) -> dict[Pair, Score]:
    """A contender's last score, of any budget, that took no longer than that in `limits`, by task and seed."""
    scores = list(scores)
    check_known("contender", contender, {score.contender for score in scores})
    found = dict[Pair, Score]()
    for score in sorted(scores, key=lambda score: score.seconds):
        if score.contender == contender and score.pair in limits and score.seconds <= limits[score.pair].seconds:
            found[score.pair] = score
    return found


def table(own: Mapping[Pair, Score], other: Mapping[Pair, Score]) -> str:
    """A Markdown table of the differences on each task and on all. Raises DataError where no task and seed has both."""
    pairs = {pair: own[pair].score - other[pair].score for pair in own if pair in other}
    if not pairs:
        raise DataError("no task and seed has a score of both contenders; give further reports")
    lines = []
    for task in [*dict.fromkeys(task for task, _ in pairs), None]:
        values = [pairs[pair] for pair in sorted(pairs) if task in (None, pair[0])]
        mean, low, high = (f"{100 * value:+.1f}" for value in interval(values))
        ahead = f"{sum(value > 0 for value in values)} of {len(values)}"
        lines.append([task or "all", mean, f"{low} to {high}", ahead])
    return markdown_table(["task", "mean", "95 % interval", "ahead"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.differences", description=about)
    parser.add_argument("contender", help='with its budget, if it has one: "auto 64"')
    parser.add_argument("other", help="likewise; without a budget if --within-seconds is given")
    parser.add_argument("reports", type=Path, nargs="+", help="folders that bbt-accel compare wrote")
    parser.add_argument(
        "--within-seconds", action="store_true", help="the other's last score within the seconds of the first"
    )
    given = parser.parse_args(arguments)
    with exit_on_error():
        scores = read_scores(given.reports)
        own = by_pair(scores, given.contender)
        other = within_seconds(scores, given.other, own) if given.within_seconds else by_pair(scores, given.other)
        title = f"# {given.contender} minus {given.other}"
        print_markdown(f"{title}\n\n{table(own, other)}\n\nPoints, over pairs of the same task and seed.")


if __name__ == "__main__":
    main()
