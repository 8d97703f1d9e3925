"""What dividing a population among workers costs, and how it scales. Run on an idle machine.

python -m bbt_accel.benchmarks.scaling BUNDLE -o scaling

The dummy engine computes next to nothing: what remains of a generation is the way to the workers and back.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from pydantic import Field

from bbt_accel.batch import Float64
from bbt_accel.benchmarks.script import Report, Timed, run_script
from bbt_accel.benchmarks.steps import SEED, timed_rows
from bbt_accel.bundle import Bundle
from bbt_accel.encoding import Encoder
from bbt_accel.objective import Objective
from bbt_accel.progress import StepProgress
from bbt_accel.run import EngineRecord
from bbt_accel.settings import Settings, resolve
from bbt_accel.tasks import load_task
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.space import PromptSpace
from bbt_accel.tuning.workers import WorkersEvaluator


class ScalingPoint(Timed):
    """An engine, and where it ran. Times are per generation, without CMA-ES."""

    engine: str = Field(description="Its name; dummy computes next to nothing.")
    workers: int | None = Field(description="None for the process of the search itself.")
    threads: int = Field(description="CPU threads of that process, or of each worker.")
    start_s: float = Field(description="Seconds until the first generation: loading the engine, and Ray's processes.")
    speedup: float = Field(description="The first row's median of the same engine over this one.")
    overhead_ms: float | None = None
    """One worker with one thread only: its median minus that of the process of the search with one thread."""
    same: bool = Field(description="Whether every loss is that of the engine's first row, bit for bit.")


class ScalingReport(Report):
    """A population divided among workers."""

    n_rows: int = Field(description="N, rows of the train batch.")
    drift: float
    """Change of the first row's time when it was measured again at the end; ratios are not more precise than that."""
    rows: list[ScalingPoint] = Field(description="One per engine and place.")


def measure_scaling(given: argparse.Namespace, work: Path, tell: StepProgress) -> ScalingReport:
    """Time every engine in this process, in 1 … `workers` workers of one thread, and with as many threads here."""
    bundle, task = Bundle.read(given.bundle), load_task(given.task)
    sizes = {"popsize": given.popsize, "k_shot": given.k_shot, "seed": SEED}
    settings = resolve(task.preset(bundle.info.method), sizes)
    batch = Encoder(bundle, task).encode(timed_rows(task, given.data, given.k_shot))
    objective, most = Objective(settings.loss, task.metric), int(given.workers)
    places = [(None, 1), *((workers, 1) for workers in range(1, most + 1)), (None, most)]
    first: dict[str, tuple[float, Float64]] = {}

    def point(engine: str, workers: int | None, threads: int) -> ScalingPoint:
        tell(f"{engine}, {'here' if workers is None else f'{workers} workers'}, {threads} threads")
        record = EngineRecord(name=engine, device="cpu", threads=threads, without=[], url=None)
        job, started = Job(bundle, record, settings, objective, batch, batch), perf_counter()
        with job.evaluator() if workers is None else WorkersEvaluator(workers, "local", job) as evaluator:
            stds = evaluator.layer_stds() if bundle.info.method == "bbtv2" else None
            space, start_s = PromptSpace(bundle.info, settings, stds), perf_counter() - started
            ms, losses = generations(evaluator, space, settings, given.repeats)
        here = median(ms)
        alone, wanted = first.setdefault(engine, (here, losses))
        place = {"engine": engine, "workers": workers, "threads": threads, "start_s": start_s}
        found = ScalingPoint(**place, speedup=alone / here, same=np.array_equal(losses, wanted))
        found.set_times(ms)
        if (workers, threads) == (1, 1):
            found.overhead_ms = here - alone
        return found

    tell.expect(len(given.engines) * len(places) + 1)
    points = [point(engine, *place) for engine in given.engines for place in places]
    again = point(given.engines[0], None, 1)
    return ScalingReport(n_rows=len(batch), drift=1 / again.speedup - 1, rows=points, **given.report)


def generations(
    evaluator: Evaluator, space: PromptSpace, settings: Settings, repeats: int
) -> tuple[list[float], Float64]:
    """Milliseconds of each generation but the first, and the losses of all; in BBTv2 the layers take turns."""
    rng, layers = np.random.default_rng(SEED), len(space.stack) or 1
    ms, losses = [], []
    for number in range(repeats + 1):
        Z = settings.sigma * rng.standard_normal((settings.popsize, settings.intrinsic_dim))
        layer, start = number % layers, perf_counter()
        losses.append(evaluator.train(space, layer, Z)[0])
        ms.append(1000 * (perf_counter() - start))
        if len(space.stack):
            space.stack[layer] = space.prompt(layer, Z[0])
    return ms[1:], np.stack(losses)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--engines", nargs="+", default=["dummy", "ort"])
    parser.add_argument("--workers", type=int, default=2, help="the largest number of workers")
    parser.add_argument("--popsize", type=int, default=20, help="candidates per generation")
    parser.add_argument("--k-shot", type=int, default=16, help="examples per class")
    parser.add_argument("--repeats", type=int, default=20, help="timed generations per row")


if __name__ == "__main__":
    run_script("scaling", __doc__, add_options, measure_scaling)
