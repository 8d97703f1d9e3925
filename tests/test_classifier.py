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
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from bbt_accel import Callback, PromptClassifier
from bbt_accel.classifier import as_labels, as_rows
from bbt_accel.demo import DATA
from bbt_accel.errors import BbtError, DataError, RunError
from bbt_accel.run import Run

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


def test_pipeline_grid_search_and_callbacks(rows: tuple[list[str], list[str]]) -> None:
    told: list[str] = []

    class Told(Callback):
        def on_end(self, run: Run) -> None:
            told.append(run.info.readout.name)

    estimator = PromptClassifier("demo", engine="ort", precision="fp32", budget=1, threads=1, callbacks=[Told()])
    lower = FunctionTransformer(lambda X: [text.lower() for text in X])
    grid = GridSearchCV(
        Pipeline([("lower", lower), ("clf", estimator)]), {"clf__readout": ["calibrated", "state"]}, cv=2
    )
    grid.fit(np.array(rows[0]), np.array(rows[1]))
    best = grid.best_params_["clf__readout"]
    assert told == ["calibrated", "calibrated", "state", "state", best]
    assert grid.score(*rows) > 0.6


def test_columns_of_other_libraries_are_rows_too() -> None:
    import datasets
    import pandas as pd
    import pyarrow as pa

    texts, two = ["a", "b"], [{"q": "a", "r": "c"}, {"q": "b", "r": "d"}]
    one = [{"text": "a"}, {"text": "b"}]
    for column in (np.array(texts), pd.Series(texts, index=[7, 9]), pa.array(texts), pa.chunked_array([texts])):
        assert as_rows(column) == one
        assert as_labels(column).tolist() == texts
    data = datasets.Dataset.from_list(two)
    assert as_rows(data["q"]) == one
    assert as_labels(data["q"]).tolist() == texts
    for table in (pd.DataFrame(two), pa.Table.from_pylist(two), data):
        assert as_rows(table) == two
    assert as_rows(np.array([["a", "c"], ["b", "d"]])) == [{"text1": "a", "text2": "c"}, {"text1": "b", "text2": "d"}]


@pytest.mark.parametrize(
    ("y", "complaint"),
    [
        (None, "requires y to be passed"),
        ([0, None, 1], "missing labels"),
        (["a", "", "b"], "missing labels"),
        ([0.5, 1.25, 2.0], "not one class for each text"),
        ([[0, 1], [1, 0]], "not one class for each text"),
    ],
)
def test_labels_that_are_none_are_one_line(y: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        PromptClassifier().fit(["a", "b", "c"], y)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # which scikit-learn's users catch


def test_rows_of_other_columns_are_refused(fitted: PromptClassifier) -> None:
    with pytest.raises(DataError, match="the rows have text1, text2, those of fit had text"):
        fitted.predict([("a", "b")])
    with pytest.raises(DataError, match="row 2 has b, the first row a"):
        fitted.predict([{"a": "x"}, {"b": "x"}])
    assert fitted.predict_proba([]).shape == (0, 4)


def test_a_label_word_of_several_tokens_is_warned_of(rows: tuple[list[str], list[str]]) -> None:
    estimator = PromptClassifier("demo", engine="ort", precision="fp32", readout="calibrated", budget=1, threads=1)
    estimator.set_params(label_words=["sports", "financial", "antidisestablishmentarianism", "health"])
    with pytest.warns(
        UserWarning, match="label word 'antidisestablishmentarianism' only the first token is read: 'anti"
    ):
        estimator.fit(*rows)


def test_pairs_and_mappings_are_rows_too() -> None:
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


def test_it_becomes_a_package(fitted: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path) -> None:
    fitted.package(tmp_path / "package")
    info = json.loads((tmp_path / "package" / "bbt_accel.json").read_text(encoding="utf-8"))
    assert info["labels"] == sorted(WORDS)
    assert (info["comparison"]["rows"] > 80, info["comparison"]["labels_differ"]) == (True, 0)
    assert (tmp_path / "package" / "onnx" / "model.onnx").is_file()
