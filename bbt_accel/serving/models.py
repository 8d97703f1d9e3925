"""The models of the server: the backbone, and a tuned prompt. Everything here runs in the engine's one thread."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import numpy as np

import bbt_accel
from bbt_accel.batch import Batch
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.errors import RequestError
from bbt_accel.inference import Classifier
from bbt_accel.inference_protocol import BACKBONE, CLASSIFIER, DIGEST, LAYER, ROWS, STDS, UNKNOWN_ROWS, backbone_name
from bbt_accel.population import Population
from bbt_accel.run import Run
from bbt_accel.serving import Limits
from bbt_accel.serving.protocol import DTYPES, Tensors, TensorSpec

_ONE, _ONES = np.zeros(1, np.int64), np.ones((1, 1), np.int64)
_EXAMPLE = Batch(_ONES, _ONES, _ONE, _ONE, _ONE, decoder_input_ids=_ONES)
ROW_INPUTS = {name: TensorSpec(name, "INT64", (-1,) * value.ndim) for name, value in _EXAMPLE.inputs().items()}
"""The tensors that describe rows."""
OPTIONAL = "decoder_input_ids"
"""The one of them that may be missing."""
LABEL_LOGITS = TensorSpec("label_logits", "FP32", (-1, -1, -1))


class Model(ABC):
    """One model of the server: its tensors, and how it computes them."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits

    @abstractmethod
    def infer(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[Tensors, dict[str, str]]:
        """Outputs by name, and the parameters of the response.

        Raises RequestError, UsageError or DataError for an invalid request, EngineError when the forward pass fails.
        """

    def metadata(self) -> dict[str, object]:
        return {
            "name": self.name,
            "versions": ["1"],
            "platform": f"bbt_accel_{self.engine.name}",
            "inputs": [spec.metadata() for spec in self.inputs],
            "outputs": [spec.metadata() for spec in self.outputs],
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
        info, versions = self.engine.bundle.info, self.engine.versions()
        return {
            DIGEST: self.engine.bundle.digest,
            "backbone": backbone_name(info.backbone),
            "method": info.method,
            "precision": info.precision,
            "bbt-accel": bbt_accel.__version__,
            "engine": " ".join([self.engine.name, *(f"{name} {version}" for name, version in versions.items())]),
            "max_batch": str(self.limits.batch),
            "max_request_bytes": str(self.limits.request_bytes),
        }


class RowCache:
    """Rows bound to the engine, by their hash; at most `Limits.cached_batches`, least recently used dropped first."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.bound: OrderedDict[str, BoundBatch] = OrderedDict()

    def find(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[str, BoundBatch]:
        """The rows that a request holds or refers to, and their hash."""
        given = {name: tensors[name] for name in ROW_INPUTS if name in tensors}
        wanted = parameters.get(ROWS)
        if not given and wanted is not None:
            if wanted not in self.bound:
                raise RequestError("the server does not have these rows (any more): send them again", UNKNOWN_ROWS)
            found = wanted
        else:
            if missing := [name for name in ROW_INPUTS if name not in given and name != OPTIONAL]:
                raise RequestError(f"input {missing[0]} is missing; send the rows, or the hash of rows sent before")
            found = rows_hash(given)
            if wanted not in (None, found):
                raise RequestError(f"the hash of these rows is {found}, not {wanted}")
            if found not in self.bound:
                self.bound[found] = self.bind(given)
            if len(self.bound) > self.limits.cached_batches:
                self.bound.popitem(last=False)[1].close()
        self.bound.move_to_end(found)
        return found, self.bound[found]

    def bind(self, given: Tensors) -> BoundBatch:
        batch = Batch(**given, targets=np.zeros(len(given["input_ids"]), np.int64))
        limit = self.engine.bundle.info.max_length
        longest = max(value.shape[1] for value in given.values() if value.ndim == 2)
        if longest > limit:
            raise RequestError(f"rows have {longest} tokens, the backbone takes at most {limit}")
        if not batch.label_token_ids.size:
            raise RequestError("label_token_ids must have at least one token")
        check_tokens(self.engine.bundle, batch)
        return self.engine.bind(batch)


def rows_hash(tensors: Tensors) -> str:
    """sha256 of the names, shapes and numbers of the tensors that describe rows."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], DTYPES["INT64"])
        digest.update(f"{name}{value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


class RowModel(Model):
    """A model that computes on cached rows. `own`: its other inputs."""

    own: tuple[TensorSpec, ...] = ()

    def __init__(self, engine: Engine, limits: Limits, cache: RowCache) -> None:
        super().__init__(engine, limits)
        self.cache = cache
        decodes = engine.bundle.info.decodes
        self.inputs = (*self.own, *(spec for spec in ROW_INPUTS.values() if decodes or spec.name != OPTIONAL))

    def infer(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[Tensors, dict[str, str]]:
        for spec in self.own:
            if spec.name not in tensors:
                raise RequestError(f"input {spec.name} is missing")
            if not tensors[spec.name].size or not np.isfinite(tensors[spec.name]).all():
                raise RequestError(f"input {spec.name} must have finite numbers, at least one")
        digest, rows = self.cache.find(tensors, parameters)
        return self.compute(rows, tensors), {ROWS: digest}

    @abstractmethod
    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors: ...

    def check_size(self, rows: BoundBatch, candidates: int) -> None:
        if candidates * len(rows.batch) > self.limits.batch:
            raise RequestError(
                f"{candidates} candidates times {len(rows.batch)} rows exceed {self.limits.batch}; send fewer", 413
            )


class Backbone(RowModel):
    """Label logits (P, N, C) of prompts (P, n, H), or (P, L, n, H) for bbtv2."""

    name = BACKBONE
    outputs = (LABEL_LOGITS,)

    def __init__(self, engine: Engine, limits: Limits, cache: RowCache) -> None:
        self.own = (TensorSpec("prompts", "FP32", (-1, *engine.bundle.info.prompt_shape)),)
        super().__init__(engine, limits, cache)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        self.check_size(rows, len(tensors["prompts"]))
        return {"label_logits": rows.label_logits(tensors["prompts"])}


class BackboneLayer(RowModel):
    """bbtv2: label logits of candidates (P, n, H) for one layer of a stack (L, n, H) whose other layers are fixed."""

    name = LAYER
    outputs = (LABEL_LOGITS,)

    def __init__(self, engine: Engine, limits: Limits, cache: RowCache) -> None:
        layers, *one = engine.bundle.info.prompt_shape
        self.own = (
            TensorSpec("candidates", "FP32", (-1, *one)),
            TensorSpec("stack", "FP32", (layers, *one)),
            TensorSpec("layer", "INT64", (1,)),
        )
        super().__init__(engine, limits, cache)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        population = Population(tensors["candidates"], int(tensors["layer"][0]), tensors["stack"])
        self.check_size(rows, len(population))
        return {"label_logits": rows.label_logits(population)}


class BackboneStds(RowModel):
    """bbtv2: standard deviations (L,) of the hidden states that enter each block when all prompts are zero."""

    name = STDS

    def __init__(self, engine: Engine, limits: Limits, cache: RowCache) -> None:
        self.outputs = (TensorSpec("layer_stds", "FP32", (engine.bundle.info.n_layers,)),)
        super().__init__(engine, limits, cache)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        self.check_size(rows, 1)
        return {"layer_stds": rows.layer_stds()}


class PromptedClassifier(Model):
    """A tuned prompt: from one tensor of texts per text column of its task to label, label word and probabilities."""

    name = CLASSIFIER

    def __init__(self, engine: Engine, limits: Limits, run: Run) -> None:
        super().__init__(engine, limits)
        self.classifier = Classifier(engine, run)
        self.inputs = tuple(TensorSpec(column, "BYTES", (-1,)) for column in run.task.text)
        self.outputs = (
            TensorSpec("label", "INT64", (-1,)),
            TensorSpec("word", "BYTES", (-1,)),
            TensorSpec("probabilities", "FP32", (-1, len(self.classifier.words))),
        )

    def infer(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[Tensors, dict[str, str]]:
        probabilities = self.classifier.probabilities(self.rows(tensors))
        label = probabilities.argmax(axis=1)
        return {
            "label": label.astype(np.int64),
            "word": np.array(self.classifier.words, object)[label],
            "probabilities": probabilities.astype(np.float32),
        }, {}

    def rows(self, tensors: Tensors) -> list[dict[str, str]]:
        columns = [spec.name for spec in self.inputs]
        if missing := [column for column in columns if column not in tensors]:
            raise RequestError(f"input {missing[0]} is missing")
        count = len(tensors[columns[0]])
        if not count or any(len(tensors[column]) != count for column in columns):
            raise RequestError(f"inputs {', '.join(columns)} must have the same number of texts, at least one")
        if count > self.limits.batch:
            raise RequestError(f"{count} texts exceed {self.limits.batch}; send fewer", 413)
        return [dict(zip(columns, row, strict=True)) for row in zip(*(tensors[c] for c in columns), strict=True)]

    def facts(self) -> dict[str, str]:
        return super().facts() | {"task": self.classifier.task.name, "words": ", ".join(self.classifier.words)}


def make_models(engine: Engine, limits: Limits, run: Run | None = None) -> list[Model]:
    """The models of a bundle, and of a run on it."""
    cache = RowCache(engine, limits)
    models: list[Model] = [Backbone(engine, limits, cache)]
    if engine.bundle.info.method == "bbtv2":
        models += [BackboneLayer(engine, limits, cache), BackboneStds(engine, limits, cache)]
    return models if run is None else [*models, PromptedClassifier(engine, limits, run)]
