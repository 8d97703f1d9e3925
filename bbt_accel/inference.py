"""What a tuned prompt is good for: a score on the test rows, and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bbt_accel.batch import Float32
from bbt_accel.data import Row, few_shot, load_rows
from bbt_accel.encoding import Encoder
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine, place
from bbt_accel.errors import DataError
from bbt_accel.objective import Objective
from bbt_accel.run import Run

ROWS = 64
"""Rows that an engine holds at a time."""


def evaluate(
    run_path: str | Path,
    *,
    data: str | Path | None = None,
    bundle: str | Path | None = None,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    url: str | None = None,
    split: Literal["dev", "test"] = "test",
) -> dict[str, Any]:
    """Score the prompt of a run on the task's test rows, or on the dev rows that the search chose it by.

    data, engine, device, url: as in the run unless given. bundle: another bundle of the same backbone, e.g. in another
    precision. Returns split, metric, score, rows, engine, device, bundle (its path) and without_prompt, the score of
    the same bundle with a zero prompt. Raises RunError, BundleError, DataError, EngineError, NonFiniteLoss.
    """
    run = Run.read(run_path)
    folder = data if data is not None else run.info.data.path
    rows = load_rows(run.task, "test" if split == "test" else "train", Path(folder) if folder is not None else None)
    if split == "dev":
        _, rows = few_shot(rows, run.task.n_classes, run.info.settings.k_shot, run.info.settings.seed)
    with _engine(run, bundle, engine, device, threads, url) as loaded:
        logits = label_logits(loaded, Encoder(loaded.bundle, run.task), rows, [run.prompt, np.zeros_like(run.prompt)])
        _, (score, without) = Objective("ce", run.task.metric).score(logits, np.array([row.label for row in rows]))
        return {
            "split": split,
            "metric": run.task.metric,
            "score": float(score),
            "without_prompt": float(without),
            "rows": len(rows),
            "engine": loaded.name,
            "device": place(engine or run.info.engine.name, device or run.info.engine.device),
            "bundle": str(loaded.bundle.path.resolve()),
        }


def predict(
    run_path: str | Path,
    texts: Sequence[Mapping[str, str]],
    *,
    bundle: str | Path | None = None,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    url: str | None = None,
) -> list[dict[str, Any]]:
    """Classify texts with the prompt of a run.

    texts: one mapping a row, from the task's text columns to texts. Returns, in order, label (the class), word (its
    label word) and probabilities (a softmax over the label words, by word). Raises RunError, BundleError, EngineError,
    NonFiniteLoss, and DataError for a row that lacks a column.
    """
    run = Run.read(run_path)
    for number, text in enumerate(texts):
        if missing := [column for column in run.task.text if not isinstance(text.get(column), str)]:
            raise DataError(f"row {number + 1} has no text {missing[0]!r}; it needs {', '.join(run.task.text)}")
    if not texts:
        return []
    with _engine(run, bundle, engine, device, threads, url) as loaded:
        classifier = Classifier(loaded, run)
        probabilities = classifier.probabilities(texts)
    words = classifier.words
    return [
        {
            "label": int(p.argmax()),
            "word": words[int(p.argmax())],
            "probabilities": dict(zip(words, map(float, p), strict=True)),
        }
        for p in probabilities
    ]


class Classifier:
    """A loaded engine with the prompt of a run: texts in, probabilities of the label words out."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self.engine, self.task, self.prompt = engine, run.task, run.prompt
        self.encoder = Encoder(engine.bundle, run.task)
        self.words = self.encoder.label_words

    def probabilities(self, texts: Sequence[Mapping[str, str]]) -> npt.NDArray[np.float64]:
        """float64 (N, C), a softmax over the label words, for N mappings from the task's text columns to texts.

        Raises EngineError, and NonFiniteLoss where a logit is NaN or infinite.
        """
        rows = [Row({column: text[column] for column in self.task.text}) for text in texts]
        logits = label_logits(self.engine, self.encoder, rows, [self.prompt])
        Objective().score(logits, np.zeros(len(rows), np.int64))  # raises when not finite
        exact = logits[0].astype(np.float64)
        weights = np.exp(exact - exact.max(axis=1, keepdims=True))
        probabilities: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
        return probabilities


@contextmanager
def _engine(
    run: Run, bundle: str | Path | None, name: str | None, device: str | None, threads: int | None, url: str | None
) -> Iterator[Engine]:
    """The engine named, or the run's own as it was set up then."""
    record = run.info.engine
    own = name in (None, record.name)
    without = record.without if own else ()
    url = url or (record.url if own else None)
    with load_engine(
        run.open_bundle(bundle),
        name or record.name,
        device=device or record.device,
        threads=threads,
        without=without,
        url=url,
    ) as engine:
        yield engine


def label_logits(engine: Engine, encoder: Encoder, rows: Sequence[Row], prompts: Sequence[Float32]) -> Float32:
    """float32 (P, N, C), a few rows at a time."""
    population, parts = np.stack(prompts), []
    for start in range(0, len(rows), ROWS):
        with engine.bind(encoder.encode(rows[start : start + ROWS])) as bound:
            parts.append(bound.label_logits(population))
    return np.concatenate(parts, axis=1)
