"""BBTv2 (Sun et al., EMNLP 2022): a prompt a layer, searched by divide and conquer."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch
from bbt_accel.objective import Float64
from bbt_accel.settings import Settings
from bbt_accel.tuning.bbt import make_projection
from bbt_accel.tuning.cma import Cma


class BbtV2:
    """One projection and one CMA-ES a layer; the layers take turns from the lowest, as in the paper's algorithm.

    A generation searches one layer's z while the other layers' prompts are fixed. Then that layer's prompt becomes
    A z of the best z that the layer has seen, in whatever generation.

    layer_stds: float32 (L,), the clipped standard deviation of the hidden states that enter each block without a
        prompt; the first is not used, the word embeddings' takes its place.
    """

    def __init__(self, info: BundleInfo, settings: Settings, layer_stds: Float32) -> None:
        self.layer = 0
        s, stds = settings, [info.word_embedding_std, *map(float, layer_stds[1:])]
        self._projections = [make_projection(info, s, i, std) for i, std in enumerate(stds)]
        self._cmas = [Cma(s.intrinsic_dim, s.sigma, s.popsize, [s.seed, i], s.bound) for i in range(info.n_layers)]
        self._best_losses = [np.inf] * info.n_layers
        self._stack: Float32 = np.zeros(info.prompt_shape, np.float32)

    @property
    def step_size(self) -> float:
        return self._cmas[self.layer].step_size

    def ask(self) -> Float64:
        return self._cmas[self.layer].ask()

    def logits(self, rows: BoundBatch, candidates: Float64) -> Float32:
        return rows.layer_logits(self._stack, self.layer, self._projections[self.layer].prompts(candidates))

    def tell(self, candidates: Float64, losses: Float64) -> None:
        self._cmas[self.layer].tell(candidates, losses)
        best = int(np.argmin(losses))
        if losses[best] < self._best_losses[self.layer]:
            self._best_losses[self.layer] = float(losses[best])
            self._stack[self.layer] = self._projections[self.layer].prompts(candidates[best][None])[0]
        self.layer = (self.layer + 1) % len(self._cmas)

    def prompt(self) -> Float32:
        return self._stack.copy()
