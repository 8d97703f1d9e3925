"""Inference with a tuned prompt: a score on the test rows, and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from bbt_accel.core.batch import Float32, Float64
from bbt_accel.core.logits import log_softmax, require_finite, scores_without_search
from bbt_accel.core.objective import Objective
from bbt_accel.engines.base import Engine, read
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import DataError, UsageError, check_known
from bbt_accel.search.readout import Readout, reads_states
from bbt_accel.search.run import Baselines, Run
from bbt_accel.tasks.data import Row, has_test_file, labels, load_rows, rows_digest
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import FewShot, has_test_rows, load_split

BATCH_SIZE = 64  # rows that an engine gets at a time


class EngineOptions(TypedDict, total=False):
    """Where to run a prompt, as in `load_engine`: bundle, engine and device are those of its run
    unless given.

    Another engine that does not run on that device runs on the CPU.
    """

    bundle: str | Path | None  # another of the same backbone, e.g. in another precision
    engine: str | None
    device: str | None
    threads: int | None
    url: str | None


def evaluate(
    run_path: str | Path,
    *,
    data: str | Path | None = None,
    split: Literal["dev", "test"] = "test",
    **options: Unpack[EngineOptions],
) -> dict[str, Any]:
    """Score the prompt of a run on the task's test rows, or on the dev rows of its search.

    A fitted readout was fitted on the dev rows, too: its score there says less than the dev score
    in run.json.
    data: that of the run unless given; a folder, or a file of test rows. Returns split, metric,
    score, rows, engine, device, bundle (its path), readout; chance and majority, the scores of a
    random class and of the most frequent one; and of the same bundle before the search,
    without_prompt: the label words' logits as they are, and batch_calibrated: the same without
    each class's mean log-probability over these rows, which takes no labels (Zhou et al., ICLR
    2024). Raises RunError, BundleError, DataError, EngineError,
    NonFiniteLoss.
    """
    run = Run.read(run_path)
    rows = scored_rows(run, data, split)
    with _load(run, options) as loaded:
        encoder = Encoder(loaded.bundle, run.task, run.info.demonstrations)
        logits = scores_and_before(loaded, encoder, rows, run)
        require_finite(logits, "a score")
        targets, metric = labels(rows), run.task.metric
        _, (score,) = Objective("ce", metric).score(logits[:1], targets)
        return {
            "split": split,
            "metric": metric,
            "score": float(score),
            **Baselines.of(logits[1:], targets, metric).model_dump(),
            "readout": run.readout.name,
            "rows": len(rows),
            "engine": loaded.name,
            "device": loaded.device,
            "bundle": str(loaded.bundle.path.resolve()),
        }


def scored_rows(run: Run, data: str | Path | None, split: Literal["dev", "test"]) -> list[Row]:
    """The dev rows of a run, or its test rows: of `data`, of its own data, or those that its search
    left over.

    Raises DataError where a run has no test rows, and where those of its search have changed since.
    """
    own, settings = run.data_path and run.data_path.resolve(), run.info.settings
    source = own if data is None else Path(data).resolve()
    check_known("split", split, ("dev", "test"))
    if data is None and own is not None and not own.exists():
        raise DataError(
            f"{own}, which holds the rows of {run.path}, does not exist; give its rows with --data"
        )
    if split == "dev":
        return searched_split(run, source).dev
    same = source == own or searched_on(run, source)
    if settings.hold_out and same:
        if rest := searched_split(run, source).rest:
            return rest
        hint = "add rows" if settings.allow_rare_classes else f"lower --k-shot {settings.k_shot}"
        raise DataError(f"the search leaves no row to hold out; {hint}")
    if same and not has_test_rows(source, settings):
        raise DataError(
            f"{source} has no test rows; give some with --data, or tune with --set hold_out=true"
        )
    return load_rows(run.task, "test", source)


def searched_split(run: Run, data: Path | None) -> FewShot:
    """The train and dev rows of a run's search, and those that it left over. Raises DataError for
    other rows.
    """
    found = load_split(run.task, data, run.info.settings)
    if rows_digest([*found.train, *found.dev]) != run.info.data.digest:
        where = data or f"the data set of task {run.task.name}"
        raise DataError(
            f"{where} has other rows than when the prompt was searched for; give those with --data"
        )
    return found


def searched_on(run: Run, data: Path | None) -> bool:
    """Whether these are the rows of a run's search, at another path, and no test rows beside them.

    A run from the hub does not know the path of its own.
    """
    if data is None or has_test_file(data):
        return False
    try:
        searched_split(run, data)
    except DataError:
        return False
    return True


def predict_texts(
    run_path: str | Path,
    texts: Mapping[str, str] | Iterable[Mapping[str, str]],
    **options: Unpack[EngineOptions],
) -> list[dict[str, Any]]:
    """Classify texts with the prompt of a run.

    texts: one mapping per row, from the task's text columns to texts; or a single one. Returns, in
    order, label (the class), word (its first label word), class (its name) and probabilities (of
    the classes, by name; classes without a name have their label word). Raises RunError,
    BundleError, EngineError, NonFiniteLoss, and DataError for a row without one of the columns.
    """
    run, texts = Run.read(run_path), [texts] if isinstance(texts, (str, Mapping)) else list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, Mapping):
            raise DataError(
                f"row {number} is {text!r:.50}; give a mapping from {', '.join(run.task.text)} "
                "to texts"
            )
        if missing := [column for column in run.task.text if not isinstance(text.get(column), str)]:
            raise DataError(
                f"row {number} has no text {missing[0]!r}; it needs {', '.join(run.task.text)}"
            )
    if not texts:
        return []
    with _load(run, options) as loaded:
        classifier = Classifier(loaded, run)
        words, probabilities = classifier.words, classifier.probabilities(texts)
    names = run.info.class_names
    return [
        {
            "label": label,
            "word": words[label],
            "class": names[label],
            "probabilities": dict(zip(names, p, strict=True)),
        }
        for label, p in zip(
            probabilities.argmax(axis=1).tolist(), probabilities.tolist(), strict=True
        )
    ]


class Classifier:
    """A loaded engine with the prompt of a run: from texts to probabilities of the label words.

    max_tokens: to which a row is truncated, if the backbone takes longer ones.
    """

    def __init__(self, engine: Engine, run: Run, max_tokens: int | None = None) -> None:
        self.engine, self.task, self.run = engine, run.task, run
        self.encoder = Encoder(engine.bundle, run.task, run.info.demonstrations, max_tokens)
        self.words = self.encoder.label_words
        self._lock = (
            Lock()
        )  # engines are for one thread at a time, and a web server predicts from several

    def probabilities(self, texts: Sequence[Mapping[str, str]]) -> Float64:
        """float64 (N, C), the probability of each class, for N mappings from the task's text
        columns to texts.

        Raises EngineError, and NonFiniteLoss if a logit is NaN or infinite.
        """
        rows = [Row({column: text[column] for column in self.task.text}) for text in texts]
        with self._lock:
            scores = class_scores(self.engine, self.encoder, rows, self.run)
        require_finite(scores, "a score")
        return np.asarray(np.exp(log_softmax(scores)))


def class_scores(engine: Engine, encoder: Encoder, rows: Sequence[Row], run: Run) -> Float64:
    """Class scores (N, C) of N rows by the prompt and the readout of a run."""
    parts = batches(engine, encoder, rows, run.prompt, run.readout)
    return np.concatenate([run.readout.scores(part) for part in parts])


def scores_before(engine: Engine, encoder: Encoder, rows: Sequence[Row]) -> Float64:
    """Class scores (2, N, C) of N rows before a search: the label words without a prompt, and the
    same calibrated.
    """
    parts = batches(engine, encoder, rows, engine.bundle.start_prompt())
    logits = np.concatenate([part["label_logits"] for part in parts])
    return scores_without_search(logits, encoder.classes)


def scores_and_before(engine: Engine, encoder: Encoder, rows: Sequence[Row], run: Run) -> Float64:
    """Class scores (3, N, C) of N rows: of a run, and before its search; by one pass where the run
    kept no prompt.
    """
    if not np.array_equal(run.prompt, engine.bundle.start_prompt()):
        return np.stack(
            [class_scores(engine, encoder, rows, run), *scores_before(engine, encoder, rows)]
        )
    words = len(encoder.classes)
    parts = [  # of the states, of which a large test set has gigabytes, only the scores are kept
        (run.readout.scores(part), part["label_logits"][:, :words].copy())
        for part in batches(engine, encoder, rows, run.prompt, run.readout)
    ]
    scores, logits = (np.concatenate(values) for values in zip(*parts, strict=True))
    return np.stack([scores, *scores_without_search(logits, encoder.classes)])


def batches(
    engine: Engine,
    encoder: Encoder,
    rows: Sequence[Row],
    prompt: Float32,
    readout: Readout | None = None,
) -> Iterator[dict[str, Float32]]:
    """What a readout, or else the verbalizer, reads of rows with a prompt, by name, for
    `BATCH_SIZE` rows at a time.
    """
    for start in range(0, len(rows), BATCH_SIZE):
        batch = encoder.encode(rows[start : start + BATCH_SIZE])
        if readout is not None:
            batch = replace(
                batch, label_token_ids=np.concatenate([batch.label_token_ids, readout.token_ids])
            )
        with engine.bind(batch) as bound:
            yield read(bound, prompt, readout is not None and reads_states(readout.name))


def _load(run: Run, options: EngineOptions) -> Engine:
    """The named engine, or the run's own with the options of the run.

    Only a URL that the caller gives is asked: that of a run from somebody else would get the
    caller's texts and token.
    """
    if unknown := options.keys() - EngineOptions.__annotations__:
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    record, url = run.info.engine, options.get("url")
    name, device, without = record.used_with(
        options.get("engine") or record.name, options.get("device")
    )
    if name == record.name and record.remote and url is None:
        where = record.url or "URL"
        raise UsageError(
            f"the search asked a server: pass --url {where} to send texts there, or --engine ort"
        )
    return load_engine(
        run.open_bundle(options.get("bundle")),
        name,
        device=device,
        threads=options.get("threads"),
        without=without,
        url=url,
    )
