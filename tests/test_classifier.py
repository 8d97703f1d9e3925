"""PromptClassifier: scikit-learn's conventions on top of export, optimize, tune and predict."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from bbt_accel import PromptClassifier
from bbt_accel.demo import DATA
from bbt_accel.errors import BbtError, DataError, RunError

WORDS = ["sports", "financial", "computer", "health"]


@pytest.fixture(scope="module")
def rows() -> tuple[list[str], list[str]]:
    lines = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:80]]
    return [line["text"] for line in lines], [WORDS[line["label"]] for line in lines]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBT_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def fitted(rows: tuple[list[str], list[str]]) -> PromptClassifier:
    return PromptClassifier("demo", engine="ort", precision="fp32", budget=1, threads=1).fit(*rows)


def test_it_learns_from_texts_and_string_labels(fitted: PromptClassifier, rows: tuple[list[str], list[str]]) -> None:
    assert fitted.classes_.tolist() == sorted(WORDS)
    probabilities = fitted.predict_proba(rows[0][:5])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert fitted.predict(rows[0][:5]).tolist() == fitted.classes_[probabilities.argmax(1)].tolist()
    assert fitted.score(*rows) > 0.7


def test_a_saved_classifier_holds_everything(
    fitted: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    fitted.save(tmp_path / "saved")
    with pytest.raises(BbtError, match="exists already"):
        fitted.save(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    again = PromptClassifier.load(moved)
    np.testing.assert_array_equal(again.predict_proba(rows[0][:5]), fitted.predict_proba(rows[0][:5]))
    assert again.get_params() == fitted.get_params()
    assert again.run_.history == fitted.run_.history
    with pytest.raises(RunError, match="not a saved PromptClassifier"):
        PromptClassifier.load(tmp_path)


def test_it_follows_scikit_learn(fitted: PromptClassifier, rows: tuple[list[str], list[str]]) -> None:
    twin = clone(fitted)
    assert (twin.get_params(), hasattr(twin, "run_")) == (fitted.get_params(), False)
    assert pickle.loads(pickle.dumps(twin)).get_params() == fitted.get_params()
    with pytest.raises(BbtError, match="use save and load"):
        pickle.dumps(fitted)
    assert min(cross_val_score(twin, *rows, cv=2)) > 0.5


def test_pairs_and_mappings_are_rows_too() -> None:
    from bbt_accel.classifier import as_rows

    assert as_rows(["a"]) == [{"text": "a"}]
    assert as_rows([("a", "b")]) == [{"text1": "a", "text2": "b"}]
    assert as_rows([{"question": "a", "answer": "b"}]) == [{"question": "a", "answer": "b"}]
    for wrong in (3, None, [], ["a", 1]):
        with pytest.raises(DataError, match="row 2"):
            as_rows(["a", wrong])


@pytest.mark.parametrize(("X", "y"), [(["a"], []), ([], []), (["a", "b"], [0, 0]), (["a", "b", "c"], [0, 0, 1])])
def test_too_few_rows_or_labels_are_one_line(X: list[str], y: list[int]) -> None:
    with pytest.raises(DataError) as caught:
        PromptClassifier().fit(X, y)
    assert "\n" not in str(caught.value)
