"""What the processes of the GPU check do: compare an engine with eager PyTorch on the CPU, and with recorded traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.benchmarks.steps import LoadArguments, random_prompts
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch, Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.exporters.validate import sample_rows, scaled_error
from bbt_accel.objective import Objective
from bbt_accel.population import Latent, Population
from bbt_accel.projection import Projection
from bbt_accel.settings import Loss

DIM = 20  # dimension of the space that prompts are projected from
LOSSES: tuple[Loss, ...] = ("ce", "hinge")
SHAPES = ((8, 40, 5), (5, 12, 3), (1, 8, 1))  # rows, words of the longest row, and candidates of the compared batches


def validation_error(reference: str, engine: LoadArguments) -> float:
    """Largest error of an engine compared with eager PyTorch on the CPU, which runs the exported bundle `reference`."""
    with load_engine(reference, "eager") as eager, load_engine(**engine) as loaded:
        pairs = zip(outputs(loaded, 3), outputs(eager, 1), strict=True)
        return float(np.max([scaled_error(found, wanted) for found, wanted in pairs]))


def outputs(engine: Engine, calls: int) -> list[Float32]:
    """Logits and losses on batches of several shapes, of the last of several calls: it uses whatever was cached."""
    found = []
    for seed, (rows, words, count) in enumerate(SHAPES):
        batch, prompts = sample_rows(engine.bundle, rows, words), random_prompts(engine.bundle.info, count, seed)
        with engine.bind(batch) as bound:
            for _ in range(calls):
                last = logits_and_losses(bound, prompts)
        found += last
    return found


def logits_and_losses(bound: BoundBatch, prompts: Float32) -> list[Float32]:
    """Logits of whole prompts; and logits and losses of projected ones, for bbtv2 those of each layer."""
    n, hidden = prompts.shape[-2:]
    rng, std = np.random.default_rng(0), float(prompts.std())
    projection = Projection.normal(rng, DIM, n, hidden, std / DIM**0.5, std * rng.standard_normal(n * hidden))
    z = Latent(projection, rng.standard_normal((len(prompts), DIM)))
    populations = [Population(z)]
    if bound.bundle.info.method == "bbtv2":
        layers = range(prompts.shape[1])
        populations = [Population(c, i, prompts[0]) for i in layers for c in (prompts[:, i], z)]
    found = [bound.label_logits(prompts)]
    for population in populations:
        statistics = bound.statistics(population)
        losses = [Objective(loss).from_statistics(statistics, bound.batch.targets)[0] for loss in LOSSES]
        found += [bound.label_logits(population), np.stack(losses).astype(np.float32)]
    return found


def trace_error(reference: str, engine: LoadArguments) -> float:
    """Largest difference of the first generation's losses from those in a trace of the original program, a file."""
    with np.load(reference) as file:
        arrays = dict(file)
    with load_engine(**engine) as loaded:
        info = loaded.bundle.info
        batch = traced_batch(arrays, info)
        p0 = arrays["init_prompt"] if arrays["init_prompt"].size else None
        latent = Latent(Projection(arrays["A"][0], (info.n_prompt_tokens, info.hidden_size), p0), arrays["X"][0])
        deep = info.method == "bbtv2"
        population = Population(latent, 0, np.zeros(info.prompt_shape, np.float32)) if deep else Population(latent)
        with loaded.bind(batch) as bound:
            found, _ = Objective("ce").from_statistics(bound.statistics(population), batch.targets)
    return float(np.abs(found - arrays["fitness"][0]).max())


def traced_batch(arrays: dict[str, Any], info: BundleInfo) -> Batch:
    """The rows of a trace as the original program laid them out."""
    ids, mask = arrays["train_input_ids"], arrays["train_attention_mask"]
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    decoder = arrays.get("train_decoder_input_ids")
    # The decoder of a masked template reads the input shifted by one, behind the last token of the row.
    if info.decodes and info.template_group == "masked":
        decoder = np.concatenate([ids[rows, last][:, None], ids[:, :-1]], axis=1)
    readout = {"span": np.ones_like(rows), "causal": last}.get(info.template_group, arrays.get("train_mask_pos"))
    targets = (arrays["train_labels"][:, None] == arrays["label_ids"]).argmax(axis=1)
    return Batch(ids, mask, readout, targets, arrays["label_ids"], decoder)  # type: ignore[arg-type]
