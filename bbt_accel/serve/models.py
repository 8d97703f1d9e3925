"""The models of the server: the backbone, and a tuned prompt. What computes here runs in the
engine's one thread.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from threading import Event
from typing import Any

import numpy as np

import bbt_accel
from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import STATES
from bbt_accel.core.inference_protocol import (
    BACKBONE,
    CLASSIFIER,
    LAYER,
    OUTPUTS,
    ROWS,
    STDS,
    UNKNOWN_ROWS,
    bundle_facts,
)
from bbt_accel.core.population import Population
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.bucketing import row_lengths
from bbt_accel.errors import RequestError
from bbt_accel.predict.inference import BATCH_SIZE, Classifier
from bbt_accel.search.run import Run
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.protocol import DTYPES, Tensor, Tensors, TensorSpec

OPTIONAL = {"decoder_input_ids": "encoder-decoder", "context_ids": "decoder"}
"""Of the tensors that describe rows, those that may be missing, and the architecture that takes
them.
"""
_DIMENSIONS = {"input_ids": 2, "attention_mask": 2, "readout": 1, "label_token_ids": 1}
_DIMENSIONS |= {"decoder_input_ids": 2, "context_ids": 1}
ROW_INPUTS = {name: TensorSpec(name, "INT64", (-1,) * rank) for name, rank in _DIMENSIONS.items()}
Compute = Callable[
    [BoundBatch, Tensors], Tensors
]  # from bound rows and the inputs to the outputs, by name
STEP = 2**16
"""Tokens of the candidates that are computed before the server looks whether anybody waits for
them.
"""


class Model(ABC):
    """One model of the server: its tensors, and how it computes them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, name: str, engine: Engine, limits: Limits) -> None:
        self.name, self.engine, self.limits = name, engine, limits

    @abstractmethod
    def infer(
        self, tensors: Tensors, parameters: dict[str, Any], dropped: Event
    ) -> tuple[Tensors, dict[str, str]]:
        """Outputs by name, and the parameters of the response. dropped: set once nobody waits for
        them.

        Raises RequestError, UsageError or DataError for an invalid request, EngineError when the
        forward pass fails.
        """

    def require(self, tensors: Tensors, name: str) -> Tensor:
        if name not in tensors:
            raise RequestError(f"input {name} is missing")
        return tensors[name]

    def metadata(self) -> dict[str, object]:
        return {
            "name": self.name,
            "versions": ["1"],
            "platform": f"bbt_accel_{self.engine.name}",
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
        }

    def config(self) -> dict[str, object]:
        """Triton's model configuration; its parameters name bundle, engine and limits."""
        return {
            "name": self.name,
            "backend": "bbt_accel",
            "max_batch_size": 0,
            "input": [spec.config() for spec in self.inputs],
            "output": [spec.config() for spec in self.outputs],
            "parameters": {name: {"string_value": value} for name, value in self.facts().items()},
        }

    def facts(self) -> dict[str, str]:
        versions = self.engine.versions()
        return bundle_facts(self.engine.bundle) | {
            "bbt-accel": bbt_accel.__version__,
            "engine": " ".join(
                [self.engine.name, *(f"{name} {version}" for name, version in versions.items())]
            ),
            "max_batch": str(self.limits.batch),
            "max_request_bytes": str(self.limits.request_bytes),
        }


