"""An estimator with scikit-learn's conventions: texts and labels in, a tuned classifier out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from bbt_accel.batch import Float64
from bbt_accel.bundle import Bundle, Method
from bbt_accel.bundle_cache import PrecisionChoice, choose, prepared_bundle
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BbtError, DataError, RunError
from bbt_accel.files import new_folder
from bbt_accel.fit import make_task
from bbt_accel.inference import Classifier
from bbt_accel.run import Run
from bbt_accel.settings import ReadoutChoice
from bbt_accel.tuning import tune

ESTIMATOR = "classifier.json"


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Adapts a frozen language model to a few labelled texts with forward passes alone.

    backbone: a hub id, a local folder, a .gguf file or `demo`. method, n_prompt_tokens: as in `export_bundle`.
    engine, precision: `auto` for what `bbt-accel doctor` recommends. readout, budget: as in `Settings`.
    template: how a text is written for the backbone, e.g. "{text} It was {mask} ."; a text's columns are `text`, of
        pairs `text1` and `text2`, of mappings their own names.
    label_words: a word for each class, in the order of `classes_`; the labels themselves unless given.
    k_shot: examples per class to fit on, and as many to choose by; half of the rarest class unless given.

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
    ) -> None:
        self.backbone, self.engine, self.precision, self.readout = backbone, engine, precision, readout
        self.budget, self.template, self.label_words, self.method = budget, template, label_words, method
        self.n_prompt_tokens, self.k_shot, self.seed, self.threads = n_prompt_tokens, k_shot, seed, threads

    def fit(self, X: Sequence[Any], y: Sequence[Any]) -> Self:
        """Fit on texts, pairs of texts or mappings from columns to texts, and their labels.

        Raises DataError for rows that are no texts and for a class with fewer than two; what `tune` raises.
        """
        rows, labels = as_rows(X), np.asarray(y)
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
        )  # fmt: skip
        self._load(bundle)
        return self

    def predict_proba(self, X: Sequence[Any]) -> Float64:
        """float64 (N, C), in the order of `classes_`."""
        check_is_fitted(self, "run_")
        return self._classifier.probabilities(as_rows(X))

    def predict(self, X: Sequence[Any]) -> Any:
        """The labels (N,), as they were given to `fit`."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def save(self, path: str | Path) -> None:
        """Write a folder that holds everything: the bundle, the prompt with its readout, and the labels."""
        check_is_fitted(self, "run_")
        with new_folder(Path(path)) as folder:
            shutil.copytree(self._classifier.engine.bundle.path, folder / "bundle")
            shutil.copytree(self.run_.path, folder / "run")
            facts = {"parameters": self.get_params(), "classes": self.classes_.tolist()}
            (folder / ESTIMATOR).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises RunError for a folder that `save` has not written, BundleError for a damaged bundle."""
        file = Path(path) / ESTIMATOR
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            found = cls(**facts["parameters"])
            found.classes_ = np.array(facts["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a saved PromptClassifier ({type(error).__name__})") from None
        found.run_ = Run.read(Path(path) / "run")
        found._load(Bundle.read(Path(path) / "bundle"))
        return found

    def _load(self, bundle: Bundle) -> None:
        where = self.run_.info.engine
        engine = load_engine(bundle, where.name, device=where.device, threads=self.threads)
        self._classifier = Classifier(engine, self.run_)

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "run_"):
            raise BbtError("a fitted PromptClassifier holds an engine, so it cannot be pickled; use save and load")
        return dict(super().__getstate__())


def as_rows(X: Sequence[Any]) -> list[dict[str, str]]:
    """Texts by column. Raises DataError for what is neither a text, a tuple of texts nor a mapping of texts."""
    rows = []
    for number, value in enumerate(X):
        if isinstance(value, str):
            row = {"text": value}
        elif isinstance(value, Mapping):
            row = dict(value)
        else:
            row = {f"text{i}": text for i, text in enumerate(value, 1)} if isinstance(value, (tuple, list)) else {}
        if not row or not all(isinstance(text, str) for text in row.values()):
            raise DataError(f"row {number + 1} is {value!r:.50}; give texts, tuples of texts or mappings of texts")
        rows.append(row)
    return rows
