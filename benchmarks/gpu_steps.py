"""What a process of the GPU check does: make a tiny backbone, hold an engine to the CPU, time it, find the ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.benchmarks.timing import clock_of, cpu_attention, population, random_prompts, sweep
from bbt_accel.benchmarks.workload import load_batch
from bbt_accel.bundle import Bundle
from bbt_accel.engines.base import BoundBatch, Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.objective import Float64, Objective
from bbt_accel.projection import Latent, Projection

TINY: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
                "max_position_embeddings": 130, "type_vocab_size": 1},
    "bert": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
             "max_position_embeddings": 128},
    "electra": {"hidden_size": 64, "embedding_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                "intermediate_size": 96, "max_position_embeddings": 128},
    "bart": {"d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
             "max_position_embeddings": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
}  # fmt: skip
"""Model type → a configuration that is exported in seconds and still has every kind of node."""
SIZES = {"cuda": (8192, 2**30), "cpu": (512, 2**24)}
"""Side of the fp16 matrices, and bytes that are copied."""
N_PROMPT = 5
DIM = 20
"""Of the space that prompts are projected from."""
SHAPES = ((8, 40, 5), (5, 12, 3), (1, 8, 1))
"""Rows, words of the longest and candidates of the batches that engines are held to the CPU on."""


def tiny(model_type: str, output: str) -> None:
    """A checkpoint with weights large enough that prompts and rows matter, and the shipped tokenizer."""
    import torch
    import transformers

    from bbt_accel.benchmarks.make_backbone import load_tokenizer
    from bbt_accel.demo import BACKBONE
    from bbt_accel.exporters.families import FAMILIES

    words = load_tokenizer(BACKBONE, model_type)
    ids = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.cls_token_id,
        "eos_token_id": words.sep_token_id,
        "decoder_start_token_id": words.pad_token_id if model_type == "t5" else words.sep_token_id,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **TINY[model_type], **ids)
    model = getattr(transformers, FAMILIES[model_type][0])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(output)
    words.save_pretrained(output)


def expected(bundle: str, output: str) -> None:
    """What eager PyTorch gives on the CPU for `cases`, into the file `output`."""
    with load_engine(bundle, "eager") as engine:
        np.savez(output, *numbers_of(engine))


def exact(exported: str, expected: str, engine: dict[str, Any], made: dict[str, Any] | None) -> float:
    """Largest error of an engine against the recorded numbers, relative to the largest where that is beyond 1.

    made: how to optimize the exported bundle first, or None to run it as it is.
    """
    from bbt_accel.exporters.optimize import optimize_bundle
    from bbt_accel.exporters.validate import scaled_error

    if made is not None:
        optimize_bundle(exported, engine["bundle"], **made)
    with load_engine(**engine) as loaded:
        found = numbers_of(loaded)
    with np.load(expected) as file:
        return max(scaled_error(a, file[name]) for a, name in zip(found, file.files, strict=True))


def numbers_of(engine: Engine) -> list[Float32]:
    """Logits and losses on batches of several shapes, twice each: the second time from whatever the engine keeps."""
    found = []
    for batch, prompts in cases(engine.bundle):
        with engine.bind(batch) as bound:
            for _ in range(1 if engine.name == "eager" else 3):
                last = numbers(bound, prompts)
        found += last
    return found


def numbers(bound: BoundBatch, prompts: Float32) -> list[Float32]:
    """Logits of whole prompts and of projected ones, for bbtv2 of each layer's candidates too; and losses of those."""
    n, hidden = prompts.shape[-2:]
    rng, std = np.random.default_rng(0), float(prompts.std())
    p0 = std * rng.standard_normal(n * hidden)
    projection = Projection.normal(rng, DIM, n, hidden, std / DIM**0.5, p0)
    z = Latent(projection, rng.standard_normal((len(prompts), DIM)))
    if bound.bundle.info.method == "bbt":
        return [bound.label_logits(prompts), bound.label_logits(z), losses(bound, bound.tally(z))]
    found = [bound.label_logits(prompts)]
    for layer in range(prompts.shape[1]):
        found += [bound.layer_logits(prompts[0], layer, some) for some in (prompts[:, layer], z)]
        found.append(losses(bound, bound.layer_tally(prompts[0], layer, z)))
    return found


def losses(bound: BoundBatch, tally: Float64) -> Float32:
    """Cross entropies (P,) and hinge losses (P,) of a tally."""
    targets = bound.batch.targets
    return np.stack([Objective(loss).of(tally, targets)[0] for loss in ("ce", "hinge")]).astype(np.float32)


def cases(bundle: Bundle) -> list[tuple[Batch, Float32]]:
    from bbt_accel.exporters.rows import sample_rows

    return [
        (sample_rows(bundle, rows, words), random_prompts(bundle.info, count, seed))
        for seed, (rows, words, count) in enumerate(SHAPES)
    ]


