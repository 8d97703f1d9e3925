"""An estimator with scikit-learn's conventions: texts and labels in, a tuned classifier out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from bbt_accel.core.batch import Float64
from bbt_accel.core.bundle import Bundle, Method, PromptMode
from bbt_accel.core.option_types import FIT_BUDGET, FIT_PROMPT_TOKENS
from bbt_accel.core.settings import DEFAULTS, ReadoutChoice, resolve
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import (
    BbtError,
    DataError,
    NonFiniteLoss,
    RunError,
    translated,
)
from bbt_accel.io.files import new_folder
from bbt_accel.io.hub import fetched
from bbt_accel.io.tables import as_utf8, check_column_names, distinct, plain
from bbt_accel.predict.bundle_cache import Choice, PrecisionChoice, choose, prepared_bundle
from bbt_accel.predict.fit import examples_per_class, make_task
from bbt_accel.predict.inference import Classifier
from bbt_accel.search.callbacks import Callback
from bbt_accel.search.run import (
    ESTIMATOR,
    BundleRecord,
    EngineRecord,
    Run,
    RunInfo,
    is_run,
    is_saved_classifier,
    write_info,
)
from bbt_accel.search.tune import tune

LABEL = "label"  # the column of y beside those of X


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Adapts a frozen language model to a few labelled texts with forward passes alone.

    backbone: a hub id, a local folder, a .gguf file or `demo`. method: bbt, or bbtv2 for a prompt
    in every layer.
    n_prompt_tokens: soft prompt vectors.
    prompt_mode: add, or cat for prompts in front of the text, which `package` needs for PEFT
    (decoders, T5).
    engine, precision: `auto` for what `bbt-accel doctor` recommends. threads: of the CPU; all cores
    unless given.
    readout: `auto` fits several and chooses by cross-validation; or one of `bbt-accel tune
    --readout`.
    budget: forward passes of the fit's rows; 1 for a readout without a search, None for the
    default.
    seed: of the split into rows to fit on and to choose by, of the projection and of the search.
    template: how a text is written for the backbone, e.g. "{text} It was {mask} ."; a text's
        columns are `text`, of pairs `text1` and `text2`, of mappings their own names.
    label_words: a word, or a list of words, for each class, in the order of `classes_`; the labels
    unless given.
    k_shot: examples per class to fit on, and as many to choose by; unless given 16, but at most
    half of a class.
    balanced: treat all classes as equally frequent; otherwise a fitted readout expects them as
    frequent as in y.
    callbacks, track: as in `tune`; callbacks are not saved.

    After `fit`: classes_, the labels in the order of `predict_proba`; run_, the `Run`, with what
    was tried and scored. Exported and optimized bundles are kept in the folder `BBT_ACCEL_CACHE`,
    so later fits skip the export.

    >>> clf = PromptClassifier("demo", budget=300).fit(texts, labels)
    >>> clf.predict(["The striker scored twice in the final"])
    """

    _classifier: Classifier
    _close: weakref.finalize[[], Self]
    """Closes the engine, with the estimator at the latest."""

    def __init__(
        self,
        backbone: str = "demo",
        *,
        engine: str = "auto",
        precision: PrecisionChoice = "auto",
        readout: ReadoutChoice = "auto",
        budget: int | None = FIT_BUDGET,
        template: str | None = None,
        label_words: Sequence[str | list[str]] | None = None,
        method: Method = "bbt",
        prompt_mode: PromptMode = "add",
        n_prompt_tokens: int = FIT_PROMPT_TOKENS,
        k_shot: int | None = None,
        balanced: bool = False,
        seed: int = DEFAULTS.seed,
        threads: int | None = None,
        callbacks: Sequence[Callback] | None = None,
        track: Sequence[str] | None = None,
    ) -> None:
        self.backbone, self.engine, self.precision, self.readout = (
            backbone,
            engine,
            precision,
            readout,
        )
        self.budget, self.template, self.label_words, self.method = (
            budget,
            template,
            label_words,
            method,
        )
        self.prompt_mode, self.balanced = prompt_mode, balanced
        self.n_prompt_tokens, self.k_shot, self.seed, self.threads = (
            n_prompt_tokens,
            k_shot,
            seed,
            threads,
        )
        self.callbacks, self.track = callbacks, track

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on texts and their labels.

        X: a list of texts, of tuples of texts or of mappings from columns to texts; a column or a
        table of pandas, polars or pyarrow; a `datasets.Dataset` or a column of one. Of equal texts
        the first is used. y: strings or integers.
        Ctrl-C ends the search, as does a loss that is not finite: the estimator has the best prompt
        so far, and KeyboardInterrupt or NonFiniteLoss is raised, so that a grid search does not
        take it for a result. Raises DataError for rows that are no texts, for a column that is y
        and for a class with fewer than two texts; what `tune` raises.
        """
        labels, rows = as_labels(y), as_rows(X)
        if len(rows) != len(labels) or not len(rows):
            raise DataError(
                f"X has {len(rows)} rows, y {len(labels)}; give one label for each text"
            )
        check_columns(rows, labels)
        classes, targets = np.unique(labels, return_inverse=True)
        frequencies = np.bincount(targets).tolist()
        # A copy among the rows to choose by, or in another fold, would be no test of what is
        # fitted.
        kept = distinct(
            range(len(rows)), lambda i: tuple(rows[i][name].strip() for name in rows[0])
        )
        rows, targets = [rows[i] for i in kept], targets[kept]
        texts = np.bincount(targets, minlength=len(classes)).tolist()
        if len(classes) < 2 or min(texts) < 2:
            found = (
                f"{len(classes)} classes, of which the rarest has {min(texts)} of the "
                "different texts"
            )
            raise DataError(f"y has {found}; at least two classes of two are needed")
        names = [str(label).strip() for label in classes]
        settings = self._settings(dict(zip(names, texts, strict=True)))
        choice = choose(self.engine, self.precision)
        bundle = self._prepared(choice)
        words = (
            () if self.label_words is None else list(self.label_words)
        )  # of a numpy grid, an array
        shares = [1] * len(names) if self.balanced else frequencies
        task = make_task(
            "classifier",
            list(rows[0]),
            LABEL,
            names,
            bundle,
            self.template,
            words,
            class_shares=shares,
        )
        lines = [
            json.dumps({**row, LABEL: names[target]})
            for row, target in zip(rows, targets, strict=True)
        ]
        with ExitStack() as place:
            folder = Path(place.enter_context(tempfile.TemporaryDirectory(prefix="bbt-accel-")))
            (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            failure: NonFiniteLoss | None = None
            try:
                run = tune(
                    bundle,
                    task,
                    data=folder,
                    engine=choice.engine,
                    device=choice.device,
                    threads=self.threads,
                    output=folder / "run",
                    settings=settings,
                    progress=False,
                    callbacks=self.callbacks or (),
                    track=self.track or (),
                )
            except NonFiniteLoss as error:
                if not is_run(folder / "run"):
                    raise
                run, failure = Run.read(folder / "run"), error
            weakref.finalize(
                run, place.pop_all().close
            )  # the folder is there for as long as the run is
        self._load(run, bundle)
        self.classes_ = classes
        for word, piece in self._classifier.encoder.partial_words.items():
            warnings.warn(
                f"of label word {word!r} only the first token is read: {piece!r}", stacklevel=2
            )
        if self.run_.info.status == "interrupted":
            raise failure or KeyboardInterrupt
        return self

    def _settings(self, counts: Mapping[str, int]) -> dict[str, object]:
        """Of the search, checked before anything is exported. counts: texts of each class."""
        settings: dict[str, object] = {"readout": self.readout, "seed": self.seed}
        settings["budget"] = FIT_BUDGET if self.budget is None else self.budget
        settings |= {} if self.k_shot is None else {"k_shot": self.k_shot}
        resolve(settings).check_budget()
        return settings | examples_per_class(counts, self.k_shot)

    def _prepared(self, choice: Choice) -> Bundle:
        return prepared_bundle(
            self.backbone,
            choice,
            self.method,
            self.n_prompt_tokens,
            prompt_mode=self.prompt_mode,
            threads=self.threads,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = (
            True,
            False,
            True,
        )
        return tags

    def predict_proba(self, X: Any) -> Float64:
        """Probabilities, float64 (N, C), in the order of `classes_`. X: N texts, as in `fit`.

        Raises sklearn's NotFittedError before `fit`, DataError for other columns than those of
        `fit`, EngineError.
        """
        check_is_fitted(self, "run_")
        columns = self.run_.task.text
        rows = as_rows(X, columns)
        if rows and rows[0].keys() != {*columns}:
            raise DataError(
                f"the rows have {', '.join(rows[0])}, those of fit had {', '.join(columns)}"
            )
        return self._classifier.probabilities(rows) if rows else np.zeros((0, len(self.classes_)))

    def predict(self, X: Any) -> Any:
        """The labels (N,), as they were given to `fit`. Takes and raises what `predict_proba`
        does.
        """
        found = self.predict_proba(X).argmax(1)
        return self.classes_[found]

    def save(self, path: str | Path) -> None:
        """Write a new folder that holds everything: the bundle, the prompt with its readout, and
        the labels.

        Raises BbtError for a folder that exists.
        """
        check_is_fitted(self, "run_")
        facts = {
            "parameters": self.get_params() | {"callbacks": None},
            "classes": self.classes_.tolist(),
        }
        content = json.dumps(facts, indent=1, default=as_json)
        with new_folder(Path(path)) as folder:
            shutil.copytree(self._classifier.engine.bundle.path, folder / "bundle")
            shutil.copytree(self.run_.path, folder / "run")
            write_info(folder / "run", self._used())
            (folder / ESTIMATOR).write_text(content + "\n", encoding="utf-8")

    def _used(self) -> RunInfo:
        """run.json with the bundle and the engine that compute here, which may be others than in
        the search.
        """
        info, engine = self.run_.info, self._classifier.engine
        searched = (info.bundle.digest, info.engine.name, info.engine.device)
        if (engine.bundle.digest, engine.name, engine.device) == searched:
            return info
        used = EngineRecord(
            name=engine.name,
            device=engine.device,
            threads=info.engine.threads,
            without=sorted(engine.without),
            versions=engine.versions(),
        )
        return info.model_copy(
            update={"bundle": BundleRecord.of(engine.bundle, self.run_.path), "engine": used}
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        bundle: str | Path | None = None,
        engine: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """From a folder that `save` or `tune` has written, or from hf://OWNER/NAME, which is
        downloaded.

        bundle, engine, device, threads: to predict elsewhere than where it was fitted, as in
        `predict`. Of a run, `classes_` are the names of its classes. Raises RunError for another
        folder, BundleError for a damaged bundle, HubError; EngineError for a device that is not
        here.
        """
        path = fetched(path).absolute()  # what is read later is read from there, too
        saved = is_saved_classifier(path)
        if not is_run(path):
            raise RunError(
                f"{path} is not a saved PromptClassifier, nor a run; save a fitted one there, or "
                "tune"
            )
        run = Run.read(path)
        try:
            facts = (
                json.loads((path / ESTIMATOR).read_text(encoding="utf-8"))
                if saved
                else of_run(run.info)
            )
            found = cls(**facts["parameters"])
            found.classes_ = np.array(facts["classes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is not a saved PromptClassifier ({type(error).__name__})"
            ) from None
        if found.classes_.shape != (run.task.n_classes,):
            raise RunError(
                f"{path / ESTIMATOR} has classes of the shape {found.classes_.shape}; fit and "
                "save again"
            )
        found.threads = found.threads if threads is None else threads
        found._load(
            run,
            run.open_bundle(None if bundle is None else Path(bundle).absolute()),
            engine,
            device,
        )
        return found

    def _load(
        self, run: Run, bundle: Bundle, engine: str | None = None, device: str | None = None
    ) -> None:
        """Take over a run, once its engine is loaded."""
        name, device, without = run.info.engine.used_with(engine, device)
        loaded = load_engine(bundle, name, device=device, threads=self.threads, without=without)
        if hasattr(self, "_close"):
            self._close()
        self._close = weakref.finalize(self, loaded.close)
        self._close.atexit = False
        self.run_, self._classifier = run, Classifier(loaded, run)

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "run_"):
            raise BbtError(
                "a fitted PromptClassifier holds an engine, so it cannot be pickled; use save "
                "and load"
            )
        return dict(super().__getstate__())


def as_json(value: Any) -> Any:
    """For json: numpy's numbers and arrays, as a grid has them, and paths. Raises DataError."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise DataError(f"{value!r:.50} cannot be saved; give the parameter as text or number")


