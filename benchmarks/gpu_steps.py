"""What the processes of the GPU check do: compare an engine with eager PyTorch on the CPU, with
recorded traces, and on the rows that are timed with eager fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bbt_accel.benchmarks.gpu_report import worst
from bbt_accel.benchmarks.steps import LoadArguments, fixed_generation, load_batch, random_prompts
from bbt_accel.core.batch import Batch, Float32, Int64
from bbt_accel.core.bundle import BundleInfo
from bbt_accel.core.comparison import relative_rmse, scaled_error
from bbt_accel.core.objective import Objective, batch_statistics
from bbt_accel.core.population import Latent, Population
from bbt_accel.core.projection import Projection
from bbt_accel.core.settings import Loss
from bbt_accel.engines.base import BoundBatch, Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.engines.staged import StagedBoundBatch
from bbt_accel.exporters.trace.validate import sample_rows

DIM = 20  # dimension of the space that prompts are projected from
LOSSES: tuple[Loss, ...] = ("ce", "hinge")
PASSES = (
    3  # after the enqueued one: a call is captured when it comes the second time, then launched
)
SHAPES = (
    (8, 40, 5),
    (5, 12, 3),
    (1, 8, 1),
)  # rows, words of the longest row, and candidates of the compared batches


def validation_error(reference: str, engine: LoadArguments) -> float:
    """Largest error of an engine compared with eager PyTorch on the CPU, which runs the exported
    bundle `reference`.

    That of logits is their noise relative to the spread between labels; that of losses is relative
    to the largest.
    """
    with load_engine(reference, "eager") as eager, load_engine(**engine) as loaded:
        pairs = zip(outputs(loaded, 3), outputs(eager, 1), strict=True)
        return worst(error_of(found, wanted) for found, wanted in pairs)


def error_of(found: Float32, wanted: Float32) -> float:
    """Of label logits (P, N, C), or of losses."""
    return relative_rmse(found, wanted) if wanted.ndim == 3 else scaled_error(found, wanted)


def save_reference(engine: LoadArguments, batch: str, popsize: int, output: str) -> None:
    """Write the label logits (L or 1, P, N, C) of fixed candidates, by an engine that is right."""
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        np.save(
            output,
            [bound.label_logits(population) for population in fixed_generation(bound, popsize)],
        )


def timed_errors(
    engine: LoadArguments, batch: str, popsize: int, reference: str
) -> list[dict[str, Any]]:
    """How far an engine is from the reference, for every bucket of the rows that are timed, however
    its calls ran.

    Returns for each bucket its `shape` and `tokens`, the `noise` of its logits by how the calls
    ran, whether they `launch` CUDA graphs, and whether launched and enqueued calls are `identical`;
    last the batch statistics against the logits.
    """
    wanted = np.load(reference)
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        populations = fixed_generation(bound, popsize)
        found, launches = passes(
            loaded, lambda: np.stack([bound.label_logits(p) for p in populations])
        )
        sums, _ = passes(loaded, lambda: np.stack([bound.statistics(p) for p in populations]))
        whole = np.arange(len(bound.batch))
        buckets = (
            [(b.rows, b.length) for b in bound.buckets]
            if isinstance(bound, StagedBoundBatch)
            else []
        )
        errors: list[dict[str, Any]] = []
        for rows, length in buckets or [(whole, bound.batch.input_ids.shape[1])]:
            noise = {
                way: worst(map(relative_rmse, x[:, :, rows], wanted[:, :, rows]))
                for way, x in found.items()
            }
            facts = {"launches": launches, "identical": identical(found, rows)}
            errors.append(
                {
                    "shape": f"{popsize} × {len(rows)} × {length}",
                    "tokens": len(rows) * length,
                    "noise": noise,
                    **facts,
                }
            )
        expected = [batch_statistics(logits, bound.batch.targets) for logits in found["enqueued"]]
        noise = {
            way: scaled_error(x.astype(np.float32), np.stack(expected)) for way, x in sums.items()
        }
    same = None if "launched" not in sums else np.array_equal(sums["launched"], sums["enqueued"])
    return [
        *errors,
        {"shape": "batch statistics", "noise": noise, "launches": launches, "identical": same},
    ]


def passes(engine: Engine, compute: Callable[[], Any]) -> tuple[dict[str, Any], bool]:
    """The results of the same calls by how they ran: enqueued, captured, launched; and whether CUDA
    graphs are used.

    A pass counts as launched only if all of its calls were.
    """
    capturing, engine.capturing = engine.capturing, False
    found = {"enqueued": compute()}
    engine.capturing = capturing
    for _ in range(PASSES if capturing else 0):
        before = engine.counts()
        result = compute()
        done = {name: value - before[name] for name, value in engine.counts().items()}
        if done["launched"] == done["calls"] > 0:
            found["launched"] = result
        elif done["captured"]:
            found["captured"] = result
    return found, capturing


def identical(found: dict[str, Any], rows: Int64) -> bool | None:
    """Whether launched CUDA graphs gave the same bits for these rows; None where none was
    launched.
    """
    if "launched" not in found:
        return None
    return np.array_equal(found["launched"][:, :, rows], found["enqueued"][:, :, rows])


def outputs(engine: Engine, calls: int) -> list[Float32]:
    """Logits and losses on batches of several shapes, of the last of several calls: it uses
    whatever was cached.
    """
    found = []
    for seed, (rows, words, count) in enumerate(SHAPES):
        batch, prompts = (
            sample_rows(engine.bundle, rows, words),
            random_prompts(engine.bundle.info, count, seed),
        )
        with engine.bind(batch) as bound:
            for _ in range(calls):
                last = logits_and_losses(bound, prompts)
        found += last
    return found


def logits_and_losses(bound: BoundBatch, prompts: Float32) -> list[Float32]:
    """Logits of whole prompts; and logits and losses of projected ones, for bbtv2 those of each
    layer.
    """
    n, hidden = prompts.shape[-2:]
    rng, std = np.random.default_rng(0), float(prompts.std())
    projection = Projection.normal(
        rng, DIM, n, hidden, std / DIM**0.5, std * rng.standard_normal(n * hidden)
    )
    z = Latent(projection, rng.standard_normal((len(prompts), DIM)))
    populations = [Population(z)]
    if bound.bundle.info.method == "bbtv2":
        layers = range(prompts.shape[1])
        populations = [Population(c, i, prompts[0]) for i in layers for c in (prompts[:, i], z)]
    found = [bound.label_logits(prompts)]
    for population in populations:
        statistics = bound.statistics(population)
        losses = [
            Objective(loss).from_statistics(statistics, bound.batch.targets)[0] for loss in LOSSES
        ]
        found += [bound.label_logits(population), np.stack(losses).astype(np.float32)]
    return found


def trace_error(reference: str, engine: LoadArguments) -> float:
    """Largest difference of the first generation's losses from those in a trace of the original
    program, a file.
    """
    with np.load(reference) as file:
        arrays = dict(file)
    with load_engine(**engine) as loaded:
        info = loaded.bundle.info
        batch = traced_batch(arrays, info)
        p0 = arrays["init_prompt"] if arrays["init_prompt"].size else None
        latent = Latent(
            Projection(arrays["A"][0], (info.n_prompt_tokens, info.hidden_size), p0), arrays["X"][0]
        )
        deep = info.method == "bbtv2"
        population = (
            Population(latent, 0, np.zeros(info.prompt_shape, np.float32))
            if deep
            else Population(latent)
        )
        with loaded.bind(batch) as bound:
            found, _ = Objective("ce").from_statistics(bound.statistics(population), batch.targets)
    return worst(np.abs(found - arrays["fitness"][0]))


def traced_batch(arrays: dict[str, Any], info: BundleInfo) -> Batch:
    """The rows of a trace as the original program laid them out."""
    ids, mask = arrays["train_input_ids"], arrays["train_attention_mask"]
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    decoder = arrays.get("train_decoder_input_ids")
    # The decoder of a masked template reads the input shifted by one, behind the last token of the
    # row.
    if info.decodes and info.template_group == "masked":
        decoder = np.concatenate([ids[rows, last][:, None], ids[:, :-1]], axis=1)
    readout = {"span": np.ones_like(rows), "causal": last}.get(
        info.template_group, arrays.get("train_mask_pos")
    )
    targets = (arrays["train_labels"][:, None] == arrays["label_ids"]).argmax(axis=1)
    return Batch(ids, mask, readout, targets, arrays["label_ids"], decoder)  # type: ignore[arg-type]
