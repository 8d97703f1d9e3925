"""How long a candidate takes, and how much arithmetic it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch


def random_prompts(info: BundleInfo, count: int, seed: int) -> Float32:
    """float32 (count, n, H) or (count, L, n, H), entries N(0, σ_e²): what a first generation with α = 1 looks like."""
    rng = np.random.default_rng(seed)
    prompts = rng.standard_normal((count, *info.prompt_shape), dtype=np.float32)
    return np.asarray(prompts * np.float32(info.word_embedding_std), np.float32)


Clock = Callable[[Callable[[], int]], float]
"""Seconds a candidate of a call that returns how many there were."""


def wall_clock(call: Callable[[], int]) -> float:
    start = time.perf_counter()
    candidates = call()  # the logits have come back to the host: nothing is still under way
    return (time.perf_counter() - start) / candidates


def cuda_clock(call: Callable[[], int]) -> float:
    """By CUDA events on PyTorch's stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    candidates = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / candidates


def clock_of(engine: str, device: str) -> Clock:
    """PyTorch on a GPU is timed by events there, everything else by the wall clock."""
    return cuda_clock if device == "cuda" and engine in ("eager", "torch") else wall_clock


def seconds_per_candidate(bound: BoundBatch, prompts: Float32, repeats: int, clock: Clock = wall_clock) -> list[float]:
    """Seconds a candidate of each of `repeats` calls with the whole population, after one call to warm up.

    For bbtv2 a call is a sweep as the search does it: one call of `layer_logits` a layer, from the lowest up.
    """
    call = sweep if bound.bundle.info.method == "bbtv2" else population
    call(bound, prompts)
    return [clock(lambda: call(bound, prompts)) for _ in range(repeats)]


def population(bound: BoundBatch, prompts: Float32) -> int:
    """Evaluate a population; returns its candidates."""
    bound.label_logits(prompts)
    return len(prompts)


def sweep(bound: BoundBatch, prompts: Float32) -> int:
    """Evaluate a population a layer, keeping the first candidate each time; returns candidates in all."""
    stack = np.zeros_like(prompts[0])
    for layer in range(len(stack)):
        candidates = np.ascontiguousarray(prompts[:, layer])
        bound.layer_logits(stack, layer, candidates)
        stack[layer] = candidates[0]
    return len(prompts) * len(stack)


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 90th and 99th percentile, in milliseconds."""
    median, p90, p99 = (1000 * float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return median, p90, p99


def count_flops(bound: BoundBatch, prompt: Float32) -> int:
    """Floating-point operations of one candidate in PyTorch: matrix products and attention, which are nearly all.

    prompt: float32 (1, n, H) or (1, L, n, H). A multiplication and an addition count as two.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
        bound.label_logits(prompt)
    return int(counter.get_total_flops())


def cpu_attention() -> dict[Any, Any]:
    """How PyTorch's counter counts the attention kernel of CPUs: it knows those of GPUs alone."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
