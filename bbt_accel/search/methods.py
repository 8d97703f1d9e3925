"""The two search methods, BBT and BBTv2: their search space, and their optimizer, CMA-ES."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import cma
import numpy as np

from bbt_accel.core.batch import Float32, Float64
from bbt_accel.core.bundle import Bundle, BundleInfo
from bbt_accel.core.population import Latent, Population
from bbt_accel.core.projection import Projection, one_blas_thread, prompt_std
from bbt_accel.core.settings import Settings


class PromptSpace:
    """One projection per layer (BBT has a single one), each a function of the seed; and BBTv2's
    prompts of all layers.

    The same settings and, for BBTv2, the same standard deviations give the same space, in any
    process.

    layer_stds: float32 (L,), BBTv2 only: the clipped standard deviation of the hidden states that
        enter each block without a prompt. Layer 0 uses that of the word embeddings instead.
    """

    def __init__(
        self, bundle: Bundle, settings: Settings, layer_stds: Float32 | None = None
    ) -> None:
        info = bundle.info
        stds = [
            info.word_embedding_std,
            *([] if layer_stds is None else map(float, layer_stds[1:])),
        ]
        p0 = bundle.initial_prompt()
        self._projections = [
            _projection(info, settings, layer, std, p0) for layer, std in enumerate(stds)
        ]
        self.stack: Float32 = np.zeros(
            info.prompt_shape if info.method == "bbtv2" else 0, np.float32
        )
        """BBTv2: the current prompt of every layer, float32 (L, n, H); empty for BBT."""

    def population(self, layer: int, Z: Float64 | Float32) -> Population:
        """Candidates Z (P, d) for a layer; the other layers' prompts are fixed."""
        latent = Latent(self._projections[layer], Z)
        return Population(latent, layer, self.stack) if self.stack.size else Population(latent)

    def prompt(self, layer: int, z: Float64) -> Float32:
        """A z + p0 for one layer: (d,) to float32 (n, H)."""
        return self._projections[layer].prompts(z[None]).squeeze(0)


def _projection(
    info: BundleInfo, settings: Settings, layer: int, embedding_std: float, p0: Float32 | None
) -> Projection:
    """The random projection of one layer. It follows from the seed, and no two layers share one."""
    rng = np.random.default_rng([settings.seed, layer])
    d, n, H = settings.intrinsic_dim, info.n_prompt_tokens, info.hidden_size
    if settings.random_proj == "uniform":
        return Projection.uniform(rng, d, n, H, p0)
    return Projection.normal(
        rng, d, n, H, prompt_std(settings.alpha, embedding_std, d, settings.sigma), p0
    )


class Cma:
    """CMA-ES (Hansen, 2016), by pycma: starts at 0 with the step size sigma, in [-bound, bound]^d
    if bound > 0.

    With a diagonal covariance it is separable CMA-ES (Ros and Hansen, 2008): d variances, learned
    faster, and no eigendecomposition.
    Its trajectory is a function of the seed and the losses, bit for bit on one machine. So a
    stopped run is continued by repeating its asks and tells (about 10 ms per generation for d =
    500), and pycma's state need not be stored.
    """

    def __init__(self, settings: Settings, seed: int | Sequence[int]) -> None:
        s, d = settings, settings.intrinsic_dim
        # A generator of its own: other code, and the other layers of BBTv2, may draw from numpy's
        # global one.
        randn = np.random.RandomState(seed).randn
        bounds = [-s.bound, s.bound] if s.bound > 0 else [None, None]
        options = {
            "popsize": s.popsize,
            "randn": randn,
            "seed": np.nan,
            "verbose": -9,
            "bounds": bounds,
        }
        options["CMA_diagonal"] = s.covariance == "diagonal"
        # pycma's eigendecomposition is 10 to 50 times slower with two BLAS threads on a busy
        # machine, and its last bits depend on their number.
        with one_blas_thread:
            self._es = cma.CMAEvolutionStrategy(np.zeros(d), s.sigma, options)

    def ask(self) -> Float64:
        """The next population, float64 (P, d)."""
        with one_blas_thread:
            return np.asarray(self._es.ask(), dtype=np.float64)

    def tell(self, candidates: Float64, losses: Float64) -> None:
        """Update with the losses (P,) of the population that was asked for."""
        with one_blas_thread:
            self._es.tell(list(candidates), losses.tolist())

    @property
    def step_size(self) -> float:
        return float(self._es.sigma)

    @property
    def mean(self) -> Float64:
        """Around which the next population is drawn, float64 (d,)."""
        return np.array(self._es.mean)


class SearchMethod(ABC):
    """A search, one generation at a time: ask, evaluate the candidates in `space`, tell."""

    def __init__(
        self, space: PromptSpace, settings: Settings, seeds: Sequence[int | Sequence[int]]
    ) -> None:
        self.space = space
        self.layer = 0  # the layer that the next generation searches; 0 for BBT
        self._cmas = [Cma(settings, seed) for seed in seeds]

    @property
    def step_size(self) -> float:
        """Step size from which the next generation is sampled."""
        return self._cmas[self.layer].step_size

    def ask(self) -> Float64:
        """Candidates, float64 (P, d)."""
        return self._cmas[self.layer].ask()

    @abstractmethod
    def tell(self, candidates: Float64, losses: Float64) -> None:
        """Update the search with the losses (P,) of the candidates."""
        self._cmas[self.layer].tell(candidates, losses)

    @abstractmethod
    def prompt(self) -> Float32:
        """The prompt after the last generation: float32 (n, H), or (L, n, H) for BBTv2."""


class Bbt(SearchMethod):
    """Black-Box Tuning (Sun et al., ICML 2022): one CMA-ES searches the prompt of the input layer.

    z* = argmin over z ∈ R^d of L(f(A z + p0; X), Y), the paper's objective. The prompt of a
    generation is that of its best candidate.
    """

    def __init__(self, space: PromptSpace, settings: Settings) -> None:
        super().__init__(space, settings, [settings.seed])
        self._best = np.zeros(settings.intrinsic_dim)

    def tell(self, candidates: Float64, losses: Float64) -> None:
        super().tell(candidates, losses)
        self._best = candidates[np.argmin(losses)]

    def prompt(self) -> Float32:
        return self.space.prompt(0, self._best)


class BbtV2(SearchMethod):
    """BBTv2 (Sun et al., EMNLP 2022): one prompt per layer, searched by divide and conquer.

    One projection and one CMA-ES per layer. The layers take turns, starting from the lowest, as in
    the paper's divide-and-conquer algorithm: a generation searches one layer's z while the other
    layers' prompts are fixed; then that layer's prompt becomes A z of the best z that this layer
    has seen in any generation.
    """

    def __init__(self, space: PromptSpace, settings: Settings) -> None:
        super().__init__(
            space, settings, [[settings.seed, layer] for layer in range(len(space.stack))]
        )
        self._best_losses = np.full(len(space.stack), np.inf)

    def tell(self, candidates: Float64, losses: Float64) -> None:
        super().tell(candidates, losses)
        best = int(np.argmin(losses))
        if losses[best] < self._best_losses[self.layer]:
            self._best_losses[self.layer] = losses[best]
            self.space.stack[self.layer] = self.space.prompt(self.layer, candidates[best])
        self.layer = (self.layer + 1) % len(self._cmas)

    def prompt(self) -> Float32:
        return self.space.stack.copy()
