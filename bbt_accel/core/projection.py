"""The random projection from a point of the search space to a soft prompt."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from bbt_accel.core.batch import Float32
from bbt_accel.errors import UsageError

Seed = np.random.Generator | int


class Projection:
    """The fixed random projection of Black-Box Tuning: prompt = reshape(A z + p0, n × H),
    row-major.

    matrix: A, float32 (n·H, d).
    prompt_shape: (n, H), the prompt tokens and the hidden size.
    p0: float32 (n·H,), the initial prompt; zero unless given.
    Raises UsageError for shapes that do not match.
    """

    def __init__(
        self, matrix: npt.ArrayLike, prompt_shape: tuple[int, int], p0: npt.ArrayLike | None = None
    ) -> None:
        self.matrix: Float32 = np.ascontiguousarray(matrix, dtype=np.float32)
        self.prompt_shape = prompt_shape
        size = prompt_shape[0] * prompt_shape[1]
        self.p0: Float32 = (
            np.zeros(size, np.float32) if p0 is None else np.asarray(p0, dtype=np.float32).ravel()
        )
        if self.matrix.ndim != 2 or self.matrix.shape[0] != size or self.p0.shape != (size,):
            raise UsageError(
                f"a projection to prompts {prompt_shape} needs a matrix ({size}, d) and "
                f"p0 ({size},); got {self.matrix.shape} and {self.p0.shape}"
            )

    @classmethod
    def normal(
        cls, rng: Seed, d: int, n: int, H: int, std: float, p0: npt.ArrayLike | None = None
    ) -> Projection:
        """A with independent entries N(0, std²), for d dimensions, n prompt tokens and the hidden
        size H.

        rng: a generator or a seed. std: `prompt_std` gives the papers'. p0: as in `Projection`.
        """
        matrix = np.random.default_rng(rng).standard_normal((n * H, d), dtype=np.float32)
        return cls(np.multiply(matrix, np.float32(std), out=matrix), (n, H), p0)

    @classmethod
    def uniform(
        cls, rng: Seed, d: int, n: int, H: int, p0: npt.ArrayLike | None = None
    ) -> Projection:
        """A with independent entries U(-1/√d, 1/√d), torch's default initialization of a Linear
        layer.

        Arguments as in `normal`.
        """
        matrix = np.random.default_rng(rng).random((n * H, d), dtype=np.float32)
        return cls((2 * matrix - 1) / np.float32(math.sqrt(d)), (n, H), p0)

    def prompts(self, Z: npt.ArrayLike) -> Float32:
        """Prompts of a population: Z (P, d), cast to float32 as the original does; returns float32
        (P, n, H).

        One matrix product for the population, on one BLAS thread; a candidate's prompt does not
        depend on the other candidates beyond the rounding of that product.
        """
        z = self.check(Z)
        with one_blas_thread:
            return (z @ self.matrix.T + self.p0).reshape(len(z), *self.prompt_shape)

    def check(self, Z: npt.ArrayLike) -> Float32:
        """Z as a contiguous float32 (P, d). Raises UsageError for another shape."""
        z = np.ascontiguousarray(Z, dtype=np.float32)
        if z.ndim != 2 or z.shape[1] != self.matrix.shape[1]:
            raise UsageError(
                f"candidates must have the shape (P, {self.matrix.shape[1]}), not {z.shape}"
            )
        return z


def prompt_std(alpha: float, embedding_std: float, d: int, sigma: float) -> float:
    """Standard deviation of A's entries, s = α·σ_e / (√d·σ), as BBTv2 derives it.

    With z ~ N(0, σ²) the entries of A z then have the standard deviation α·σ_e: at first a prompt
    has α times the scale of a word embedding. embedding_std: σ_e of the word embeddings, or of the
    hidden states that enter a block.
    """
    return alpha * embedding_std / (math.sqrt(d) * sigma)


class OneBlasThread(AbstractContextManager[None]):
    """One BLAS thread while a block runs: the last bits of a product depend on the number of
    threads.

    That number is the process's. So the last of several Python threads to leave a block restores
    what the first found.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()


one_blas_thread = OneBlasThread()


@cache
def _controller() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401 - with a BLAS of its own, which is not limited unless it is loaded now

    return ThreadpoolController()
