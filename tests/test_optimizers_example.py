"""The optimizers of examples/optimizers: every one lowers a loss, and does the same again; and the
README's table.
"""

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
from search_parts import SETTINGS as SEARCH
from search_parts import search_bundle, task_file
from sklearn.linear_model import Ridge

from bbt_accel import load_engine, load_task, tune
from bbt_accel.benchmarks.compare_report import CompareReport, summary
from bbt_accel.core.settings import Settings
from bbt_accel.predict.inference import evaluate
from bbt_accel.search.methods import PromptSpace

EXAMPLE = Path(__file__).parents[1] / "examples" / "optimizers"


def script(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLE))
        return SimpleNamespace(**runpy.run_path(str(EXAMPLE / f"{name}.py")))


optimizers, ridge, mean, run = map(script, ("optimizers", "ridge", "mean", "run"))
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
    x, targets = (
        np.random.default_rng(seed).standard_normal((rows, words)),
        np.arange(rows) % classes,
    )
    wanted = ridge.signs(targets)
    errors = []
    for i in range(rows):
        others = np.arange(rows) != i
        model = Ridge(alpha=penalty).fit(x[others], wanted[others])
        errors.append((model.predict(x[i : i + 1])[0] - wanted[i]) ** 2)
    assert ridge.leave_one_out(x, targets, penalty) == pytest.approx(np.mean(errors))
    weight, bias = ridge.fit(x, targets, penalty)
    np.testing.assert_allclose(
        x @ weight + bias, Ridge(alpha=penalty).fit(x, wanted).predict(x), atol=1e-8
    )


def test_the_prompt_that_a_run_chose_is_chosen_again_without_the_means(tmp_path: Path) -> None:
    bundle, file = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data" / "toy")
    own = {**SEARCH, "readout": "verbalizer", "budget": 80, "popsize": 4, "eval_every": 12}
    tuned = tune(
        bundle,
        file,
        data=file.parent,
        engine="dummy",
        output=tmp_path / "run",
        settings=own,
        progress=False,
    )
    data = file.parent.rename(file.parent.with_name(tuned.task.name)).parent
    scores = {s.contender: s.score for s in mean.contend(tuned, data, [40, 80], 70, 1)}
    assert len(scores) == 4
    assert (
        scores["best candidate, 80 calls"]
        == evaluate(tuned.path, data=data / tuned.task.name)["score"]
    )


def test_the_loss_of_a_search_with_a_ridge_classifier_is_its_leave_one_out_error(
    tmp_path: Path,
) -> None:
    bundle, file = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")
    prompts = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    with load_engine(bundle, "dummy") as engine:
        given = engine, load_task(file), file.parent, Settings(k_shot=5, seed=3), 20
        rows = run.RidgeRows(*given, words=8, penalty=2.0)
        x = rows.features(rows.bound[0], prompts)
        assert x.shape == (3, 10, 8)
        wanted = [ridge.leave_one_out(own, rows.targets[0], 2.0) for own in x]
        np.testing.assert_allclose(rows.losses(prompts), wanted)
        assert 0 <= rows.score(prompts[0]) <= 1


def test_the_table_of_the_readme_is_that_of_the_recorded_report() -> None:
    report = CompareReport.model_validate_json(
        (EXAMPLE / "recorded" / "report.json").read_text(encoding="utf-8")
    )
    (own, recorded), gains = (
        map(rows, ((EXAMPLE / "README.md").read_text(encoding="utf-8"), summary(report))),
        {},
    )
    for found in report.differences:  # the report subtracts in the other direction
        assert found.interval is not None
        mean, high, low = (round(-100 * value, 1) + 0.0 for value in (found.mean, *found.interval))
        gains[found.other] = f"{mean:+.1f} ({low:.1f} to {high:.1f})".replace("-", "−")
    shown = {name: cells for name, cells in own.items() if name in recorded and "±" in cells[0]}
    scores = {name: cells[:5] for name, cells in recorded.items() if "±" in cells[0]}
    assert shown == {name: [*cells, gains.get(name, "")] for name, cells in scores.items()}


def rows(text: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    return {name: cells for name, *cells in lines}
