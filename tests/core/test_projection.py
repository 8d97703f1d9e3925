"""The random projection: its shapes, its distributions, and the same bits for every population."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from bbt_accel import Projection
from bbt_accel.core.population import Latent
from bbt_accel.core.projection import one_blas_thread, prompt_std
from bbt_accel.errors import UsageError


def test_prompt_is_az_plus_p0_row_major() -> None:
    A = np.arange(12, dtype=np.float32).reshape(6, 2)
    p0 = np.arange(6, dtype=np.float32)
    prompts = Projection(A, prompt_shape=(2, 3), p0=p0).prompts([[1.0, 10.0]])
    assert prompts.dtype == np.float32
    assert prompts.tolist() == [[[10, 33, 56], [79, 102, 125]]]


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_candidate_does_not_depend_on_its_population(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    projection = Projection.normal(rng, d=40, n=3, H=5, std=0.3)
    Z = rng.standard_normal((size, 40))
    together = projection.prompts(Z)
    alone = np.concatenate([projection.prompts(z[None]) for z in Z])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_latent_prompts_have_the_shape_of_the_prompts() -> None:
    projection = Projection.normal(0, d=7, n=3, H=5, std=0.3, p0=np.ones(15))
    Z = np.random.default_rng(0).standard_normal((4, 7))
    latent, prompts = Latent(projection, Z), projection.prompts(Z)
    assert (latent.shape, len(latent), latent.z.dtype) == (prompts.shape, 4, np.float32)
    with pytest.raises(UsageError, match=r"\(P, 7\)"):
        Latent(projection, Z[:, :6])


@given(st.integers(1, 24), st.integers(0, 24), st.integers(0, 24), st.integers(0, 24))
def test_a_slice_of_a_population_has_the_bits_of_the_population(
    size: int, start: int, stop: int, low: int
) -> None:
    projection = Projection.normal(0, d=150, n=10, H=48, std=0.3)
    latent = Latent(projection, np.random.default_rng(size).standard_normal((size, 150)))
    part = latent[start:stop][low:]
    assert part.project().tobytes() == latent.project()[start:stop][low:].tobytes()
    assert part.z.tobytes() == latent.z[start:stop][low:].tobytes()
    assert part.shape == part.project().shape


def test_candidates_are_cast_to_float32_before_the_product() -> None:
    projection = Projection(np.full((1, 1), 3.0), (1, 1))
    assert projection.prompts(np.array([[0.1]])).item() == np.float32(0.1) * np.float32(3.0)


def test_normal_matrix_has_the_standard_deviation_asked_for() -> None:
    A = Projection.normal(0, d=200, n=20, H=50, std=0.07).matrix
    assert A.shape == (1000, 200)
    assert A.std() == pytest.approx(0.07, rel=0.01)
    assert abs(A.mean()) < 0.001


def test_uniform_matrix_fills_torchs_linear_range() -> None:
    A = Projection.uniform(0, d=100, n=20, H=50).matrix
    assert np.abs(A).max() <= 0.1
    assert A.min() < -0.099 < 0.099 < A.max()


def test_a_seed_gives_one_matrix_and_another_seed_another() -> None:
    same, other = (Projection.normal(seed, 5, 2, 3, 1.0).matrix for seed in (3, 4))
    assert (Projection.normal(3, 5, 2, 3, 1.0).matrix == same).all()
    assert (same != other).any()


def test_first_prompts_look_like_word_embeddings() -> None:
    d, sigma, embedding_std = 300, 0.7, 0.12
    projection = Projection.normal(1, d, 10, 40, prompt_std(1.0, embedding_std, d, sigma))
    Z = np.random.default_rng(2).standard_normal((20, d)) * sigma
    assert projection.prompts(Z).std() == pytest.approx(embedding_std, rel=0.03)


@pytest.mark.parametrize(
    ("matrix", "p0"),
    [(np.zeros((5, 2)), None), (np.zeros(6), None), (np.zeros((6, 2)), np.zeros(5))],
)
def test_shapes_that_do_not_fit_are_refused(matrix: np.ndarray, p0: np.ndarray | None) -> None:
    with pytest.raises(UsageError, match="needs a matrix"):
        Projection(matrix, (2, 3), p0)


def test_there_is_one_blas_thread_while_any_python_thread_needs_it() -> None:
    def threads() -> int:
        return max(
            library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
        )

    with threadpool_limits(2, user_api="blas"):
        first, second = ExitStack(), ExitStack()
        first.enter_context(one_blas_thread)
        second.enter_context(one_blas_thread)
        first.close()
        assert threads() == 1
        second.close()
        assert threads() == 2


def test_candidates_of_another_dimension_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(P, 2\)"):
        Projection(np.zeros((6, 2)), (2, 3)).prompts(np.zeros((4, 3)))
