"""The optimizers of examples/optimizers: every one lowers a loss, and does the same again."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from search_parts import search_bundle

from bbt_accel.settings import Settings
from bbt_accel.tuning.methods import PromptSpace

EXAMPLE = Path(__file__).parents[1] / "examples" / "optimizers" / "optimizers.py"
optimizers = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))
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
