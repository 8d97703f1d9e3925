"""How long a candidate takes, how much arithmetic it is, and how much memory the process used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch
from bbt_accel.settings import resolve
from bbt_accel.tuning.space import PromptSpace


def random_prompts(info: BundleInfo, count: int, seed: int) -> Float32:
    """float32 (count, n, H) or (count, L, n, H), entries N(0, σ_e²): what a first generation with α = 1 looks like."""
    rng = np.random.default_rng(seed)
    prompts = rng.standard_normal((count, *info.prompt_shape), dtype=np.float32)
    return np.asarray(prompts * np.float32(info.word_embedding_std), np.float32)


def generation(bound: BoundBatch, popsize: int) -> Callable[[], int]:
    """What a search asks of an engine between two steps of CMA-ES, from z to the batch statistics.

    For bbtv2 a generation for every layer, each of which then keeps its first candidate. Returns the candidates.
    """
    info = bound.bundle.info
    deep = info.method == "bbtv2"
    layers = info.n_layers if deep else 1
    stds = np.full(layers, info.word_embedding_std, np.float32)
    settings = resolve()
    space = PromptSpace(info, settings, stds if deep else None)
    Z = np.random.default_rng(0).standard_normal((layers, popsize, settings.intrinsic_dim))

    def evaluate() -> int:
        for layer, z in enumerate(Z):
            bound.statistics(space.population(layer, z))
            if deep:
                space.stack[layer] = space.prompt(layer, z[0])
        return layers * popsize

    return evaluate


def milliseconds(evaluate: Callable[[], int], repeats: int) -> list[float]:
    """Milliseconds per candidate of each call. Results are on the host when a call returns: nothing still runs."""
    found = []
    for _ in range(repeats):
        start = perf_counter()
        candidates = evaluate()
        found.append(1000 * (perf_counter() - start) / candidates)
    return found


def count_flops(evaluate: Callable[[], int]) -> int:
    """Floating-point operations per candidate of a PyTorch engine: matmuls and attention, which are nearly all.

    A multiplication and an addition count as two.
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
    """Largest resident memory of this process so far, MiB; None where the system does not report it."""
    try:
        # Not getrusage first: on Linux a child starts with the peak of the process that started it.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
