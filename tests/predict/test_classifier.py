"""PromptClassifier: scikit-learn's conventions on top of export, optimize, tune and predict."""

from __future__ import annotations

import gc
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny_backbones import N_PROMPT

from bbt_accel import Bundle, Callback, PromptClassifier
from bbt_accel.core.demo import DATA
from bbt_accel.core.option_types import FIT_BUDGET
from bbt_accel.errors import BbtError, DataError, EngineError, NonFiniteLoss, RunError
from bbt_accel.package.package import Options, check_package, package_run
from bbt_accel.predict.bundle_cache import cache_folder
from bbt_accel.predict.classifier import as_json, as_labels, as_rows, of_run
from bbt_accel.search.evaluator import LocalEvaluator
from bbt_accel.search.run import Run

WORDS = ["sports", "financial", "computer", "health"]


@pytest.fixture(scope="module")
def rows() -> tuple[list[str], list[str]]:
    lines = [
        json.loads(line)
        for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    ]
    return [line["text"] for line in lines], [WORDS[line["label"]] for line in lines]


@pytest.fixture(scope="module", autouse=True)
def cache(bundle_cache: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BBT_ACCEL_CACHE", str(bundle_cache))
        yield


@pytest.fixture(scope="module")
def fitted(rows: tuple[list[str], list[str]]) -> PromptClassifier:
    return PromptClassifier("demo", engine="ort", precision="fp32", budget=1, threads=1).fit(*rows)


@pytest.fixture
def small(shared: Path) -> PromptClassifier:
    """Of a random backbone, which learns little and computes fast; not fitted yet."""
    options: dict[str, Any] = {"engine": "ort", "precision": "fp32", "budget": 1, "threads": 1}
    return PromptClassifier(
        str(shared / "roberta"), n_prompt_tokens=N_PROMPT, label_words=[*"wxyz"], **options
    )


def test_it_learns_from_texts_and_string_labels(
    fitted: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    assert fitted.classes_.tolist() == sorted(WORDS)
    probabilities = fitted.predict_proba(rows[0][:5])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert fitted.predict(rows[0][:5]).tolist() == fitted.classes_[probabilities.argmax(1)].tolist()
    assert fitted.score(*rows) > 0.7


def test_classes_are_as_frequent_as_in_y_unless_balanced(rows: tuple[list[str], list[str]]) -> None:
    texts, labels = rows
    kept = [i for i, label in enumerate(labels) if label != WORDS[0] or labels[:i].count(label) < 4]
    X, y = [texts[i] for i in kept], [labels[i] for i in kept]
    options = {"engine": "ort", "precision": "fp32", "budget": 1, "threads": 1}
    found, balanced = (
        PromptClassifier("demo", balanced=b, **options).fit(X, y) for b in (False, True)
    )  # type: ignore[arg-type]
    assert found.run_.info.data.train_rows > 3 * 4 + 2  # the rare class alone gives fewer examples
    rare = list(found.classes_).index(WORDS[0])
    mean, as_often = (
        fitted.predict_proba(texts)[:, rare].mean() for fitted in (found, balanced)
    )  # of balanced texts
    assert mean < as_often - 0.02
    assert balanced.run_.task.class_shares == [1, 1, 1, 1]


def test_a_saved_classifier_holds_everything(
    fitted: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    fitted.save(tmp_path / "saved")
    with pytest.raises(BbtError, match="exists already"):
        fitted.save(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    again = PromptClassifier.load(moved)
    np.testing.assert_array_equal(
        again.predict_proba(rows[0][:5]), fitted.predict_proba(rows[0][:5])
    )
    assert again.get_params() == fitted.get_params()
    assert again.run_.history == fitted.run_.history
    elsewhere = PromptClassifier.load(moved, engine="ort", device="cpu", threads=2)
    np.testing.assert_allclose(
        elsewhere.predict_proba(rows[0][:5]), fitted.predict_proba(rows[0][:5]), atol=1e-5
    )
    assert elsewhere.threads == 2
    with pytest.raises(EngineError, match="was made for ort, engine openvino reads"):
        PromptClassifier.load(moved, engine="openvino")
    with pytest.raises(RunError, match="not a saved PromptClassifier"):
        PromptClassifier.load(tmp_path)


def test_a_classifier_is_used_from_several_threads(
    small: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    """As a web server does: an engine has the outputs of one call at a time."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    small.set_params(engine="openvino").fit(rows[0][:16], rows[1][:16])
    parts = [rows[0][i : i + 1 + i % 3] for i in range(8)]
    wanted = [small.predict_proba(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: small.predict_proba(parts[i % 8]), range(200)))
    for i, probabilities in enumerate(found):
        np.testing.assert_allclose(probabilities, wanted[i % 8], atol=1e-6)


def test_a_loaded_classifier_does_not_depend_on_the_working_directory(
    fitted: PromptClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted.save("saved")
    loaded, other = (
        PromptClassifier.load("saved"),
        PromptClassifier.load("saved", bundle="saved/bundle"),
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    loaded.save("copy")
    other.save("other")
    assert PromptClassifier.load("copy").run_.history == loaded.run_.history == fitted.run_.history


@pytest.mark.filterwarnings(
    "error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning"
)
def test_the_run_of_a_fit_lives_as_long_as_it_is_used(
    small: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    run = clone(small).fit(rows[0][:16], rows[1][:16]).run_
    gc.collect()
    assert Run.read(run.path).history == run.history
    folder = run.path
    del run
    gc.collect()
    assert not folder.exists()


def test_no_budget_is_that_of_a_fit(
    small: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    small.set_params(budget=None, readout="calibrated").fit(rows[0][:16], rows[1][:16])
    assert small.run_.info.settings.budget == FIT_BUDGET


def test_another_bundle_is_saved_as_the_one_that_computes(
    fitted: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    bundle = Bundle.read(
        cache_folder("demo", fitted.method, fitted.prompt_mode, fitted.n_prompt_tokens)
    )
    loaded = PromptClassifier.load(fitted.run_.path, bundle=bundle.path, threads=1)
    loaded.save(tmp_path / "saved")
    again = PromptClassifier.load(tmp_path / "saved")
    assert bundle.digest == again.run_.info.bundle.digest != fitted.run_.info.bundle.digest
    np.testing.assert_array_equal(
        again.predict_proba(rows[0][:5]), loaded.predict_proba(rows[0][:5])
    )


def test_copies_of_a_text_are_used_once(
    small: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    X, y = rows[0][:40], rows[1][:40]
    copies = [i for i, label in enumerate(y) if label == WORDS[0]] * 3
    small.set_params(balanced=True)
    plain = clone(small).fit(X, y)
    more = clone(small).fit([*X, *(f" {X[i]}\n" for i in copies)], [*y, *(y[i] for i in copies)])
    np.testing.assert_array_equal(more.predict_proba(X), plain.predict_proba(X))
    with pytest.raises(DataError, match="the rarest has 1 of the different texts"):
        more.fit(["good", "good", "bad", "worse"], [1, 1, 0, 0])


def test_it_follows_scikit_learn(
    fitted: PromptClassifier, small: PromptClassifier, rows: tuple[list[str], list[str]]
) -> None:
    twin = clone(fitted)
    assert (twin.get_params(), hasattr(twin, "run_")) == (fitted.get_params(), False)
    assert pickle.loads(pickle.dumps(twin)).get_params() == fitted.get_params()
    with pytest.raises(BbtError, match="use save and load"):
        pickle.dumps(fitted)
    scores = cross_val_score(small, *rows, cv=2)
    assert (scores.shape, np.isfinite(scores).all()) == ((2,), True)


def test_pipeline_grid_search_and_callbacks(rows: tuple[list[str], list[str]]) -> None:
    told: list[str] = []

    class Told(Callback):
        def on_end(self, run: Run) -> None:
            told.append(run.info.readout.name)

    estimator = PromptClassifier(
        "demo", engine="ort", precision="fp32", budget=1, threads=1, callbacks=[Told()]
    )
    lower = FunctionTransformer(lambda X: [text.lower() for text in X])
    grid = GridSearchCV(
        Pipeline([("lower", lower), ("clf", estimator)]),
        {"clf__readout": ["calibrated", "state"]},
        cv=2,
    )
    grid.fit(np.array(rows[0]), np.array(rows[1]))
    best = grid.best_params_["clf__readout"]
    assert told == ["calibrated", "calibrated", "state", "state", best]
    assert grid.score(*rows) > 0.6


def test_columns_of_other_libraries_are_rows_too() -> None:
    import datasets
    import pyarrow as pa

    texts, two = ["a", "b"], [{"q": "a", "r": "c"}, {"q": "b", "r": "d"}]
    one = [{"text": "a"}, {"text": "b"}]
    for column in (
        np.array(texts),
        pd.Series(texts, index=[7, 9]),
        pa.array(texts),
        pa.chunked_array([texts]),
    ):
        assert as_rows(column) == one
        assert as_labels(column).tolist() == texts
    data = datasets.Dataset.from_list(two)
    assert as_rows(data["q"]) == one
    assert as_labels(data["q"]).tolist() == texts
    for table in (pd.DataFrame(two), pa.Table.from_pylist(two), data):
        assert as_rows(table) == two
    assert as_rows(np.array([["a", "c"], ["b", "d"]])) == [
        {"text1": "a", "text2": "c"},
        {"text1": "b", "text2": "d"},
    ]


@pytest.mark.parametrize(
    ("y", "complaint"),
    [
        (None, "requires y to be passed"),
        ([0, None, 1], "missing labels"),
        (["a", "", "b"], "missing labels"),
        (["a", "\ud800", "b"], "no text; correct it"),
        ([0.5, 1.25, 2.0], "not one class for each text"),
        ([[0, 1], [1, 0]], "not one class for each text"),
        ([[0, 1], [1]], "not one class for each text"),
        (np.array(["a", 1, "b"], object), "not one class for each text"),
        (3, "not one class for each text"),
        (pd.array(["a", pd.NA, "b"], dtype="string"), "missing labels"),
        (pd.Series([1, None, 2], dtype="Int64"), "missing labels"),
        (
            np.array(["2020-01-01", "2020-01-02", "2020-01-01"], "datetime64[D]"),
            "give dates and durations as texts",
        ),
    ],
)
def test_labels_that_are_none_are_one_line(y: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        PromptClassifier().fit(["a", "b", "c"], y)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # which scikit-learn's users catch


@pytest.mark.parametrize(
    "X", [np.array("abc"), [{1: "a"}, {1: "b"}], [{"a": "x"}, {2: "x"}], [{"a": 1}], 5, "abc"]
)
def test_what_is_no_text_is_one_line(X: Any) -> None:
    with pytest.raises(DataError, match=r"give (a list of )?texts|is no text"):
        as_rows(X)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a", "a"], "X has 2 columns named 'a'; rename or remove one"),
        (["a", 0], "a column named 0, "),
    ],
)
def test_columns_of_a_table_have_names_of_their_own(names: list[Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        as_rows(pd.DataFrame([["x", "y"]], columns=names))


def test_a_table_of_polars_is_rows_of_its_columns() -> None:
    class Table:
        columns = ("a",)

        def to_dict(self) -> dict[str, list[str]]:
            return {"a": ["x", "y"]}

        def to_dicts(self) -> list[dict[str, str]]:
            return [{"a": "x"}, {"a": "y"}]

    assert as_rows(Table()) == [{"a": "x"}, {"a": "y"}]


def test_all_label_words_of_a_run_are_those_of_its_estimator(fitted: PromptClassifier) -> None:
    words: list[str | list[str]] = ["w", ["x", "v"], "y", "z"]
    task = fitted.run_.task.model_copy(
        update={"label_words": fitted.run_.task.label_words | {"masked": words}}
    )
    info = fitted.run_.info.model_copy(update={"task": task})
    assert of_run(info)["parameters"]["label_words"] == words


def test_rows_of_other_columns_are_refused(fitted: PromptClassifier) -> None:
    with pytest.raises(DataError, match="the rows have text1, text2, those of fit had text"):
        fitted.predict([("a", "b")])
    with pytest.raises(DataError, match="row 2 has b, the first row a"):
        fitted.predict([{"a": "x"}, {"b": "x"}])
    assert fitted.predict_proba([]).shape == (0, 4)


def test_a_label_word_of_several_tokens_is_warned_of(rows: tuple[list[str], list[str]]) -> None:
    estimator = PromptClassifier(
        "demo", engine="ort", precision="fp32", readout="calibrated", budget=1, threads=1
    )
    estimator.set_params(
        label_words=["sports", "financial", "antidisestablishmentarianism", "health"]
    )
    with pytest.warns(
        UserWarning,
        match="label word 'antidisestablishmentarianism' only the first token is read: 'anti",
    ):
        estimator.fit(*rows)


def test_numbers_of_a_grid_and_paths_are_saved(
    small: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    grid = {
        "budget": np.int64(1),
        "n_prompt_tokens": np.array([N_PROMPT])[0],
        "label_words": np.array([*"abcd"]),
    }
    assert json.loads(json.dumps({"backbone": Path("a")}, default=as_json)) == {"backbone": "a"}
    with pytest.raises(DataError, match="cannot be saved"):
        json.dumps({"backbone": object()}, default=as_json)
    small.set_params(readout="calibrated", **grid).fit(*rows).save(tmp_path / "saved")
    parameters = PromptClassifier.load(tmp_path / "saved").get_params()
    assert (parameters["budget"], parameters["n_prompt_tokens"], parameters["label_words"]) == (
        1,
        N_PROMPT,
        [*"abcd"],
    )


def test_an_interrupted_search_is_no_result(rows: tuple[list[str], list[str]]) -> None:
    class Interrupting(Callback):
        def on_generation(self, generation: Any) -> None:
            raise KeyboardInterrupt

    estimator = PromptClassifier(
        "demo", engine="ort", precision="fp32", readout="calibrated", budget=41, threads=1
    )
    estimator.set_params(callbacks=[Interrupting()])
    with pytest.raises(KeyboardInterrupt):
        GridSearchCV(estimator, {"seed": [1, 2]}, cv=2).fit(*rows)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(*rows)
    assert estimator.run_.info.status == "interrupted"
    assert estimator.predict(rows[0][:2]).shape == (2,)


def test_a_loss_that_is_not_finite_leaves_the_best_prompt_before_it(
    rows: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> Any:
        raise NonFiniteLoss("no number")

    monkeypatch.setattr(LocalEvaluator, "train", train)
    estimator = PromptClassifier(
        "demo", engine="ort", precision="fp32", readout="words", budget=41, threads=1
    )
    with pytest.raises(NonFiniteLoss, match="no number"):
        estimator.fit(*rows)
    assert estimator.predict(rows[0][:2]).shape == (2,)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"budget": 0}, "budget"),
        ({"readout": "verbalizer", "budget": 5}, "budget 5 is too small"),
        ({"readout": "nothing"}, "readout"),
        ({"k_shot": 3}, "class .* has 2 rows, --k-shot 3 needs 6"),
    ],
)
def test_settings_are_checked_before_the_export(
    parameters: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bbt_accel.predict.classifier.prepared_bundle", None)
    with pytest.raises(BbtError, match=complaint):
        PromptClassifier(**parameters).fit(["a", "b", "c", "d"], [0, 0, 1, 1])


def test_many_rows_are_not_all_in_every_call() -> None:
    from bbt_accel.predict.fit import examples_per_class

    assert examples_per_class({"a": 1000, "b": 3}, None) == {
        "k_shot": 16,
        "allow_rare_classes": True,
    }
    with pytest.raises(DataError, match="class 'b' has 3 rows, --k-shot 2 needs 4"):
        examples_per_class({"a": 1000, "b": 3}, 2)


def test_a_column_of_labels_is_no_text(rows: tuple[list[str], list[str]]) -> None:
    table = [{"review": text, "label": label} for text, label in zip(*rows, strict=True)]
    with pytest.raises(DataError, match="the column 'label' of X is y; drop it from X"):
        PromptClassifier().fit(table, rows[1])
    with pytest.raises(
        DataError, match="the column 'label' of X has the name of the labels; drop it"
    ):
        PromptClassifier().fit(table, list(map(WORDS.index, rows[1])))
    with pytest.raises(
        DataError, match=r"has 3 in the column 'label', which is no text; .*drop a column of labels"
    ):
        PromptClassifier().fit([{"review": "a", "label": 3}], [3])


def test_texts_without_a_column_are_those_of_the_run() -> None:
    assert as_rows(["a"], ["review"]) == [{"review": "a"}]
    assert as_rows([("a", "b")], ["q", "r"]) == [{"q": "a", "r": "b"}]
    assert as_rows([("a", "b")], ["q"]) == [{"text1": "a", "text2": "b"}]


def test_pairs_and_mappings_are_rows_too() -> None:
    assert as_rows(["a"]) == [{"text": "a"}]
    assert as_rows([("a", "b")]) == [{"text1": "a", "text2": "b"}]
    assert as_rows([{"question": "a", "answer": "b"}]) == [{"question": "a", "answer": "b"}]
    for wrong in (3, None, [], ["a", 1]):
        with pytest.raises(DataError, match="row 2"):
            as_rows(["a", wrong])


@pytest.mark.parametrize(
    ("X", "y"), [(["a"], []), ([], []), (["a", "b"], [0, 0]), (["a", "b", "c"], [0, 0, 1])]
)
def test_too_few_rows_or_labels_are_one_line(X: list[str], y: list[int]) -> None:
    with pytest.raises(DataError) as caught:
        PromptClassifier().fit(X, y)
    assert "\n" not in str(caught.value)


def test_the_folder_that_it_was_saved_in_becomes_a_package(
    small: PromptClassifier, rows: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    small.fit(*rows).save(tmp_path / "saved")
    info = package_run(tmp_path / "saved", tmp_path / "package", Options(threads=1))
    assert info.labels == sorted(WORDS)
    assert (info.comparison.rows > 80, info.comparison.labels_differ) == (True, 0)
    assert (tmp_path / "package" / "onnx" / "model.onnx").is_file()
    check_package(tmp_path / "package", threads=1)


@pytest.mark.slow
def test_a_prompt_can_stand_in_front_of_the_text(rows: tuple[list[str], list[str]]) -> None:
    estimator = PromptClassifier(
        "demo", engine="ort", precision="fp32", readout="calibrated", budget=1, threads=1
    )
    estimator.set_params(prompt_mode="cat", n_prompt_tokens=5).fit(*rows)
    assert estimator.run_.info.bundle.prompt_mode == "cat"
