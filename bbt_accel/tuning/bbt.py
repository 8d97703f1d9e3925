"""Black-Box Tuning (Sun et al., ICML 2022): one CMA-ES searches the prompt of the input layer."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.objective import Float64
from bbt_accel.settings import Settings
from bbt_accel.tuning.cma import Cma
from bbt_accel.tuning.space import Space


class Bbt:
    """The search for z* = argmin over z ∈ R^d of L(f(A z + p0; X), Y), which is the paper's objective.

    The prompt of a generation is that of its best candidate.
    """

    layer = 0

    def __init__(self, space: Space, settings: Settings) -> None:
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
        prompt: Float32 = self.space.prompts(0, self._best[None])[0]
        return prompt