def of_run(info: RunInfo) -> dict[str, Any]:
    """What `save` writes of an estimator, for a run of the command line."""
    bundle, settings, group = info.bundle, info.settings, info.bundle.template_group
    parameters = {
        "backbone": bundle.backbone,
        "engine": info.engine.name,
        "precision": bundle.precision,
        "method": bundle.method,
        "prompt_mode": bundle.prompt_mode,
        "n_prompt_tokens": info.prompt_shape[-2],
        "template": group and info.task.template(group),
        "label_words": group and info.task.label_words[group],
        "readout": settings.readout,
        "budget": settings.budget,
        "seed": settings.seed,
        "k_shot": None
        if settings.allow_rare_classes and settings.k_shot == DEFAULTS.k_shot
        else settings.k_shot,
        # `fit` counts two rows of each class at least
        "balanced": set(info.task.class_shares or [1]) == {1},
    }
    return {"parameters": parameters, "classes": info.class_names}


def check_columns(rows: Sequence[Mapping[str, str]], labels: Any) -> None:
    """Raises DataError for a column of labels, which a template would write into every row."""
    for name in rows[0]:
        same = all(row[name] == str(label) for row, label in zip(rows, labels, strict=True))
        if name == LABEL or (same and len(rows[0]) > 1):
            what = "is y" if same else "has the name of the labels"
            raise DataError(
                f"the column {name!r} of X {what}; drop it from X, which holds the texts alone, "
                "or rename it"
            )


