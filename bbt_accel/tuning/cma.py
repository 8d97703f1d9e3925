"""CMA-ES, by pycma."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import cma
import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from bbt_accel.objective import Float64


class Cma:
    """CMA-ES in R^d: starts at 0 with the step size sigma, in the box [-bound, bound]^d if bound > 0.

    The course is a function of the seed and of the losses told, bit for bit on one machine. So a run that was stopped
    is continued by asking and telling again what is already known (about 10 ms a generation at d = 500), and
    nothing of pycma's state has to be stored.
    """

    def __init__(self, d: int, sigma: float, popsize: int, seed: int | Sequence[int], bound: float = 0.0) -> None:
        # Numbers of our own, not numpy's global ones: other code, and the other layers of BBTv2, may draw from those.
        randn = np.random.RandomState(seed).randn
        options: dict[str, object] = {"popsize": popsize, "randn": randn, "seed": np.nan, "verbose": -9}
        if bound > 0:
            options["bounds"] = [-bound, bound]
        # pycma's eigendecomposition is 10 to 50 times slower with two BLAS threads on a busy machine, and its last
        # bits depend on their number.
        self._blas = ThreadpoolController()
        with self._one_thread():
            self._es = cma.CMAEvolutionStrategy(np.zeros(d), sigma, options)

    def ask(self) -> Float64:
        """The next population, float64 (P, d)."""
        with self._one_thread():
            return np.asarray(self._es.ask(), dtype=np.float64)

    def tell(self, candidates: Float64, losses: Float64) -> None:
        """The losses (P,) of the population that was asked for."""
        with self._one_thread():
            self._es.tell(list(candidates), [float(loss) for loss in losses])

    @property
    def step_size(self) -> float:
        return float(self._es.sigma)

    def _one_thread(self) -> AbstractContextManager[object]:
        limit: AbstractContextManager[object] = self._blas.limit(limits=1, user_api="blas")
        return limit
