"""What a process of the benchmark does: export, optimize, measure the machine, time, compare, tune; and a sweep's.

Arguments and results are JSON; arrays travel as files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.benchmarks.accuracy import row_logits
from bbt_accel.benchmarks.gpu_steps import GPU_STEPS
from bbt_accel.benchmarks.machine import matrix_rates, peak_mib
from bbt_accel.benchmarks.timing import clock_of, count_flops, random_prompts, seconds_per_candidate
from bbt_accel.benchmarks.workload import load_batch
from bbt_accel.engines.registry import load_engine
from bbt_accel.run import Run

Engine = dict[str, Any]
"""Arguments of `load_engine`: bundle, name, device, threads, without."""


def export(**arguments: Any) -> None:
    from bbt_accel.exporters.export import export_bundle

    export_bundle(**arguments)


def optimize(data: str | None, **arguments: Any) -> None:
    from bbt_accel.exporters.optimize import optimize_bundle

    optimize_bundle(data=None if data is None else Path(data), **arguments)


def measure(engine: Engine, batch: str, popsize: int, repeats: int, seed: int, flops: bool) -> dict[str, Any]:
    """Time a population. flops: count the operations of one candidate too, which the eager engine alone can."""
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        prompts = random_prompts(loaded.bundle.info, popsize, seed)
        clock = clock_of(engine["name"], engine["device"])
        seconds = seconds_per_candidate(bound, prompts, repeats, clock)
        return {
            "seconds": seconds,
            "peak_mib": peak_mib(),
            "versions": loaded.versions(),
            "flops": count_flops(bound, prompts[:1]) if flops else None,
        }


def compare(engine: Engine, batch: str, prompt: str, logits: str) -> None:
    """Label logits (N, C) of the batch in `batch` for the prompt in `prompt`, both files, into the file `logits`."""
    with load_engine(**engine) as loaded:
        np.save(logits, row_logits(loaded, load_batch(batch), np.load(prompt)))


def tune(engine: Engine, run: str, prompt: str, batch: str, logits: str, **arguments: Any) -> dict[str, Any]:
    """A whole tuning run into the folder `run`; its prompt, and its logits on `batch`, into files.

    Returns the seconds that the search took and the candidates that it evaluated.
    """
    from bbt_accel.tuning import tune as tune_prompt

    options = {("engine" if name == "name" else name): value for name, value in engine.items()}
    tune_prompt(output=run, progress=False, **options, **arguments)
    done = Run.read(run)
    np.save(prompt, done.prompt)
    compare(engine, batch, prompt, logits)
    return {"seconds": done.info.seconds, "calls": done.info.calls}


def trial(**arguments: Any) -> dict[str, Any]:
    """A trial of a sweep."""
    from bbt_accel.sweeps.trial import run_trial

    return run_trial(**arguments)


STEPS: dict[str, Callable[..., Any]] = {
    "export": export,
    "optimize": optimize,
    "rates": matrix_rates,
    "measure": measure,
    "compare": compare,
    "tune": tune,
    "trial": trial,
    **GPU_STEPS,
}