def as_rows(X: Any, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Texts by column. columns: the names of texts without one, if there are as many.

    Raises DataError for what is neither a text, a tuple of texts nor a mapping of texts.
    """
    if hasattr(X, "to_pylist"):  # pyarrow
        X = X.to_pylist()
    elif hasattr(X, "to_dicts"):  # a polars DataFrame
        X = X.to_dicts()
    elif hasattr(X, "columns") and hasattr(
        X, "to_dict"
    ):  # a pandas DataFrame, of which iteration gives the columns
        if other := [name for name in X.columns if not isinstance(name, str)]:
            raise DataError(
                f"X has a column named {other[0]!r:.50}, which is no text; rename it, or pass it "
                "alone"
            )
        check_column_names(list(X.columns), "X")
        X = X.to_dict("records")
    elif isinstance(X, (str, Mapping)) or not isinstance(X, Iterable) or getattr(X, "ndim", 1) == 0:
        raise DataError(
            f"X is {X!r:.50}; give a list of texts, of tuples of texts or of mappings of texts"
        )
    rows: list[dict[str, str]] = []
    for number, value in enumerate(X):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, Mapping):
            row = dict(value)
        else:
            texts = (
                [str(value)]
                if isinstance(value, str)
                else value
                if isinstance(value, (tuple, list))
                else []
            )
            unnamed = (
                ["text"] if isinstance(value, str) else [f"text{i}" for i, _ in enumerate(texts, 1)]
            )
            row = dict(zip(columns if len(columns) == len(texts) else unnamed, texts, strict=True))
        if isinstance(value, Mapping) and (
            other := [name for name in row if not isinstance(row[name], str)]
        ):
            problem = (
                f"row {number + 1} has {row[other[0]]!r:.50} in the column {other[0]!r}, "
                "which is no text"
            )
            raise DataError(
                f"{problem}; X holds the texts alone, so drop a column of labels or numbers"
            )
        if not row or not all(isinstance(text, str) for text in (*row, *row.values())):
            raise DataError(
                f"row {number + 1} is {value!r:.50}; give texts, tuples of texts or mappings of "
                "texts"
            )
        if rows and row.keys() != rows[0].keys():
            raise DataError(
                f"row {number + 1} has {', '.join(row)}, the first row {', '.join(rows[0])}"
            )
        rows.append(row)
    return rows


def as_labels(y: Any) -> Any:
    """Labels as an array (N,). Raises DataError for None, missing labels and several columns."""
    if y is None:
        raise DataError("this estimator requires y to be passed, but the target y is None")
    with translated(DataError, "y is not one class for each text"):
        given = (
            y.to_pylist() if hasattr(y, "to_pylist") else y if hasattr(y, "__array__") else list(y)
        )
        values = np.asarray(given)
        if values.dtype.kind == "U" and not hasattr(
            given, "dtype"
        ):  # numpy makes texts of NaN and of numbers beside
            values = np.array(given, object)
        if any(not plain(label) for label in values.ravel().tolist()):
            raise DataError("y has missing labels (Input contains NaN); remove those rows")
        labels = column_or_1d(values, warn=True)
        if labels.dtype.kind in "mM":
            raise DataError(f"y has the label {labels[0]}; give dates and durations as texts")
        check_classification_targets(labels)
        classes = np.unique(labels)  # labels of several kinds have no order
    if unwritable := [name for name in map(str, classes.tolist()) if as_utf8(name) != name]:
        raise DataError(f"y has the label {unwritable[0]!r:.50}, which is no text; correct it")
    return labels
