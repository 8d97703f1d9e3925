"""What a run says about itself: its curve, and in words whether the search was worth it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.core.objective import Objective, uninformed, wilson
from bbt_accel.search.learning_curve import draw_curve, draw_scores
from bbt_accel.search.run import Baselines, BestRecord, Run, RunInfo


@pytest.fixture(params=["verbalizer", "auto"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    bundle, task = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")
    settings = {**SETTINGS, "readout": request.param}
    options: dict[str, Any] = {
        "data": tmp_path / "data",
        "engine": "dummy",
        "progress": False,
        "settings": settings,
    }
    return tune(bundle, task, output=tmp_path / "run", **options)


def test_a_run_records_what_takes_no_search(run: Run) -> None:
    from bbt_accel.predict.inference import evaluate

    dev = evaluate(run.path, split="dev")
    assert run.info.baselines is not None
    names = ("chance", "majority", "without_prompt", "batch_calibrated")
    assert run.info.baselines.model_dump() == {name: dev[name] for name in names}
    assert Run.read(run.path).info.baselines == run.info.baselines


def test_the_curve_shows_no_path(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.suptitle", lambda self, title, **_: titles.append(title)
    )
    bundle = run.info.bundle.model_copy(update={"backbone": "/home/alice/checkpoint"})
    draw_curve(tmp_path / "curve.png", run.history, run.info.model_copy(update={"bundle": bundle}))
    assert titles == ["toy · checkpoint · bbt · dummy"]


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.25, "at or below chance"),
        (0.4, "at or below chance"),  # the most frequent class
        (0.45, "no better on the dev rows than the label words without a prompt"),
        (0.5, "no better on the dev rows than the label words without a prompt"),
        (0.6, "calibrated without a search; --readout auto begins there"),
        (0.7, None),
    ],
)
def test_a_search_that_was_not_worth_it_is_told_in_words(score: float, words: str | None) -> None:
    best = BestRecord(generation=3, calls=80, dev_score=score, dev_loss=1.0)
    baselines = Baselines(chance=0.25, majority=0.4, without_prompt=0.5, batch_calibrated=0.6)
    info: Any = SimpleNamespace(
        best=best, baselines=baselines, settings=SimpleNamespace(fitted=False)
    )
    found = RunInfo.verdict(info)
    assert (found is None) == (words is None)
    assert (words or "") in (found or "")


def test_the_curve_shows_baselines_and_the_uncertainty_of_few_rows(run: Run) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_scores(axes, run.history, run.info)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] >= 1
    assert run.info.baselines is not None
    lines = {float(line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == "--"}  # type: ignore[index]
    assert lines == {
        run.info.baselines.chance,
        run.info.baselines.without_prompt,
        run.info.baselines.batch_calibrated,
    }
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert "95 % interval, 6 rows" in labels


def test_wilsons_interval() -> None:
    low, high = wilson(np.array([0.0, 0.5, 1.0]), 64)
    np.testing.assert_allclose(low, [0, 0.381, 0.943], atol=1e-3)
    np.testing.assert_allclose(high, [0.057, 0.619, 1], atol=1e-3)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
@pytest.mark.parametrize("classes", [[0, 1, 1, 1, 0, 1], [0, 1]])
def test_scores_without_information(metric: Any, classes: list[int]) -> None:
    targets = np.tile(classes, 300 // len(classes))
    chance, majority = uninformed(targets, 2, metric)
    always = np.tile([0.0, 1.0], (300, 1))
    assert majority == Objective("ce", metric).score(always[None], targets)[1][0]
    drawn = np.eye(2)[np.random.default_rng(0).integers(0, 2, (400, 300))]
    assert chance == pytest.approx(
        Objective("ce", metric).score(drawn, targets)[1].mean(), abs=0.005
    )
