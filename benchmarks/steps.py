"""What a benchmark's processes do: export, optimize, time, compare, search. Large arrays are
files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bbt_accel.core.batch import Batch, Float32, Float64
from bbt_accel.core.bundle import BundleInfo
from bbt_accel.core.engine_specs import EngineSpec, kind_of
from bbt_accel.core.optimizations import in_graph
from bbt_accel.core.settings import resolve
from bbt_accel.engines.base import BoundBatch
from bbt_accel.engines.registry import load_engine
from bbt_accel.engines.staged import StagedBoundBatch
from bbt_accel.errors import DataError
from bbt_accel.io import processes
from bbt_accel.search.calibration import calibrate_on
from bbt_accel.search.methods import PromptSpace
from bbt_accel.tasks.data import Row, load_rows
from bbt_accel.tasks.splits import few_shot
from bbt_accel.tasks.task import Task

SEED = 42  # of the timed and compared rows, of the random prompts and of the first search
ROWS = 64  # test rows per call
WARM_UP = {
    "cpu": 1,
    "cuda": 2,
}  # generations before the timed ones: they make buffers and kernels, then CUDA graphs
LoadArguments = dict[str, Any]  # arguments of `load_engine`: bundle, name, device, threads, without


def export(**arguments: Any) -> None:
    from bbt_accel.exporters.trace.export import export_bundle

    export_bundle(**arguments)


def optimize(calibrate: str | None = None, data: str | None = None, **arguments: Any) -> None:
    from bbt_accel.exporters.convert.optimize import optimize_bundle

    rows = calibrate_on(calibrate, None if data is None else Path(data))
    optimize_bundle(calibration=rows, **arguments)


def measure(
    engine: LoadArguments, batch: str, popsize: int, repeats: int, flops: bool = False
) -> dict[str, Any]:
    """Time generations of candidates, after some to warm up. flops: count the operations of a
    candidate too.
    """
    warm_up = WARM_UP[kind_of(engine["device"])]
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        evaluate = generation(bound, popsize)
        milliseconds(evaluate, warm_up)
        before = loaded.counts()
        ms = milliseconds(evaluate, repeats)
        done = {name: value - before[name] for name, value in loaded.counts().items()}
        return {
            "ms": ms,
            "peak_mib": peak_mib(),
            "versions": loaded.versions(),
            "flops": count_flops(evaluate) if flops else None,
            "graph_share": done["launched"] / done["calls"] if done else None,
            "call_overhead": call_overhead(bound, popsize, ms, warm_up),
        }


def call_overhead(bound: BoundBatch, popsize: int, ms: list[float], warm_up: int) -> float | None:
    """What a call costs beyond its tokens, as a number of tokens: from a population of half the
    size.

    t = (calls · overhead + tokens) · slope, for both. None for an engine whose calls cost nothing
    extra, and where that
    cannot be told: the calls grow as the tokens do, or the smaller population takes as long.
    """
    if not (isinstance(bound, StagedBoundBatch) and bound.engine.call_overhead and popsize > 1):
        return None
    half = popsize // 2
    evaluate = generation(bound, half)
    milliseconds(evaluate, warm_up)
    whole_ms, half_ms = popsize * median(ms), half * median(milliseconds(evaluate, len(ms)))
    tokens = sum(len(bucket.rows) * bucket.length for bucket in bound.buckets)
    whole_calls, half_calls = (
        sum(len([*bound.chunks(size, b)]) for b in bound.buckets) for size in (popsize, half)
    )
    own = half_calls * popsize - whole_calls * half
    call_ms = (half_ms * popsize - whole_ms * half) / own if own else math.nan
    slope = (whole_ms - whole_calls * call_ms) / (popsize * tokens)
    return call_ms / slope if slope > 0 else None


def compare(engine: LoadArguments, batch: str, prompt: str) -> list[list[float]]:
    """Label logits (N, C) of the batch for the prompt, both files; a few rows at a time."""
    rows, found = load_batch(batch), []
    with load_engine(**engine) as loaded:
        for start in range(0, len(rows), ROWS):
            with loaded.bind(rows.rows(slice(start, start + ROWS))) as bound:
                found += bound.label_logits(np.load(prompt)[None])[0].tolist()
    return found


def search(engine: LoadArguments, run: str, **arguments: Any) -> dict[str, Any]:
    """A whole search into the folder `run`: its seconds and calls; the prompt goes into
    prompt.npy there.
    """
    from bbt_accel.search.tune import tune

    options = {("engine" if name == "name" else name): value for name, value in engine.items()}
    done = tune(output=run, progress=False, **options, **arguments)
    np.save(Path(run) / "prompt.npy", done.prompt)
    return {"seconds": done.info.seconds, "calls": done.info.calls}


class Bundles:
    """The bundles of a backbone in the folder `work`, each made when it is first needed.

    exporting, optimizing: further arguments of `export_bundle` and `optimize_bundle`.
    """

    def __init__(
        self, work: Path, backbone: str | Path, exporting: dict[str, Any], **optimizing: Any
    ) -> None:
        self.work, self.exporting, self.optimizing = (
            work,
            {"backbone": backbone, **exporting},
            optimizing,
        )

    def exported(self, without: Sequence[str] = ()) -> Path:
        """The exported bundle whose graphs have these optimizations switched off. Raises
        BbtError.
        """
        return self._make(["exported", *without], export, without=without, **self.exporting)

    def bundle(self, spec: EngineSpec, precision: str, without: Sequence[str] = ()) -> Path:
        """The bundle that an engine reads at a precision. Raises BbtError."""
        off, target = in_graph(without), spec.target(precision)
        if target == "onnx":
            return self.exported(off)
        wanted = {"target": target, "precision": precision}
        return self._make(
            [*wanted.values(), *off],
            optimize,
            source=self.exported(off),
            **wanted,
            **self.optimizing,
        )

    def _make(self, words: Sequence[str], step: Callable[..., None], **arguments: Any) -> Path:
        path = self.work / "-".join(words)
        if not path.exists():
            processes.call(step, output=path, **arguments)
        return path


def timed_rows(task: Task, data: Path | None, k_shot: int, count: int | None = None) -> list[Row]:
    """The few-shot train rows, k per class; or `count` rows drawn from the train split. Raises
    DataError.
    """
    rows = load_rows(task, "train", data)
    return few_shot(rows, task.n_classes, k_shot, SEED)[0] if count is None else _draw(rows, count)


def compared_rows(task: Task, data: Path | None, most: int) -> list[Row]:
    """The test rows, or a random `most` of them where there are more. Raises DataError."""
    if data is not None and data.is_file():
        raise DataError(
            f"{data} has no test rows; give a folder with a file for train and for test"
        )
    rows = load_rows(task, "test", data)
    return _draw(rows, min(most, len(rows)))


def _draw(rows: list[Row], count: int) -> list[Row]:
    if count > len(rows):
        raise DataError(f"--rows {count} is more than the {len(rows)} rows of the train split")
    return [rows[i] for i in np.random.default_rng(SEED).permutation(len(rows))[:count]]


def save_batch(file: Path, batch: Batch) -> None:
    np.savez(file, **batch.arrays())  # type: ignore[arg-type]


def load_batch(file: str | Path) -> Batch:
    with np.load(file) as arrays:
        return Batch(**arrays)


def random_prompts(info: BundleInfo, count: int, seed: int) -> Float32:
    """float32 (count, n, H) or (count, L, n, H), entries N(0, σ_e²): what a first generation with α
    = 1 looks like.
    """
    prompts = np.random.default_rng(seed).standard_normal(
        (count, *info.prompt_shape), dtype=np.float32
    )
    return np.asarray(prompts * np.float32(info.word_embedding_std), np.float32)


def search_space(bound: BoundBatch, popsize: int) -> tuple[PromptSpace, Float64]:
    """The space of a search, the same in every process, and candidates for each of its layers, (L
    or 1, P, d).
    """
    info, settings = bound.bundle.info, resolve()
    layers, deep = info.searched_layers, info.method == "bbtv2"
    space = PromptSpace(
        bound.bundle,
        settings,
        np.full(layers, info.word_embedding_std, np.float32) if deep else None,
    )
    return space, np.random.default_rng(0).standard_normal(
        (layers, popsize, settings.intrinsic_dim)
    )


def generation(bound: BoundBatch, popsize: int) -> Callable[[], int]:
    """What a search needs from an engine between two CMA-ES updates, from z to the statistics;
    returns the candidates.

    For bbtv2 a generation of every layer, which then keeps its first candidate.
    """
    space, Z = search_space(bound, popsize)

    def evaluate() -> int:
        for layer, z in enumerate(Z):
            bound.statistics(space.population(layer, z))
            if space.stack.size:
                space.stack[layer] = space.prompt(layer, z[0])
        return len(Z) * popsize

    return evaluate


def milliseconds(evaluate: Callable[[], int], repeats: int) -> list[float]:
    """Milliseconds per candidate of each call. Results are on the host when a call returns: nothing
    still runs.
    """
    found = []
    for _ in range(repeats):
        start = perf_counter()
        candidates = evaluate()
        found.append(1000 * (perf_counter() - start) / candidates)
    return found


def count_flops(evaluate: Callable[[], int]) -> int:
    """FLOP per candidate of a PyTorch engine: matmuls and attention, nearly all. A multiply-add
    counts as two.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # PyTorch's counter knows the attention kernels of GPUs only.
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        candidates = evaluate()
    return int(counter.get_total_flops() / candidates)


def peak_mib() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not report
    it.
    """
    # Not getrusage first: on Linux a child starts with the peak of the process that started it.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    return None
