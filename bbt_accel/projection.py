"""From a point of the search space to a soft prompt."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bbt_accel.batch import Float32
from bbt_accel.errors import UsageError


class Projection:
    """The fixed random projection of Black-Box Tuning: prompt = reshape(A z + p0, n × H), row-major.

    matrix: A, float32 (n·H, d).
    prompt_shape: (n, H), the prompt tokens and the hidden size.
    p0: float32 (n·H,), the initial prompt; zero unless given.

    Raises UsageError when the shapes don't fit.
    """

    def __init__(self, matrix: npt.ArrayLike, prompt_shape: tuple[int, int], p0: npt.ArrayLike | None = None) -> None:
        self.matrix: Float32 = np.ascontiguousarray(matrix, dtype=np.float32)
        self.prompt_shape = prompt_shape
        size = prompt_shape[0] * prompt_shape[1]
        self.p0: Float32 = np.zeros(size, np.float32) if p0 is None else np.asarray(p0, dtype=np.float32).ravel()
        if self.matrix.ndim != 2 or self.matrix.shape[0] != size or self.p0.shape != (size,):
            raise UsageError(
                f"a projection to prompts {prompt_shape} needs a matrix ({size}, d) and p0 ({size},); "
                f"got {self.matrix.shape} and {self.p0.shape}"
            )

    @classmethod
    def normal(
        cls, rng: np.random.Generator | int, d: int, n: int, H: int, std: float, p0: npt.ArrayLike | None = None
    ) -> Projection:
        """A with independent entries N(0, std²); `rng` is a generator or a seed. `prompt_std` gives the papers' std."""
        matrix = np.random.default_rng(rng).standard_normal((n * H, d), dtype=np.float32)
        return cls(np.multiply(matrix, np.float32(std), out=matrix), (n, H), p0)

    @classmethod
    def uniform(
        cls, rng: np.random.Generator | int, d: int, n: int, H: int, p0: npt.ArrayLike | None = None
    ) -> Projection:
        """A with independent entries U(-1/√d, 1/√d), which is how torch starts a Linear layer."""
        matrix = np.random.default_rng(rng).random((n * H, d), dtype=np.float32)
        return cls((2 * matrix - 1) / np.float32(math.sqrt(d)), (n, H), p0)

    def prompts(self, Z: npt.ArrayLike) -> Float32:
        """Prompts of a population: Z (P, d), cast to float32 as the original does; returns float32 (P, n, H).

        One matrix product for the population; a candidate's prompt does not depend on its neighbours beyond the
        rounding of that product.
        """
        z = self.checked(Z)
        prompts: Float32 = (z @ self.matrix.T + self.p0).reshape(len(z), *self.prompt_shape)
        return prompts

    def checked(self, Z: npt.ArrayLike) -> Float32:
        """Z as a contiguous float32 (P, d). Raises UsageError where it has another shape."""
        z = np.ascontiguousarray(Z, dtype=np.float32)
        if z.ndim != 2 or z.shape[1] != self.matrix.shape[1]:
            raise UsageError(f"candidates must have the shape (P, {self.matrix.shape[1]}), not {z.shape}")
        return z


class Latent:
    """Prompts of a population as what they are projected from, for engines that project where they compute.

    Z: (P, d), cast to float32. Length, shape and slices are those of the prompts, (P, n, H).
    Raises UsageError when Z does not fit the projection.
    """

    def __init__(self, projection: Projection, Z: npt.ArrayLike) -> None:
        self.projection, self.z = projection, projection.checked(Z)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.z), *self.projection.prompt_shape

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, some: slice) -> Latent:
        return Latent(self.projection, self.z[some])

    def compute(self) -> Float32:
        """The prompts, float32 (P, n, H)."""
        return self.projection.prompts(self.z)


Prompts = Float32 | Latent
"""Prompts, or what they are projected from."""


def computed(prompts: Prompts) -> Float32:
    """The prompts as an array."""
    return prompts.compute() if isinstance(prompts, Latent) else prompts


def prompt_std(alpha: float, embedding_std: float, d: int, sigma: float) -> float:
    """Standard deviation of A's entries, s = α·σ_e / (√d·σ), as BBTv2 derives it.

    With z ~ N(0, σ²) the entries of A z then have the standard deviation α·σ_e: a first prompt looks like α times a
    word embedding. embedding_std: σ_e, that of the word embeddings, or of the hidden states that enter a block.
    """
    return alpha * embedding_std / (math.sqrt(d) * sigma)
