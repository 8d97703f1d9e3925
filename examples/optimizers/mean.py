"""CMA-ES's mean on completed runs of BBT: would it have been the better prompt?

README.md has the commands.

A search follows from its seed and its losses, so replaying the losses of history.jsonl gives the
means without the model. Each is then scored on the dev rows where the search scored its best
candidate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bbt_accel import Objective, load_engine
from bbt_accel.benchmarks.compare_report import Score, gains, make_report, summary
from bbt_accel.benchmarks.steps import compared_rows
from bbt_accel.core.batch import Float32, Int64
from bbt_accel.core.logits import class_logits
from bbt_accel.engines.base import BoundBatch
from bbt_accel.errors import RunError
from bbt_accel.io.command import exit_on_error
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.reporting import write_report
from bbt_accel.search.history import fingerprint
from bbt_accel.search.loop import BestPrompt, better
from bbt_accel.search.methods import Cma, PromptSpace
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import labels
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import load_few_shot

CANDIDATE, MEAN = "best candidate", "best candidate or mean"


def contend(
    run: Run, data: Path, budgets: list[int], test_rows: int, threads: int | None
) -> Iterator[Score]:
    """The scores of a run's prompt at each budget, as it was chosen, and if the means had been
    candidates, too.
    """
    task, settings, bundle = run.task, run.info.settings, run.open_bundle()
    folder = data / task.name
    parts = [load_few_shot(task, folder, settings)[1], compared_rows(task, folder, test_rows)]
    best: dict[str, BestPrompt | None] = {CANDIDATE: None, MEAN: None}
    search, space, started = (
        Cma(settings, settings.seed),
        PromptSpace(bundle, settings),
        time.perf_counter(),
    )
    ends = {calls // settings.popsize - 1: calls for calls in budgets}
    with load_engine(bundle, run.info.engine.name, threads=threads) as engine:
        encoder = Encoder(bundle, task, run.info.demonstrations)
        dev, test = ((engine.bind(encoder.encode(rows)), labels(rows)) for rows in parts)

        def score(prompt: Float32, part: BoundBatch, targets: Int64) -> tuple[float, float]:
            logits = class_logits(part.label_logits(prompt[None]), encoder.classes)
            (loss,), (metric,) = Objective(settings.loss, task.metric).score(logits, targets)
            return float(loss), float(metric)

        def scored(prompt: Float32, generation: int) -> BestPrompt:
            loss, metric = score(prompt, *dev)
            return BestPrompt(prompt, generation, metric, loss)

        for known in run.history:
            points, number = search.ask(), known.generation
            if fingerprint(points) != known.candidates:
                raise RunError(
                    f"{run.path} cannot be replayed: CMA-ES asks for other candidates on this machine"
                )
            search.tell(points, np.array(known.losses))
            due, now = settings.scores_dev(number), dict(best)
            if due or number in ends:
                points = points[np.argmin(known.losses)], search.mean
                candidate, mean = (scored(space.prompt(0, z), number) for z in points)
                now[CANDIDATE] = better(best[CANDIDATE], candidate, by_loss=False)
                now[MEAN] = better(
                    better(best[MEAN], candidate, by_loss=False), mean, by_loss=False
                )
            best = (
                now if due else best
            )  # what is scored because a budget ends is not in the search of a larger one
            for name, chosen in now.items() if number in ends else ():
                assert chosen is not None
                yield Score(
                    contender=f"{name}, {ends[number]:,} calls", task=task.name, metric=task.metric,
                    seed=settings.seed, budget=None, calls=known.calls, score=score(chosen.prompt, *test)[1],
                    seconds=time.perf_counter() - started, peak_mib=None, chosen=None,
                )  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="the runs of a comparison")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of rows per task"
    )
    parser.add_argument(
        "--budgets",
        type=numbers,
        default="300,1000,4000",
        help="calls after which the prompts are tested",
    )
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("-o", "--output", type=Path, default=Path("mean"))
    given = parser.parse_args()
    scores = list[Score]()
    for folder in sorted(path.parent for path in given.runs.glob("*-bbt-*/run.json")):
        run = Run.read(folder)
        if run.info.readout.name == "verbalizer" and run.info.status == "done":
            scores += contend(run, given.data, given.budgets, given.test_rows, given.threads)
            print(
                folder.name,
                *(f"{score.contender}: {score.score:.3f}" for score in scores[-2:]),
                flush=True,
            )
    if not scores:
        parser.error(f"{given.runs} holds no complete run of BBT, TASK-bbt-SEED, of so many calls")
    facts, text = (
        {"machine": describe_machine()["cpu"]},
        ["# CMA's mean", summary(make_report(scores, {}, {}))],
    )
    for calls in given.budgets:
        pair = [score for score in scores if score.contender.endswith(f" {calls:,} calls")]
        text.append(gains(make_report(pair, {}, facts, reference=f"{MEAN}, {calls:,} calls")))
    given.output.mkdir(parents=True, exist_ok=True)
    write_report(given.output, make_report(scores, {}, facts), "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    with exit_on_error():
        main()
