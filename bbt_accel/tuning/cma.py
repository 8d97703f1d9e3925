"""CMA-ES, by pycma."""

from __future__ import annotations

from collections.abc import Sequence

import cma
import numpy as np

from bbt_accel.batch import Float64
from bbt_accel.projection import one_blas_thread


class Cma:
    """CMA-ES in R^d (Hansen, 2016): starts at 0 with the step size sigma, in the box [-bound, bound]^d if bound > 0.

    Its trajectory is a function of the seed and the losses, bit for bit on one machine. So a stopped run is continued
    by repeating its asks and tells (about 10 ms per generation for d = 500), and pycma's state need not be stored.
    """

    def __init__(self, d: int, sigma: float, popsize: int, seed: int | Sequence[int], bound: float = 0.0) -> None:
        # A generator of its own: other code, and the other layers of BBTv2, may draw from numpy's global one.
        randn = np.random.RandomState(seed).randn
        options: dict[str, object] = {"popsize": popsize, "randn": randn, "seed": np.nan, "verbose": -9}
        if bound > 0:
            options["bounds"] = [-bound, bound]
        # pycma's eigendecomposition is 10 to 50 times slower with two BLAS threads on a busy machine, and its last
        # bits depend on their number.
        with one_blas_thread():
            self._es = cma.CMAEvolutionStrategy(np.zeros(d), sigma, options)

    def ask(self) -> Float64:
        """The next population, float64 (P, d)."""
        with one_blas_thread():
            return np.asarray(self._es.ask(), dtype=np.float64)

    def tell(self, candidates: Float64, losses: Float64) -> None:
        """Update with the losses (P,) of the population that was asked for."""
        with one_blas_thread():
            self._es.tell(list(candidates), [float(loss) for loss in losses])

    @property
    def step_size(self) -> float:
        return float(self._es.sigma)
