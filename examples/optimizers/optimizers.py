"""Derivative-free optimizers that propose prompts and learn from their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import cma
import numpy as np
from cma.restricted_gaussian_sampler import GaussVkDSampler

from bbt_accel.core.batch import Float32, Float64
from bbt_accel.core.settings import Settings
from bbt_accel.search.methods import Cma, PromptSpace

POPSIZE = 20
ToPrompts = Callable[[Float64], Float32]
"""From points (P, d) to prompts (P, n, H)."""


class Optimizer(Protocol):
    def ask(self) -> Float32:
        """Prompts to evaluate, float32 (P, n, H)."""

    def tell(self, losses: Float64) -> None:
        """Learn from their losses (P,)."""

    def found(self) -> Float32:
        """What is scored on the dev rows, float32 (K, n, H)."""


class CmaEs:
    """CMA-ES on the random projection, as `bbt-accel tune` runs it; its best candidate of a
    generation is scored.

    mean: score CMA's mean as well.
    """

    def __init__(self, space: PromptSpace, settings: Settings, mean: bool = False) -> None:
        self.space, self.with_mean, self.search = space, mean, self.start(settings)
        self.points = self.best = np.zeros((0, settings.intrinsic_dim))

    def start(self, settings: Settings) -> Any:
        return Cma(settings, settings.seed)

    def ask(self) -> Float32:
        self.points = np.asarray(self.search.ask())
        return self.space.population(0, self.points).prompts()

    def tell(self, losses: Float64) -> None:
        self.search.tell(self.points, losses)
        self.best = self.points[np.argmin(losses)]

    def found(self) -> Float32:
        points = [self.best, self.search.mean] if self.with_mean else [self.best]
        return np.stack([self.space.prompt(0, z) for z in points])


class VkdCmaEs(CmaEs):
    """CMA-ES with a covariance D (I + V Vᵀ) D of low rank (Akimoto and Hansen, GECCO 2016), by
    pycma.
    """

    def start(self, settings: Settings) -> Any:
        options = {"popsize": settings.popsize, "seed": settings.seed, "verbose": -9}
        options = GaussVkDSampler.extend_cma_options(options)
        return cma.CMAEvolutionStrategy(np.zeros(settings.intrinsic_dim), settings.sigma, options)


class MirroredEs:
    """Evolution strategies as in Salimans et al. (2017): mirrored samples, centred ranks, Adam. The
    mean is scored.

    prompts: from points (P, d), of which the origin is the start and 1 the scale of a word
    embedding.
    """

    def __init__(self, prompts: ToPrompts, d: int, seed: int, sigma: float, rate: float) -> None:
        self.prompts, self.sigma, self.rate = prompts, sigma, rate
        self.rng, self.steps = np.random.default_rng(seed), 0
        self.mean, self.first, self.second = np.zeros(d), np.zeros(d), np.zeros(d)
        self.noise = np.zeros((0, d))

    def ask(self) -> Float32:
        half = self.rng.standard_normal((POPSIZE // 2, len(self.mean)))
        self.noise = np.concatenate([half, -half])
        return self.prompts(self.mean + self.sigma * self.noise)

    def tell(self, losses: Float64) -> None:
        ranks = losses.argsort().argsort() / (len(losses) - 1) - 0.5
        gradient = ranks @ self.noise / (len(losses) * self.sigma)
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        self.mean = self.mean - self.rate * mean / (np.sqrt(square) + 1e-8)

    def found(self) -> Float32:
        return self.prompts(self.mean[None])


class LowRankSpsa:
    """As ZIP (Park et al., ICLR 2025): a prompt U diag(s) Vᵀ of low rank, and two-sided SPSA, whose
    estimate of the gradient is clipped to the norm √δ for δ parameters. An estimate takes two
    calls; the current prompt is scored.

    prompts: from points (P, n·H), as in `MirroredEs`.
    """

    def __init__(
        self,
        prompts: ToPrompts,
        shape: tuple[int, int],
        seed: int,
        size: float,
        rate: float,
        rank: int = 5,
    ) -> None:
        self.prompts, self.size, self.rate, self.rank, self.shape = prompts, size, rate, rank, shape
        self.rng, self.steps = np.random.default_rng(seed), 0
        n, H = shape
        v = self.rng.standard_normal((H, rank)) / np.sqrt(rank)
        self.point = np.concatenate(
            [np.zeros(n * rank), np.ones(rank), v.ravel()]
        )  # U = 0: the start, as elsewhere
        self.direction = np.zeros(0)

    def ask(self) -> Float32:
        self.steps += 1
        self.direction = self.rng.choice([-1.0, 1.0], len(self.point))
        return self.prompts(
            np.stack([self.of(self.point + side * self.width * self.direction) for side in (1, -1)])
        )

    def tell(self, losses: Float64) -> None:
        gradient = (losses[0] - losses[1]) / (2 * self.width) * self.direction
        most = np.sqrt(len(self.point))
        gradient = gradient * min(1.0, most / max(float(np.linalg.norm(gradient)), 1e-12))
        self.point = self.point - self.rate / self.steps**0.602 * gradient  # Spall's exponents

    def found(self) -> Float32:
        return self.prompts(self.of(self.point)[None])

    @property
    def width(self) -> float:
        return self.size / max(self.steps, 1) ** 0.101

    def of(self, point: Float64) -> Float64:
        """U diag(s) Vᵀ, flat."""
        (n, H), r = self.shape, self.rank
        u, s, v = np.split(point, [n * r, (n + 1) * r])
        return np.asarray((u.reshape(n, r) * s @ v.reshape(H, r).T).ravel())