class RowCache:
    """Rows bound to the engine, by their hash; at most `Limits.cached_batches`, least recently used
    dropped first.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.bound: OrderedDict[str, BoundBatch] = OrderedDict()

    def find(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[str, BoundBatch]:
        """The rows that a request holds or refers to, and their hash."""
        given = {name: tensors[name] for name in ROW_INPUTS if name in tensors}
        digest, wanted = rows_hash(given), parameters.get(ROWS)
        if not given and wanted is not None:
            if wanted not in self.bound:
                raise RequestError(
                    "the server does not have these rows (any more): send them again", UNKNOWN_ROWS
                )
            digest = wanted
        elif missing := [name for name in ROW_INPUTS if name not in given and name not in OPTIONAL]:
            raise RequestError(
                f"input {missing[0]} is missing; send the rows, or the hash of rows sent before"
            )
        elif wanted not in (None, digest):
            raise RequestError(f"the hash of these rows is {digest}, not {wanted}")
        elif digest not in self.bound:
            self.bound[digest] = self.bind(given)
            while len(self.bound) > self.limits.cached_batches or self.held() > self.limits.tokens:
                self.bound.popitem(last=False)[1].close()
        self.bound.move_to_end(digest)
        return digest, self.bound[digest]

    def held(self) -> int:
        """Tokens of all rows in the cache: for bbtv2 an engine keeps hidden states of each."""
        return sum(self.tokens(rows.batch) for rows in self.bound.values())

    def tokens(self, batch: Batch) -> int:
        """Tokens of the rows that are computed: masked ones before the last that is needed are,
        too.
        """
        decoded = 0 if batch.decoder_input_ids is None else batch.decoder_input_ids.size
        return int(row_lengths(self.engine.bundle.info, batch, self.engine.without).sum()) + decoded

    def layer_stds(self, rows: BoundBatch, given: Tensors) -> Tensors:
        """Of all rows at once, each with its padding and the context."""
        context = 0 if rows.batch.context_ids is None else len(rows.batch.context_ids)
        at_most(
            self.limits.tokens,
            rows=len(rows.batch),
            columns=rows.batch.input_ids.shape[1] + context,
        )
        return {"layer_stds": rows.layer_stds()}

    def bind(self, given: Tensors) -> BoundBatch:
        batch = Batch(**given, targets=np.zeros(len(given["input_ids"]), np.int64))
        at_most(self.limits.batch, rows=len(batch))
        at_most(self.limits.tokens, tokens=self.tokens(batch))
        at_most(self.limits.words, label_words=len(batch.label_token_ids))
        backbone = self.engine.bundle.info.max_length
        limit = min(backbone, self.limits.row_tokens or backbone)
        longest = max(value.shape[1] for value in given.values() if value.ndim == 2)
        longest += len(given.get("context_ids", ()))
        if longest > limit:
            whose = "the backbone takes" if limit == backbone else "serve --set row_tokens allows"
            raise RequestError(f"rows have {longest} tokens, {whose} at most {limit}")
        if not batch.label_token_ids.size:
            raise RequestError("label_token_ids must have at least one token")
        check_tokens(self.engine.bundle, batch)
        return self.engine.bind(batch)


def at_most(limit: int, **factors: int) -> None:
    """Raises RequestError where the product of these numbers of a request exceeds a limit."""
    if prod(factors.values()) > limit:
        product = " times ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in factors.items()
        )
        raise RequestError(f"{product} exceed {limit}; send fewer", 413)


def require_waiting(dropped: Event) -> None:
    """Raises RequestError for a request whose sender is gone, or was told that the server is
    busy.
    """
    if dropped.is_set():
        raise RequestError("nobody waits for the result", 503)


def rows_hash(tensors: Tensors) -> str:
    """sha256 of the names, shapes and numbers of the tensors that describe rows."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], DTYPES["INT64"])
        digest.update(f"{name}{value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


class RowModel(Model):
    """A model of cached rows and its `own` inputs, the first of them the candidates.

    states: numbers that it returns for each candidate and row besides the logits.
    """

    def __init__(
        self,
        name: str,
        cache: RowCache,
        own: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        compute: Compute,
        states: int = 0,
    ) -> None:
        super().__init__(name, cache.engine, cache.limits)
        self.cache, self.own, self.compute, self.states = cache, own, compute, states
        here = self.engine.bundle.info.architecture
        self.inputs = (
            *own,
            *(spec for name, spec in ROW_INPUTS.items() if OPTIONAL.get(name, here) == here),
        )
        self.outputs = outputs

    def infer(
        self, tensors: Tensors, parameters: dict[str, Any], dropped: Event
    ) -> tuple[Tensors, dict[str, str]]:
        require_waiting(dropped)
        for spec in self.own:
            if (
                not self.require(tensors, spec.name).size
                or not np.isfinite(tensors[spec.name]).all()
            ):
                raise RequestError(f"input {spec.name} must have finite numbers, at least one")
        digest, rows = self.cache.find(tensors, parameters)
        if not self.own:
            return self.compute(rows, tensors), {ROWS: digest}
        given, count = tensors[self.own[0].name], len(rows.batch)
        words = len(rows.batch.label_token_ids)
        numbers = (
            {"logits_and_states": words + self.states} if self.states else {"label_words": words}
        )
        at_most(self.limits.batch, candidates=len(given), rows=count)
        at_most(self.limits.logits, candidates=len(given), rows=count, **numbers)
        step, parts = max(1, STEP // self.cache.tokens(rows.batch)), []
        for start in range(0, len(given), step):
            require_waiting(dropped)
            parts.append(
                self.compute(rows, tensors | {self.own[0].name: given[start : start + step]})
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, {
            ROWS: digest
        }


class PromptedClassifier(Model):
    """A tuned prompt: from one tensor of texts per text column of its task to what `predict`
    returns.
    """

    def __init__(self, engine: Engine, limits: Limits, run: Run) -> None:
        super().__init__(CLASSIFIER, engine, limits)
        self.classifier = Classifier(engine, run, limits.row_tokens)
        self.columns, self.words, self.names = (
            run.task.text,
            self.classifier.words,
            run.info.class_names,
        )
        self.inputs = tuple(TensorSpec(column, "BYTES", (-1,)) for column in self.columns)
        self.outputs = (
            TensorSpec("label", "INT64", (-1,)),
            TensorSpec("word", "BYTES", (-1,)),
            TensorSpec("class", "BYTES", (-1,)),
            TensorSpec("probabilities", "FP32", (-1, len(self.words))),
        )

    def infer(
        self, tensors: Tensors, parameters: dict[str, Any], dropped: Event
    ) -> tuple[Tensors, dict[str, str]]:
        texts = [self.require(tensors, column) for column in self.columns]
        count = len(texts[0])
        if not count or any(len(column) != count for column in texts):
            raise RequestError(
                f"inputs {', '.join(self.columns)} must have the same number of texts, at least one"
            )
        at_most(self.limits.batch, texts=count)
        rows = [dict(zip(self.columns, row, strict=True)) for row in zip(*texts, strict=True)]
        parts = []
        for start in range(0, count, BATCH_SIZE):
            require_waiting(dropped)
            parts.append(self.classifier.probabilities(rows[start : start + BATCH_SIZE]))
        probabilities = np.concatenate(parts)
        label = probabilities.argmax(axis=1)
        named = {
            "word": np.array(self.words, object)[label],
            "class": np.array(self.names, object)[label],
        }
        return {"label": label, **named, "probabilities": probabilities.astype(np.float32)}, {}

    def facts(self) -> dict[str, str]:
        return super().facts() | {
            "task": self.classifier.task.name,
            "words": ", ".join(self.words),
            "classes": json.dumps(self.names),
        }


def make_models(engine: Engine, limits: Limits, run: Run | None = None) -> list[Model]:
    """The models of a bundle, and of a run on it.

    For both methods label logits (P, N, C) of prompts (P, n, H) or (P, L, n, H), and in another
    model hidden states besides, as `BoundBatch.outputs`; for bbtv2 also label logits of candidates
    (P, n, H) for one layer of a stack (L, n, H) whose other layers are fixed, and the standard
    deviations (L,) of the hidden states that enter each block when all prompts are zero.
    """
    cache, info = RowCache(engine, limits), engine.bundle.info
    logits = TensorSpec("label_logits", "FP32", (-1, -1, -1))
    prompts = TensorSpec("prompts", "FP32", (-1, *info.prompt_shape))
    states = tuple(TensorSpec(name, "FP32", (-1, -1, -1)) for name in STATES)

    def label_logits(rows: BoundBatch, given: Tensors) -> Tensors:
        return {"label_logits": rows.label_logits(given["prompts"])}

    def outputs(rows: BoundBatch, given: Tensors) -> Tensors:
        return dict(rows.outputs(given["prompts"]))

    models: list[Model] = [
        RowModel(BACKBONE, cache, (prompts,), (logits,), label_logits),
        RowModel(
            OUTPUTS, cache, (prompts,), (logits, *states), outputs, len(STATES) * info.hidden_size
        ),
    ]
    if info.method == "bbtv2":
        own = (
            TensorSpec("candidates", "FP32", (-1, *info.prompt_shape[1:])),
            TensorSpec("stack", "FP32", info.prompt_shape),
            TensorSpec("layer", "INT64", (1,)),
        )
        stds = TensorSpec("layer_stds", "FP32", (info.n_layers,))
        models.append(RowModel(LAYER, cache, own, (logits,), _layer_logits))
        models.append(RowModel(STDS, cache, (), (stds,), cache.layer_stds))
    return models if run is None else [*models, PromptedClassifier(engine, limits, run)]


def _layer_logits(rows: BoundBatch, given: Tensors) -> Tensors:
    population = Population(given["candidates"], int(given["layer"][0]), given["stack"])
    return {"label_logits": rows.label_logits(population)}
