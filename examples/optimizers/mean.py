"""Would CMA's mean have been the better prompt? Asked of runs of BBT that are complete.

    bbt-accel compare agnews sst2 --data DIR --contenders bbt --budgets 300,1000,4000 -o runs
    python mean.py --runs runs/runs --budgets 300,1000,4000 --data DIR -o mean

A search follows from its seed and its losses, so the means are had by telling CMA-ES the losses of history.jsonl again,
without the model. Each is then scored on the dev rows where the search scored its best candidate.
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
from bbt_accel.data import labels, load_few_shot
from bbt_accel.encoding import Encoder
from bbt_accel.machine import describe_machine
from bbt_accel.reporting import write_report
from bbt_accel.run import Run
from bbt_accel.tuning.methods import Cma, PromptSpace
from bbt_accel.tuning.search import BestPrompt, better

CANDIDATE, MEAN = "best candidate", "best candidate or mean"


def contend(run: Run, data: Path, budgets: list[int], test_rows: int, threads: int | None) -> Iterator[Score]:
    """The scores of a run's prompt at each budget, as it was chosen, and if the means had been candidates, too."""
    task, settings, bundle = run.task, run.info.settings, run.open_bundle()
    folder = None if task.name == "demo" else data / task.name
    parts = [load_few_shot(task, folder, settings)[1], compared_rows(task, folder, test_rows)]
    best: dict[str, BestPrompt | None] = {CANDIDATE: None, MEAN: None}
    search, space, started = Cma(settings, settings.seed), PromptSpace(bundle, settings), time.perf_counter()
    with load_engine(bundle, run.info.engine.name, threads=threads) as engine:
        encoder, objective = Encoder(bundle, task), Objective("ce", task.metric)
        dev, test = ((engine.bind(encoder.encode(rows)), labels(rows)) for rows in parts)
        for known in run.history:
            points = search.ask()
            search.tell(points, np.array(known.losses))
            if known.dev_score is not None and known.dev_loss is not None:
                prompt, mean = (space.prompt(0, z) for z in (points[np.argmin(known.losses)], search.mean))
                found = BestPrompt(prompt, known.generation, known.dev_score, known.dev_loss)
                (loss,), (score,) = objective.score(dev[0].label_logits(mean[None]), dev[1])
                best = {name: better(before, found, by_loss=False) for name, before in best.items()}
                best[MEAN] = better(best[MEAN], BestPrompt(mean, known.generation, score, loss), by_loss=False)
            for name, chosen in best.items() if known.calls in budgets else ():
                assert chosen is not None, f"{run.path} has no dev score after {known.calls} calls or fewer"
                logits = test[0].label_logits(chosen.prompt[None])
                yield Score(
                    contender=f"{name}, {known.calls:,} calls", task=task.name, metric=task.metric, seed=settings.seed,
                    budget=None, calls=known.calls, score=objective.score(logits, test[1])[1][0],
                    seconds=time.perf_counter() - started, peak_mib=None, chosen=None,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs of BBT with --preset paper's readout")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder of rows per task")
    parser.add_argument("--budgets", default="300,1000,4000", help="calls after which the prompts are tested")
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("-o", "--output", type=Path, default=Path("mean"))
    given = parser.parse_args()
    budgets, scores = [int(calls) for calls in given.budgets.split(",")], list[Score]()
    for folder in sorted(path.parent for path in given.runs.glob("*/run.json")):
        run = Run.read(folder)
        if run.info.readout.name == "verbalizer" and run.info.bundle.method == "bbt":
            scores += contend(run, given.data, budgets, given.test_rows, given.threads)
            print(folder.name, *(f"{score.contender}: {score.score:.3f}" for score in scores[-2:]), flush=True)
    facts, text = {"machine": describe_machine()["cpu"]}, ["# CMA's mean", summary(make_report(scores, {}, {}))]
    for calls in budgets:
        pair = [score for score in scores if score.calls == calls]
        text.append(gains(make_report(pair, {}, facts, reference=f"{MEAN}, {calls:,} calls")))
    given.output.mkdir(parents=True, exist_ok=True)
    write_report(given.output, make_report(scores, {}, facts), "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