def golden(trace: str, engine: dict[str, Any]) -> float:
    """Largest difference of the first generation's losses from those that the original program recorded."""
    with np.load(trace) as file:
        arrays = {name: file[name] for name in file.files}
    with load_engine(**engine) as loaded:
        batch = traced_batch(arrays, loaded.bundle.info.family)
        n, hidden = loaded.bundle.info.prompt_shape[-2:]
        p0 = arrays["init_prompt"] if arrays["init_prompt"].size else None
        prompts = Latent(Projection(arrays["A"][0], (n, hidden), p0), arrays["X"][0])
        with loaded.bind(batch) as bound:
            if loaded.bundle.info.method == "bbt":
                tally = bound.tally(prompts)
            else:
                tally = bound.layer_tally(np.zeros(loaded.bundle.info.prompt_shape, np.float32), 0, prompts)
    losses, _ = Objective("ce").of(tally, batch.targets)
    return float(np.abs(losses - arrays["fitness"][0]).max())


def traced_batch(arrays: dict[str, Any], family: str) -> Batch:
    """The rows of a trace; as the original laid them out, BART's decoder reads the input shifted by one."""
    ids, mask = arrays["train_input_ids"], arrays["train_attention_mask"]
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    decoder = arrays.get("train_decoder_input_ids")
    readout = {"t5": np.ones_like(rows), "gpt2": last}.get(family, arrays.get("train_mask_pos"))
    if family == "bart":
        decoder = np.concatenate([ids[rows, last][:, None], ids[:, :-1]], axis=1)
    targets = (arrays["train_labels"][:, None] == arrays["label_ids"]).argmax(axis=1)
    return Batch(ids, mask, readout, targets, arrays["label_ids"], decoder)  # type: ignore[arg-type]


def speed(engine: dict[str, Any], batch: str, popsize: int, repeats: int, half: bool = False) -> dict[str, Any]:
    """Seconds a candidate, as the search evaluates it: from z to the tally, the best of a layer put in its place.

    half: the eager model in fp16. Graphs and kernels are made before the clock runs.
    """
    with load_engine(**engine) as loaded, loaded.bind(load_batch(batch)) as bound:
        if half:
            loaded.reference.model.half()  # type: ignore[attr-defined]
        turn, clock = searching(bound, popsize), clock_of(engine["name"], engine["device"])
        for _ in range(1 if engine["name"] == "eager" else 3):
            turn()
        return {"seconds": [clock(turn) for _ in range(repeats)], "versions": loaded.versions()}


def searching(bound: BoundBatch, popsize: int) -> Callable[[], int]:
    """A generation of a search, or for bbtv2 one for each layer, without CMA-ES; it returns its candidates."""
    from bbt_accel.settings import resolve
    from bbt_accel.tuning.space import Space

    info, settings = bound.bundle.info, resolve({"popsize": popsize})
    deep = info.method == "bbtv2"
    space = Space(info, settings, bound.layer_stds() if deep else None)
    rng = np.random.default_rng(0)

    def turn() -> int:
        for layer in range(info.n_layers if deep else 1):
            z = settings.sigma * rng.standard_normal((popsize, settings.intrinsic_dim))
            space.tally(bound, layer, z)
            if deep:  # the best of a generation then stands in its layer
                space.stack[layer] = space.prompts(layer, z[:1])[0]
        return popsize * (info.n_layers if deep else 1)

    return turn


def work(bundle: str, batch: str, device: str, popsize: int) -> dict[str, int]:
    """Floating-point operations a candidate: of the naive forward, and of what is left when work is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for name, engine in (("naive", "eager"), ("done", "torch")):
        with load_engine(bundle, engine, device=device) as loaded, loaded.bind(load_batch(batch)) as bound:
            prompts = random_prompts(loaded.bundle.info, popsize if name == "done" else 1, 0)
            deep = name == "done" and loaded.bundle.info.method == "bbtv2"
            with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
                candidates = (sweep if deep else population)(bound, prompts)
            found[name] = int(counter.get_total_flops() / candidates)
    return found


def ceilings(device: str) -> dict[str, float]:
    """Measured: 10¹² fp16 operations a second of a matrix product, 10⁹ bytes a second of a copy (read and write)."""
    import torch

    from bbt_accel.benchmarks.machine import rate

    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    n, size = SIZES[device]
    a = torch.randn(n, n, device=device).half()
    matrix = rate(n, lambda: torch.mm(a, a), wait) / 1e3
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    durations = []
    for _ in range(20):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        durations.append(time.perf_counter() - start)
    return {"matrix_tflops": matrix, "bandwidth_gbs": 2 * size / float(np.median(durations)) / 1e9}


def search(
    engine: dict[str, Any], task: str, data: str | None, calls: int, popsize: int, k_shot: int, run: str
) -> float:
    """Seconds of a whole search by CMA-ES, of so many calls."""
    from bbt_accel.run import Run
    from bbt_accel.tuning import tune

    options = {("engine" if name == "name" else name): value for name, value in engine.items()}
    folder = None if data is None else Path(data)
    settings = {"budget": calls, "popsize": popsize, "k_shot": k_shot}
    tune(task=task, data=folder, output=run, progress=False, settings=settings, **options)
    return float(Run.read(run).info.seconds)


GPU_STEPS: dict[str, Callable[..., Any]] = {
    "tiny": tiny,
    "expected": expected,
    "exact": exact,
    "golden": golden,
    "speed": speed,
    "work": work,
    "ceilings": ceilings,
    "search": search,
}
