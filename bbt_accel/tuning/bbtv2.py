"""BBTv2 (Sun et al., EMNLP 2022): a prompt a layer, searched by divide and conquer."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.objective import Float64
from bbt_accel.settings import Settings
from bbt_accel.tuning.cma import Cma
from bbt_accel.tuning.space import Space


class BbtV2:
    """One projection and one CMA-ES a layer; the layers take turns from the lowest, as in the paper's algorithm.

    A generation searches one layer's z while the other layers' prompts are fixed. Then that layer's prompt becomes
    A z of the best z that the layer has seen, in whatever generation.
    """

    def __init__(self, space: Space, settings: Settings) -> None:
        self.space = space
        self.layer = 0
        s, layers = settings, len(space.stack)
        self._cmas = [Cma(s.intrinsic_dim, s.sigma, s.popsize, [s.seed, i], s.bound) for i in range(layers)]
        self._best_losses = [np.inf] * layers

    @property
    def step_size(self) -> float:
        return self._cmas[self.layer].step_size

    def ask(self) -> Float64:
        return self._cmas[self.layer].ask()

    def tell(self, candidates: Float64, losses: Float64) -> None:
        self._cmas[self.layer].tell(candidates, losses)
        best = int(np.argmin(losses))
        if losses[best] < self._best_losses[self.layer]:
            self._best_losses[self.layer] = float(losses[best])
            self.space.stack[self.layer] = self.space.prompts(self.layer, candidates[best][None])[0]
        self.layer = (self.layer + 1) % len(self._cmas)

    def prompt(self) -> Float32:
        return self.space.stack.copy()
