"""What dividing a population among workers costs, and how it scales. Run on an idle machine.

python -m bbt_accel.benchmarks.scaling BUNDLE -o scaling

The dummy engine computes next to nothing: what remains of a generation is the way to the workers
and back.
"""

from __future__ import annotations

import argparse
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter

from pydantic import Field

from bbt_accel.benchmarks.script import Report, Timed, count, names, run_script
from bbt_accel.benchmarks.steps import SEED
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import DEFAULTS
from bbt_accel.io.progress import StepProgress
from bbt_accel.search.tune import tune


class ScalingPoint(Timed):
    """A search with an engine, and where it ran. Times are per generation, without CMA-ES's
    update.
    """

    engine: str = Field(description="Its name; dummy computes next to nothing.")
    workers: int | None = Field(description="None for the process of the search itself.")
    threads: int = Field(description="CPU threads of that process, or of each worker.")
    start_s: float = Field(
        description="Seconds outside the generations: rows, engine, Ray with its processes."
    )
    speedup: float = Field(description="The median of the engine's first row over this one's.")
    overhead_ms: float | None = None
    """One worker with one thread only: its median minus that of the process of the search with one
    thread.
    """
    same: bool = Field(
        description="Whether every loss is that of the engine's first row, bit for bit."
    )


class ScalingReport(Report):
    """A population divided among workers."""

    drift: float
    """Change of the first row's time when it was measured again at the end; ratios are not more
    precise than that.
    """
    rows: list[ScalingPoint] = Field(description="One per engine and place.")


def measure_scaling(given: argparse.Namespace, work: Path, tell: StepProgress) -> ScalingReport:
    """Search with every engine here, in 1 … `workers` workers of one thread each, and here with as
    many threads.
    """
    info, most = Bundle.read(given.bundle).info, int(given.workers)
    layers = info.searched_layers
    calls = given.popsize * layers * ceil((given.repeats + 1) / layers)
    asked = {
        "popsize": given.popsize,
        "k_shot": given.k_shot,
        "budget": calls,
        "eval_every": calls,
        "seed": SEED,
    }
    shared = {
        "data": given.data,
        "settings": asked,
        "preset": "paper",
        "overwrite": True,
        "output": work / "run",
        "progress": False,
    }
    places = [(None, 1), *((workers, 1) for workers in range(1, most + 1)), (None, most)]
    first: dict[str, tuple[float, list[list[float]]]] = {}

    def point(engine: str, workers: int | None, threads: int) -> ScalingPoint:
        tell(f"{engine}, {'here' if workers is None else f'{workers} workers'}, {threads} threads")
        started = perf_counter()
        run = tune(
            given.bundle, given.task, engine=engine, workers=workers, threads=threads, **shared
        )
        seconds, history = perf_counter() - started, run.history
        ms = [1000 * given.popsize / generation.calls_per_second for generation in history[1:]]
        here, losses = median(ms), [generation.losses for generation in history]
        alone, wanted = first.setdefault(engine, (here, losses))
        found = ScalingPoint(
            engine=engine,
            workers=workers,
            threads=threads,
            start_s=seconds - sum(generation.seconds for generation in history),
            speedup=alone / here,
            overhead_ms=here - alone if (workers, threads) == (1, 1) else None,
            same=losses == wanted,
        )
        found.set_times(ms)
        return found

    tell.expect(len(given.engines) * len(places) + 1)
    points = [point(engine, *place) for engine in given.engines for place in places]
    again = point(given.engines[0], None, 1)
    return ScalingReport(drift=1 / again.speedup - 1, rows=points, **given.report)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--engines", type=names, default=["dummy", "ort"])
    parser.add_argument("--workers", type=count, default=2, help="the largest number of workers")
    parser.add_argument(
        "--popsize", type=count, default=DEFAULTS.popsize, help="candidates per generation"
    )
    parser.add_argument("--k-shot", type=count, default=DEFAULTS.k_shot, help="examples per class")
    parser.add_argument("--repeats", type=count, default=20, help="timed generations per row")


if __name__ == "__main__":
    run_script("scaling", __doc__, add_options, measure_scaling)
