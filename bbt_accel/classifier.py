"""An estimator with scikit-learn's conventions: texts and labels in, a tuned classifier out."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from bbt_accel.batch import Float64
from bbt_accel.bundle import Bundle, Method
from bbt_accel.bundle_cache import Choice, PrecisionChoice, choose, prepared_bundle
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BbtError, DataError, RunError, first_line
from bbt_accel.files import new_folder
from bbt_accel.fit import make_task
from bbt_accel.hub import fetched
from bbt_accel.inference import Classifier
from bbt_accel.packaging.manifest import Kind
from bbt_accel.run import Run
from bbt_accel.settings import ReadoutChoice
from bbt_accel.sharing import ESTIMATOR
from bbt_accel.tables import plain
from bbt_accel.tuning import tune
from bbt_accel.tuning.callbacks import Callback


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Adapts a frozen language model to a few labelled texts with forward passes alone.

    backbone: a hub id, a local folder, a .gguf file or `demo`. method, n_prompt_tokens: as in `export_bundle`.
    engine, precision: `auto` for what `bbt-accel doctor` recommends. readout, budget: as in `Settings`.
    template: how a text is written for the backbone, e.g. "{text} It was {mask} ."; a text's columns are `text`, of
        pairs `text1` and `text2`, of mappings their own names.
    label_words: a word for each class, in the order of `classes_`; the labels themselves unless given.
    k_shot: examples per class to fit on, and as many to choose by; half of the rarest class unless given.
    callbacks, track: as in `tune`; callbacks are not saved.

    Exported and optimized bundles are kept in the folder `BBT_ACCEL_CACHE`, so that the second fit starts at once.

    >>> clf = PromptClassifier("demo", budget=300).fit(texts, labels)
    >>> clf.predict(["The striker scored twice in the final"])
    """

    def __init__(
        self,
        backbone: str = "demo",
        *,
        engine: str = "auto",
        precision: PrecisionChoice = "auto",
        readout: ReadoutChoice = "auto",
        budget: int = 300,
        template: str | None = None,
        label_words: Sequence[str] | None = None,
        method: Method = "bbt",
        n_prompt_tokens: int = 20,
        k_shot: int | None = None,
        seed: int = 42,
        threads: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        track: Sequence[str] | None = None,
    ) -> None:
        self.backbone, self.engine, self.precision, self.readout = backbone, engine, precision, readout
        self.budget, self.template, self.label_words, self.method = budget, template, label_words, method
        self.n_prompt_tokens, self.k_shot, self.seed, self.threads = n_prompt_tokens, k_shot, seed, threads
        self.callbacks, self.track = callbacks, track

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on texts and their labels.

        X: a list of texts, of tuples of texts or of mappings from columns to texts; a column or a table of pandas or
        pyarrow; a `datasets.Dataset` or a column of one. y: strings or integers.
        Raises DataError for rows that are no texts and for a class with fewer than two; what `tune` raises.
        """
        labels, rows = as_labels(y), as_rows(X)
        if len(rows) != len(labels) or not len(rows):
            raise DataError(f"X has {len(rows)} rows, y {len(labels)}; give one label for each text")
        self.classes_, targets = np.unique(labels, return_inverse=True)
        fewest = int(np.bincount(targets).min())
        if len(self.classes_) < 2 or fewest < 2:
            found = f"{len(self.classes_)} classes, the rarest with {fewest} rows"
            raise DataError(f"y has {found}; at least two classes of two rows are needed")
        choice = choose(self.engine, self.precision)
        bundle = prepared_bundle(self.backbone, choice, self.method, self.n_prompt_tokens)
        names = [str(label).strip() for label in self.classes_]
        task = make_task("classifier", list(rows[0]), "label", names, bundle, self.template, self.label_words or ())
        settings = {"readout": self.readout, "budget": self.budget, "seed": self.seed}
        self._folder = tempfile.TemporaryDirectory(prefix="bbt-accel-")  # the run's, for as long as the estimator lives
        folder = Path(self._folder.name)
        lines = [json.dumps({**row, "label": names[target]}) for row, target in zip(rows, targets, strict=True)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.run_ = tune(
            bundle, task, data=folder, engine=choice.engine, device=choice.device, threads=self.threads,
            output=folder / "run", settings={**settings, "k_shot": self.k_shot or fewest // 2}, progress=False,
            callbacks=self.callbacks or (), track=self.track or (),
        )  # fmt: skip
        self._load(bundle)
        for word, piece in self._classifier.encoder.partial_words.items():
            warnings.warn(f"of label word {word!r} only the first token is read: {piece!r}", stacklevel=2)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = True, False, True
        return tags

    def predict_proba(self, X: Any) -> Float64:
        """float64 (N, C), in the order of `classes_`."""
        check_is_fitted(self, "run_")
        rows, columns = as_rows(X), self.run_.task.text
        if rows and rows[0].keys() != {*columns}:
            raise DataError(f"the rows have {', '.join(rows[0])}, those of fit had {', '.join(columns)}")
        return self._classifier.probabilities(rows) if rows else np.zeros((0, len(self.classes_)))

    def predict(self, X: Any) -> Any:
        """The labels (N,), as they were given to `fit`."""
        found = self.predict_proba(X).argmax(1)
        return self.classes_[found]

    def save(self, path: str | Path) -> None:
        """Write a folder that holds everything: the bundle, the prompt with its readout, and the labels."""
        check_is_fitted(self, "run_")
        with new_folder(Path(path)) as folder:
            shutil.copytree(self._classifier.engine.bundle.path, folder / "bundle")
            shutil.copytree(self.run_.path, folder / "run")
            parameters = self.get_params() | {"callbacks": None}
            facts = {"parameters": parameters, "classes": self.classes_.tolist()}
            (folder / ESTIMATOR).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def package(self, path: str | Path, format: Kind = "onnx", *, int8: bool = False) -> None:
        """Write a folder that other tools load: as `bbt-accel package`, compared with `predict`. See `package_run`."""
        from bbt_accel.packaging.formats import FORMATS
        from bbt_accel.packaging.package import Options, package_run

        check_is_fitted(self, "run_")
        bundle = self._classifier.engine.bundle
        if bundle.info.target not in FORMATS[format].targets:  # the one that it was optimized from
            plain_one = Choice("torch", "cpu", "fp32", "as exported")
            bundle = prepared_bundle(self.backbone, plain_one, self.method, self.n_prompt_tokens)
        package_run(self.run_.path, path, Options(format, int8, bundle=bundle.path, threads=self.threads))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a folder, or from hf://OWNER/NAME, which is downloaded.

        Raises RunError for a folder that `save` has not written, BundleError for a damaged bundle, HubError.
        """
        path = fetched(path)
        file = path / ESTIMATOR
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            found = cls(**facts["parameters"])
            found.classes_ = np.array(facts["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a saved PromptClassifier ({type(error).__name__})") from None
        found.run_ = Run.read(path / "run")
        found._load(Bundle.read(path / "bundle"))
        return found

    def _load(self, bundle: Bundle) -> None:
        where = self.run_.info.engine
        engine = load_engine(bundle, where.name, device=where.device, threads=self.threads)
        self._classifier = Classifier(engine, self.run_)

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "run_"):
            raise BbtError("a fitted PromptClassifier holds an engine, so it cannot be pickled; use save and load")
        return dict(super().__getstate__())


