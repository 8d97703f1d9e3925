"""The two search methods, BBT and BBTv2, and their common protocol."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bbt_accel.batch import Float32, Float64
from bbt_accel.settings import Settings
from bbt_accel.tuning.cma import Cma
from bbt_accel.tuning.space import PromptSpace


class SearchMethod(Protocol):
    """A search, one generation at a time: ask, evaluate the candidates in `space`, tell."""

    space: PromptSpace

    @property
    def layer(self) -> int:
        """The layer that the next generation searches; 0 for BBT."""

    @property
    def step_size(self) -> float:
        """Step size from which the next generation is sampled."""

    def ask(self) -> Float64:
        """Candidates, float64 (P, d)."""

    def tell(self, candidates: Float64, losses: Float64) -> None:
        """Update the search with the losses (P,) of the candidates."""

    def prompt(self) -> Float32:
        """The prompt after the last generation: float32 (n, H), or (L, n, H) for BBTv2."""


class Bbt:
    """Black-Box Tuning (Sun et al., ICML 2022): one CMA-ES searches the prompt of the input layer.

    z* = argmin over z ∈ R^d of L(f(A z + p0; X), Y), the paper's objective. The prompt of a generation is that of its
    best candidate.
    """

    layer = 0

    def __init__(self, space: PromptSpace, settings: Settings) -> None:
        self.space = space
        s = settings
        self._cma = Cma(s.intrinsic_dim, s.sigma, s.popsize, s.seed, s.bound)
        self._best = np.zeros(s.intrinsic_dim)

    @property
    def step_size(self) -> float:
        return self._cma.step_size

    def ask(self) -> Float64:
        return self._cma.ask()

    def tell(self, candidates: Float64, losses: Float64) -> None:
        self._cma.tell(candidates, losses)
        self._best = candidates[np.argmin(losses)]

    def prompt(self) -> Float32:
        return self.space.prompt(0, self._best)


class BbtV2:
    """BBTv2 (Sun et al., EMNLP 2022): one prompt per layer, searched by divide and conquer.

    One projection and one CMA-ES per layer. The layers take turns, starting from the lowest, as in the paper's
    divide-and-conquer algorithm: a generation searches one layer's z while the other layers' prompts are fixed; then
    that layer's prompt becomes A z of the best z that this layer has seen in any generation.
    """

    def __init__(self, space: PromptSpace, settings: Settings) -> None:
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
            self.space.stack[self.layer] = self.space.prompt(self.layer, candidates[best])
        self.layer = (self.layer + 1) % len(self._cmas)

    def prompt(self) -> Float32:
        return self.space.stack.copy()
