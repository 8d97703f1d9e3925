"""The optimizers of examples/optimizers: every one lowers a loss, and does the same again."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import search_bundle
from sklearn.linear_model import Ridge

from bbt_accel.settings import Settings
from bbt_accel.tuning.methods import PromptSpace

EXAMPLE = Path(__file__).parents[1] / "examples" / "optimizers"
optimizers, ridge = (SimpleNamespace(**runpy.run_path(str(EXAMPLE / f"{name}.py"))) for name in ("optimizers", "ridge"))
SHAPE = (4, 3)  # of the prompts of `search_bundle`
SETTINGS = Settings(intrinsic_dim=6, seed=3)


def direct(points: np.ndarray) -> np.ndarray:
    return points.reshape(-1, *SHAPE).astype(np.float32)


def made(tmp_path: Path) -> dict[str, Callable[[], Any]]:
    space = PromptSpace(search_bundle(tmp_path), SETTINGS)
    return {
        "CMA-ES": lambda: optimizers.CmaEs(space, SETTINGS),
        "mean": lambda: optimizers.CmaEs(space, SETTINGS, mean=True),
        "VkD": lambda: optimizers.VkdCmaEs(space, SETTINGS),
        "mirrored": lambda: optimizers.MirroredEs(direct, 12, seed=3, sigma=0.3, rate=0.1),
        "SPSA": lambda: optimizers.LowRankSpsa(direct, SHAPE, seed=3, size=0.1, rate=0.1, rank=3),
    }


@pytest.mark.parametrize("name", ["CMA-ES", "mean", "VkD", "mirrored", "SPSA"])
def test_an_optimizer_approaches_the_prompt_with_the_lowest_loss(tmp_path: Path, name: str) -> None:
    space = PromptSpace(search_bundle(tmp_path), SETTINGS)
    wanted = space.prompt(0, np.linspace(-1, 1, 6))  # within reach of a search on the projection

    def losses(prompts: np.ndarray) -> np.ndarray:
        return np.asarray(((prompts - wanted) ** 2).sum((1, 2)), np.float64)

    def searched() -> np.ndarray:
        optimizer = made(tmp_path)[name]()
        for _ in range(200):
            optimizer.tell(losses(optimizer.ask()))
        return np.asarray(optimizer.found())

    found = searched()
    assert losses(found).min() < 0.1 * losses(np.zeros((1, *SHAPE)))[0]
    np.testing.assert_array_equal(found, searched())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(4, 20), words=st.integers(1, 30), classes=st.integers(2, 4),
    penalty=st.floats(0.1, 1000),
)  # fmt: skip
def test_the_leave_one_out_error_of_a_ridge_classifier_is_that_of_fits_without_each_row(
    seed: int, rows: int, words: int, classes: int, penalty: float
) -> None:
    x, targets = np.random.default_rng(seed).standard_normal((rows, words)), np.arange(rows) % classes
    wanted = ridge.signs(targets)
    errors = []
    for i in range(rows):
        others = np.arange(rows) != i
        model = Ridge(alpha=penalty).fit(x[others], wanted[others])
        errors.append((model.predict(x[i : i + 1])[0] - wanted[i]) ** 2)
    assert ridge.leave_one_out(x, targets, penalty) == pytest.approx(np.mean(errors))
    weight, bias = ridge.fit(x, targets, penalty)
    np.testing.assert_allclose(x @ weight + bias, Ridge(alpha=penalty).fit(x, wanted).predict(x), atol=1e-8)
