from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.data import load_rows
from bbt_accel.encoding import Encoder
from bbt_accel.engines.dummy import DummyEngine
from bbt_accel.errors import BundleError, DataError
from bbt_accel.inference import evaluate, predict
from bbt_accel.objective import Objective
from bbt_accel.readout import log_softmax
from bbt_accel.run import Run

TEXTS = [{"text": f"w{i} w{i + 1}"} for i in range(80)]


@pytest.fixture(params=["bbt", "bbtv2"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    bundle = search_bundle(tmp_path / "bundle", request.param)
    task = task_file(tmp_path / "data")
    return tune(
        bundle, task, data=tmp_path / "data", engine="dummy", output=tmp_path / "run", settings=SETTINGS, progress=False
    )


def test_evaluate_scores_every_test_row_with_and_without_the_prompt(run: Run, tmp_path: Path) -> None:
    report = evaluate(run.path)
    rows = load_rows(run.task, "test", tmp_path / "data")
    engine = DummyEngine(run.open_bundle())
    batch = Encoder(engine.bundle, run.task).encode(rows)  # 70 rows at once, which evaluate splits in two
    logits = engine.bind(batch).label_logits(np.stack([run.prompt, np.zeros_like(run.prompt)]))
    plain = log_softmax(logits[1])
    _, (score, without, calibrated) = Objective().score(np.stack([*logits, plain - plain.mean(0)]), batch.targets)
    assert (report["score"], report["without_prompt"], report["calibrated"]) == (score, without, calibrated)
    assert (report["split"], report["metric"], report["rows"], report["engine"]) == ("test", "accuracy", 70, "dummy")
    dev = evaluate(run.path, split="dev")
    assert run.info.best is not None
    assert (dev["rows"], dev["score"]) == (6, run.info.best.dev_score)


def test_predict_returns_labels_and_probabilities_in_order(run: Run) -> None:
    answers = predict(run.path, TEXTS)
    assert len(answers) == 80
    for answer in answers:
        assert answer["probabilities"].keys() == {"bad", "great"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["word"] == ["bad", "great"][answer["label"]]
        assert answer["probabilities"][answer["word"]] == max(answer["probabilities"].values())
    assert predict(run.path, TEXTS[70:]) == answers[70:]
    assert predict(run.path, []) == []


def test_predict_names_a_missing_column(run: Run) -> None:
    with pytest.raises(DataError, match="row 2 has no text 'text'"):
        predict(run.path, [{"text": "w1"}, {"sentence": "w2"}])


def test_run_and_bundle_may_move_together(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "bundle"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert predict(tmp_path / "elsewhere" / "run", TEXTS[:1])


def test_a_run_alone_may_move(run: Run, tmp_path: Path) -> None:
    shutil.move(run.path, tmp_path / "data" / "moved")
    assert predict(tmp_path / "data" / "moved", TEXTS[:1])


def test_a_bundle_that_changed_is_refused_unless_it_is_named(run: Run, tmp_path: Path) -> None:
    method = run.info.bundle.method
    search_bundle(tmp_path / "bundle", method, precision="fp16")
    with pytest.raises(BundleError, match="not the bundle"):
        evaluate(run.path)
    assert evaluate(run.path, bundle=tmp_path / "bundle")["bundle"] == str(tmp_path / "bundle")


def test_a_bundle_of_the_other_method_is_refused(run: Run, tmp_path: Path) -> None:
    other = search_bundle(tmp_path / "other", "bbtv2" if run.info.bundle.method == "bbt" else "bbt")
    with pytest.raises(BundleError, match="method"):
        predict(run.path, TEXTS[:1], bundle=other.path)
