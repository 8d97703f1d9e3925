"""Black-Box Tuning (Sun et al., ICML 2022): one CMA-ES searches the prompt of the input layer."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch
from bbt_accel.objective import Float64
from bbt_accel.projection import Projection, prompt_std
from bbt_accel.settings import Settings
from bbt_accel.tuning.cma import Cma


class Bbt:
    """The search for z* = argmin over z ∈ R^d of L(f(A z + p0; X), Y), which is the paper's objective.

    The prompt of a generation is that of its best candidate.
    """

    layer = 0

    def __init__(self, info: BundleInfo, settings: Settings) -> None:
        self._projection = make_projection(info, settings, 0, info.word_embedding_std)
        s = settings
        self._cma = Cma(s.intrinsic_dim, s.sigma, s.popsize, s.seed, s.bound)
        self._best = np.zeros(s.intrinsic_dim)

    @property
    def step_size(self) -> float:
        return self._cma.step_size

    def ask(self) -> Float64:
        return self._cma.ask()

    def logits(self, rows: BoundBatch, candidates: Float64) -> Float32:
        return rows.label_logits(self._projection.prompts(candidates))

    def tell(self, candidates: Float64, losses: Float64) -> None:
        self._cma.tell(candidates, losses)
        self._best = candidates[np.argmin(losses)]

    def prompt(self) -> Float32:
        prompt: Float32 = self._projection.prompts(self._best[None])[0]
        return prompt


def make_projection(info: BundleInfo, settings: Settings, layer: int, embedding_std: float) -> Projection:
    """The random projection of one layer; the seed decides it, and no two layers share one."""
    rng = np.random.default_rng([settings.seed, layer])
    d, n, H = settings.intrinsic_dim, info.n_prompt_tokens, info.hidden_size
    if settings.random_proj == "uniform":
        return Projection.uniform(rng, d, n, H)
    return Projection.normal(rng, d, n, H, prompt_std(settings.alpha, embedding_std, d, settings.sigma))