def as_rows(X: Any) -> list[dict[str, str]]:
    """Texts by column. Raises DataError for what is neither a text, a tuple of texts nor a mapping of texts."""
    if hasattr(X, "to_pylist"):  # pyarrow
        X = X.to_pylist()
    elif hasattr(X, "columns") and hasattr(X, "to_dict"):  # a pandas DataFrame, of which iteration gives the columns
        X = X.to_dict("records")
    elif isinstance(X, (str, Mapping)) or not isinstance(X, Iterable):
        raise DataError(f"X is {X!r:.50}; give a list of texts, of tuples of texts or of mappings of texts")
    rows: list[dict[str, str]] = []
    for number, value in enumerate(X):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, str):
            row = {"text": str(value)}  # not numpy's kind of text
        elif isinstance(value, Mapping):
            row = dict(value)
        else:
            row = {f"text{i}": text for i, text in enumerate(value, 1)} if isinstance(value, (tuple, list)) else {}
        if not row or not all(isinstance(text, str) for text in row.values()):
            raise DataError(f"row {number + 1} is {value!r:.50}; give texts, tuples of texts or mappings of texts")
        if rows and row.keys() != rows[0].keys():
            raise DataError(f"row {number + 1} has {', '.join(row)}, the first row {', '.join(rows[0])}")
        rows.append(row)
    return rows


def as_labels(y: Any) -> Any:
    """Labels as an array (N,). Raises DataError for None, missing labels and several columns."""
    if y is None:
        raise DataError("this estimator requires y to be passed, but the target y is None")
    values = np.asarray(y.to_pylist() if hasattr(y, "to_pylist") else y if hasattr(y, "__array__") else list(y))
    if any(not plain(label) for label in values.ravel().tolist()):
        raise DataError("y has missing labels (Input contains NaN); remove those rows")
    try:
        labels = column_or_1d(values, warn=True)
        check_classification_targets(labels)
    except ValueError as error:
        raise DataError(f"y is not one class for each text ({first_line(error)})") from None
    return labels
