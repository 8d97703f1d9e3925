"""How far one contender is ahead of another, from the scores in one or more reports of `bbt-accel
compare`.

python -m bbt_accel.benchmarks.differences "auto 64" "bbt 4000" compare-four-tasks compare-budgets
python -m bbt_accel.benchmarks.differences "auto 300" lora compare-gradients --within-seconds

The reports must be comparable, as for `benchmarks.combine`. Where several have a contender with the
same task and seed, the first counts.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bbt_accel.benchmarks.combine import combine, read_reports
from bbt_accel.benchmarks.compare_report import PAIRS, Pair, Score, interval, paired, points
from bbt_accel.errors import DataError, check_known
from bbt_accel.io.command import exit_on_error, print_markdown
from bbt_accel.io.reporting import markdown_table


def by_pair(scores: Sequence[Score], label: str) -> dict[Pair, Score]:
    """The scores of a contender, with its budget if it has one ("auto 64"), by task and seed."""
    found = {score.pair: score for score in scores if plain(score.label) == plain(label)}
    if not found:
        check_known(
            "contender", plain(label), dict.fromkeys(plain(score.label) for score in scores)
        )
    return found


def plain(label: str) -> str:
    """A label as it is typed, without separators of thousands. Those of an ensemble have a comma
    and a space.
    """
    return re.sub(r",(?=\d{3})", "", label)


def within_seconds(
    scores: Sequence[Score], contender: str, limits: Mapping[Pair, Score]
) -> dict[Pair, Score]:
    """A contender's last score, of any budget, that took no longer than that in `limits`, by task
    and seed.
    """
    check_known("contender", contender, dict.fromkeys(score.contender for score in scores))
    found = dict[Pair, Score]()
    for score in sorted(scores, key=lambda score: score.seconds):
        if (
            score.contender == contender
            and score.pair in limits
            and score.seconds <= limits[score.pair].seconds
        ):
            found[score.pair] = score
    return found


def table(own: Mapping[Pair, Score], other: Mapping[Pair, Score]) -> str:
    """A Markdown table of the differences on each task and on all. Raises DataError where no task
    and seed has both.
    """
    pairs = paired(own, other)
    if not pairs:
        raise DataError("no task and seed has a score of both contenders; give further reports")
    lines = []
    for task in [*dict.fromkeys(task for task, _ in pairs), None]:
        some = {pair: value for pair, value in pairs.items() if task in (None, pair[0])}
        ahead = f"{sum(value > 0 for value in some.values())} of {len(some)}"
        lines.append([task or "all", *points(*interval(some)), ahead])
    return markdown_table(["task", "mean", "95 % interval", "ahead"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.differences", description=about)
    parser.add_argument("contender", help='with its budget, if it has one: "auto 64"')
    parser.add_argument("other", help="likewise; without a budget if --within-seconds is given")
    parser.add_argument(
        "reports", type=Path, nargs="+", help="folders that bbt-accel compare wrote"
    )
    parser.add_argument(
        "--within-seconds",
        action="store_true",
        help="the other's last score within the seconds of the first",
    )
    given = parser.parse_args(arguments)
    with exit_on_error():
        scores = combine(read_reports(given.reports)).scores
        own = by_pair(scores, given.contender)
        other = (
            within_seconds(scores, given.other, own)
            if given.within_seconds
            else by_pair(scores, given.other)
        )
        title = f"# {given.contender} minus {given.other}"
        legend = PAIRS
        if missing := len(own) - len(own.keys() & other.keys()):
            legend += f" {missing} of {len(own)} scores of {given.contender} have no counterpart and are left out."
        print_markdown(f"{title}\n\n{table(own, other)}\n\n{legend}")


if __name__ == "__main__":
    main()
