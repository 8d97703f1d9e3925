"""Score every prompt of a sweep in each of the sweep's bundles: what a lower precision costs, apart from the search.

python -m bbt_accel.benchmarks.crossing SWEEP -o report

Two searches in two precisions part after a few generations and end at different prompts, so their scores differ by
chance too. The same prompt in two precisions does not.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from rich.console import Console
from rich.progress import track

from bbt_accel.batch import Float32, Int64
from bbt_accel.benchmarks.accuracy import score
from bbt_accel.benchmarks.report import Part
from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called, one_line
from bbt_accel.data import load_rows
from bbt_accel.display import markdown_table
from bbt_accel.encoding import Encoder
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import RunError
from bbt_accel.inference import label_logits
from bbt_accel.run import Run
from bbt_accel.sweeps import SWEEP, TRIALS
from bbt_accel.sweeps.plan import Trial, read_sweep
from bbt_accel.sweeps.trial import RUN, read_result


class Scores(Part):
    """Prompts that were searched in one bundle, scored in one bundle."""

    task: str
    """Its name."""
    engine: str
    """Of the searches and of the scores."""
    searched: str
    """Name of the bundle that the prompts were searched in."""
    scored: str
    """Name of the bundle that they are scored in."""
    seeds: list[int]
    """Of the searches."""
    scores: list[float]
    """On the test rows, in the order of the seeds."""


class Agreement(Part):
    """How often two bundles predict the same class with the same prompt."""

    task: str
    """Its name."""
    engine: str
    """Of both."""
    searched: str
    """Name of the bundle that the prompts were searched in."""
    bundles: tuple[str, str]
    """Their names."""
    agreement: float
    """Share of the test rows, mean over the prompts."""


class Crossing(Part):
    """report.json."""

    command: str
    """That made it."""
    settings: dict[str, float | int | str]
    """Of the searches, apart from the task's presets."""
    test_rows: dict[str, int]
    """By task."""
    scores: list[Scores]
    """Every pair of bundles."""
    agreements: list[Agreement]
    """Every two bundles."""


def cross(sweep: Path, threads: int | None, command: str) -> Crossing:
    """Raises RunError where no trial of the sweep is done; whatever reading the sweep and loading bundles raise."""
    plan = read_sweep(sweep / SWEEP, {})
    done = [t for t in plan.trials() if read_result(t, sweep / TRIALS / t.name) is not None]
    if not done:
        raise RunError(f"no trial of {sweep} is done; bbt-accel sweep --resume -o {sweep}")
    report = Crossing(command=command, settings=plan.settings, test_rows={}, scores=[], agreements=[])
    groups: dict[object, list[Trial]] = defaultdict(list)
    for trial in done:
        groups[kind(trial)].append(trial)
    console = Console(stderr=True)
    for trials in track(list(groups.values()), "scoring", console=console, disable=not console.is_terminal):
        add(report, sweep, trials, threads)
    return report


def kind(trial: Trial) -> object:
    """The same for trials whose prompts can be exchanged."""
    info = Bundle.read(trial.bundle, verify=False).info
    return trial.task, trial.engine, info.backbone, info.revision, info.method, info.prompt_mode, info.n_prompt_tokens


def add(report: Crossing, sweep: Path, trials: list[Trial], threads: int | None) -> None:
    """The scores and agreements of trials of one kind."""
    runs = [Run.read(sweep / TRIALS / trial.name / RUN) for trial in trials]
    task, first = runs[0].task, trials[0]
    rows = load_rows(task, "test", None if first.data is None else Path(first.data))
    targets: Int64 = np.array([row.label for row in rows], np.int64)
    found: dict[str, Float32] = {}
    for bundle in dict.fromkeys(trial.bundle for trial in trials):
        with load_engine(bundle, first.engine, device=first.device, threads=threads) as engine:
            prompts = [run.prompt for run in runs]
            found[Path(bundle).name] = label_logits(engine, Encoder(engine.bundle, task), rows, prompts)
    report.test_rows[task.name] = len(rows)
    for searched in dict.fromkeys(trial.bundle_name for trial in trials):
        some = [i for i, trial in enumerate(trials) if trial.bundle_name == searched]
        where = {"task": task.name, "engine": first.engine, "searched": searched}
        for scored, logits in found.items():
            scores = [score(logits[i], targets, task.metric) for i in some]
            seeds = [trials[i].seed for i in some]
            report.scores.append(Scores(**where, scored=scored, seeds=seeds, scores=scores))
        for one, other in combinations(found, 2):
            same = found[one][some].argmax(2) == found[other][some].argmax(2)
            report.agreements.append(Agreement(**where, bundles=(one, other), agreement=float(same.mean())))


def markdown(report: Crossing) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items()) or "the tasks' presets"
    rows = ", ".join(f"{count:,} of {task}" for task, count in report.test_rows.items())
    parts = [
        "# The prompts of a sweep in each of its bundles",
        f"Searches: {settings}. Test rows: {rows}. `{report.command}`",
        markdown_table(["task", "engine", "searched in", "scored in", "seeds", "score"], lines(report), 4),
        "Percent, mean over the seeds and (standard deviation, n − 1).",
        *(
            f"{a.bundles[0]} and {a.bundles[1]} predict the same class for {a.agreement:.2%} of the test rows "
            f"({a.task}, {a.engine}, prompts searched in {a.searched})."
            for a in report.agreements
        ),
    ]
    return "\n\n".join(parts) + "\n"


def lines(report: Crossing) -> Iterator[list[str]]:
    for s in report.scores:
        spread = f" ({100 * stdev(s.scores):.2f})" if len(s.scores) > 1 else ""
        yield [s.task, s.engine, s.searched, s.scored, str(len(s.seeds)), f"{100 * fmean(s.scores):.2f}{spread}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="crossing", description="Score a sweep's prompts in each of its bundles.")
    parser.add_argument("sweep", type=Path, help="the folder of a sweep")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the report's folder")
    parser.add_argument("--threads", type=int, help="CPU threads, all cores unless given")
    given = parser.parse_args()
    command = called("crossing")
    with one_line(), new_folder(given.output) as folder:
        report = cross(given.sweep, given.threads, command)
        (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
