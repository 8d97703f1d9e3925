"""What a search tells while it runs, and the trackers that listen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import Callback, tune
from bbt_accel.errors import BbtError, MissingDependency, NonFiniteLoss, UsageError
from bbt_accel.search.callbacks import TRACKERS
from bbt_accel.search.history import Generation
from bbt_accel.search.run import Run, RunInfo

Tune = Callable[..., Run]


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_start(self, info: RunInfo, folder: Path) -> None:
        self.seen.append(("start", info.task.name))

    def on_generation(self, generation: Generation) -> None:
        self.seen.append(("generation", generation.generation))

    def on_score(self, generation: Generation) -> None:
        self.seen.append(("score", generation.dev_score))

    def on_end(self, run: Run) -> None:
        self.seen.append(("end", run.path.name))

    def close(self) -> None:
        self.seen.append(("close", None))


@pytest.fixture
def start(tmp_path: Path) -> Tune:
    bundle, task = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")

    def call(**more: Any) -> Run:
        options = {
            "data": tmp_path / "data",
            "engine": "dummy",
            "output": tmp_path / "run",
            "settings": SETTINGS,
        }
        return tune(bundle, task, progress=False, **{**options, **more})

    return call


def test_a_callback_is_told_everything_in_order(start: Tune) -> None:
    recorder = Recorder()
    run = start(callbacks=[recorder])
    expected: list[tuple[str, Any]] = [("start", "toy")]
    for generation in run.history:
        expected.append(("generation", generation.generation))
        if generation.dev_score is not None:
            expected.append(("score", generation.dev_score))
    assert recorder.seen == [*expected, ("end", "run"), ("close", None)]
    assert sum(name == "score" for name, _ in expected) > 2


def test_an_error_of_a_callback_is_not_taken_for_a_full_disk(start: Tune) -> None:
    class Failing(Recorder):
        def on_generation(self, generation: Generation) -> None:
            raise ConnectionError("my tracker is down")

    with pytest.raises(ConnectionError, match="my tracker is down"):
        start(callbacks=[Failing()])


def test_a_callback_is_closed_after_an_error(start: Tune) -> None:
    class Failing(Recorder):
        def on_generation(self, generation: Generation) -> None:
            super().on_generation(generation)
            if generation.generation == 2:
                raise NonFiniteLoss("enough")

    failing, recorder = Failing(), Recorder()
    with pytest.raises(NonFiniteLoss):
        start(callbacks=[failing])
    assert failing.seen[-1] == ("close", None)
    assert ("end", "run") not in failing.seen
    start(callbacks=[recorder], resume=True)  # begins with what is known
    assert recorder.seen[1] == ("generation", 0)
    assert recorder.seen[-2:] == [("end", "run"), ("close", None)]


def test_unknown_and_missing_trackers_are_one_line(
    start: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="unknown tracker 'wanddb'; did you mean wandb"):
        start(track=["wanddb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingDependency, match=r'wandb is not installed; pip install "bbt-accel\[wandb\]"'
    ):
        start(track=["wandb"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_the_interface_of_weights_and_biases(
    start: Tune, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    begun: list[dict[str, Any]] = []
    library = ModuleType(name)
    library.__dict__.update(
        init=lambda **given: begun.append(given),
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: begun.append({"finished": True}),
    )
    monkeypatch.setitem(sys.modules, name, library)
    run = start(track=[name])
    assert (begun[0]["project"], begun[0]["name"], begun[0]["config"]["budget"]) == (
        "bbt-accel-toy",
        "run",
        80,
    )
    assert begun[1:] == [{"finished": True}]
    assert [step for step, _ in logged] == [*(g.calls for g in run.history), run.info.calls]
    assert logged[0][1]["best_loss"] == run.history[0].best_loss
    assert run.info.best is not None
    assert logged[-1][1]["best_dev_score"] == run.info.best.dev_score


def test_mlflow_holds_settings_metrics_and_files(
    start: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    run = start(track=["mlflow"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("bbt-accel toy")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name, found.data.params["budget"]) == (
        "FINISHED",
        "run",
        "80",
    )
    losses = client.get_metric_history(found.info.run_id, "best_loss")
    assert [(m.step, m.value) for m in losses] == [(g.calls, g.best_loss) for g in run.history]
    assert run.info.best is not None
    assert found.data.metrics["best_dev_score"] == run.info.best.dev_score
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert files == {p.name for p in run.path.iterdir()}


def test_a_tracker_that_does_not_start_is_one_line(
    start: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("no such store\nmore")

    monkeypatch.setitem(TRACKERS, "mlflow", refuse)
    with pytest.raises(
        BbtError, match=r"^tracker mlflow does not start \(no such store\); see its documentation$"
    ):
        start(track=["mlflow"])


def test_a_tracker_that_fails_is_one_line_and_the_search_goes_on_without_it(
    start: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Callback):
        def on_generation(self, generation: Generation) -> None:
            if generation.generation == 1:
                raise ConnectionError("no route to host\nmore")

        def close(self) -> None:
            raise RuntimeError("no route either")

    monkeypatch.setitem(TRACKERS, "mlflow", Gone)
    with pytest.raises(
        BbtError, match=r"^the tracker mlflow failed \(no route to host\); --resume .* continues"
    ):
        start(track=["mlflow"])
    assert start(resume=True).info.status == "done"
    monkeypatch.setattr(Gone, "on_generation", Callback.on_generation)
    with pytest.raises(BbtError, match=r"no route either.*the run is complete"):
        start(track=["mlflow"], overwrite=True)


def test_every_tracker_has_an_extra() -> None:
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert set(TRACKERS) <= set(tomllib.loads(text)["project"]["optional-dependencies"])
