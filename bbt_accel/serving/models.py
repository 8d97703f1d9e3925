"""What the server serves: the black box, and a tuned prompt. Everything here runs in the one thread of the engine."""

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
from bbt_accel.run import Run
from bbt_accel.serving import BACKBONE, CLASSIFIER, DIGEST, LAYER, ROWS, STDS, UNKNOWN_ROWS, Limits, backbone_name
from bbt_accel.serving.protocol import DTYPES, Tensors, TensorSpec

ROW_INPUTS = (
    TensorSpec("input_ids", "INT64", (-1, -1)),
    TensorSpec("attention_mask", "INT64", (-1, -1)),
    TensorSpec("readout", "INT64", (-1,)),
    TensorSpec("label_token_ids", "INT64", (-1,)),
)
DECODER_INPUT = TensorSpec("decoder_input_ids", "INT64", (-1, -1))
LABEL_LOGITS = TensorSpec("label_logits", "FP32", (-1, -1, -1))


class Model(ABC):
    """One model of the server: its tensors, and how it answers."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits

    @abstractmethod
    def infer(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[Tensors, dict[str, str]]:
        """Outputs by name, and the parameters of the response.

        Raises RequestError, UsageError or DataError for a request that cannot be right, EngineError when the forward
        pass fails.
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
        """Triton's model configuration, whose parameters say what bundle and engine this is, and the limits."""
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


class KeptRows:
    """Rows that are bound to the engine, by their hash; of more than `Limits.kept`, the least recently used goes."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.bound: OrderedDict[str, BoundBatch] = OrderedDict()

    def find(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[str, BoundBatch]:
        """The rows that a request brings or refers to, and their hash."""
        given = {name: tensors[name] for name in (*names(ROW_INPUTS), DECODER_INPUT.name) if name in tensors}
        hash_ = parameters.get(ROWS)
        if not given and hash_ is not None:
            if hash_ not in self.bound:
                raise RequestError("these rows are not here (any more): send them again", UNKNOWN_ROWS)
            self.bound.move_to_end(hash_)
            return hash_, self.bound[hash_]
        if missing := [name for name in names(ROW_INPUTS) if name not in given]:
            raise RequestError(f"input {missing[0]} is missing; send the rows, or the hash of rows sent before")
        found = rows_hash(given)
        if hash_ not in (None, found):
            raise RequestError(f"the hash of these rows is {found}, not {hash_}")
        if found not in self.bound:
            self.bound[found] = self.bind(given)
            if len(self.bound) > self.limits.kept:
                self.bound.popitem(last=False)[1].close()
        self.bound.move_to_end(found)
        return found, self.bound[found]

    def bind(self, given: Tensors) -> BoundBatch:
        decoder = given.get(DECODER_INPUT.name)
        ids, limit = given["input_ids"], self.engine.bundle.info.max_length
        batch = Batch(
            ids,
            given["attention_mask"],
            given["readout"],
            np.zeros(len(ids), np.int64),
            given["label_token_ids"],
            decoder,
        )
        longest = max(ids.shape[1], 0 if decoder is None else decoder.shape[1])
        if longest > limit:
            raise RequestError(f"rows have {longest} tokens, the backbone takes {limit}")
        if not batch.label_token_ids.size:
            raise RequestError("label_token_ids must name a token at least")
        check_tokens(self.engine.bundle, batch)
        return self.engine.bind(batch)


def rows_hash(tensors: Tensors) -> str:
    """sha256 over names, shapes and numbers of the tensors that describe rows."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], DTYPES["INT64"])
        digest.update(f"{name}{value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


class BlackBox(Model):
    """A model that computes with kept rows. Inputs beside them are `own`."""

    own: tuple[TensorSpec, ...] = ()

    def __init__(self, engine: Engine, limits: Limits, kept: KeptRows) -> None:
        super().__init__(engine, limits)
        self.kept = kept
        decodes = engine.bundle.info.family in ("bart", "t5")
        self.inputs = (*self.own, *ROW_INPUTS, *((DECODER_INPUT,) if decodes else ()))

    def infer(self, tensors: Tensors, parameters: dict[str, Any]) -> tuple[Tensors, dict[str, str]]:
        for spec in self.own:
            if spec.name not in tensors:
                raise RequestError(f"input {spec.name} is missing")
            if not tensors[spec.name].size or not np.isfinite(tensors[spec.name]).all():
                raise RequestError(f"input {spec.name} must hold finite numbers, at least one")
        hash_, rows = self.kept.find(tensors, parameters)
        return self.compute(rows, tensors), {ROWS: hash_}

    @abstractmethod
    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors: ...

    def check_batch(self, rows: BoundBatch, candidates: int) -> None:
        if candidates * len(rows.batch) > self.limits.batch:
            raise RequestError(
                f"{candidates} candidates times {len(rows.batch)} rows are more than {self.limits.batch}; send fewer",
                413,
            )


class Backbone(BlackBox):
    """Prompts (P, n, H), or (P, L, n, H) for bbtv2, against rows: label logits (P, N, C)."""

    name = BACKBONE
    outputs = (LABEL_LOGITS,)

    def __init__(self, engine: Engine, limits: Limits, kept: KeptRows) -> None:
        self.own = (TensorSpec("prompts", "FP32", (-1, *engine.bundle.info.prompt_shape)),)
        super().__init__(engine, limits, kept)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        self.check_batch(rows, len(tensors["prompts"]))
        return {"label_logits": rows.label_logits(tensors["prompts"])}


class BackboneLayer(BlackBox):
    """bbtv2: candidates (P, n, H) of one layer in a stack (L, n, H) whose other layers are fixed."""

    name = LAYER
    outputs = (LABEL_LOGITS,)

    def __init__(self, engine: Engine, limits: Limits, kept: KeptRows) -> None:
        layers, *one = engine.bundle.info.prompt_shape
        self.own = (
            TensorSpec("candidates", "FP32", (-1, *one)),
            TensorSpec("stack", "FP32", (layers, *one)),
            TensorSpec("layer", "INT64", (1,)),
        )
        super().__init__(engine, limits, kept)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        self.check_batch(rows, len(tensors["candidates"]))
        logits = rows.layer_logits(tensors["stack"], int(tensors["layer"][0]), tensors["candidates"])
        return {"label_logits": logits}


class BackboneStds(BlackBox):
    """bbtv2: standard deviations (L,) of the hidden states that enter each block when all prompts are zero."""

    name = STDS

    def __init__(self, engine: Engine, limits: Limits, kept: KeptRows) -> None:
        self.outputs = (TensorSpec("layer_stds", "FP32", (engine.bundle.info.n_layers,)),)
        super().__init__(engine, limits, kept)

    def compute(self, rows: BoundBatch, tensors: Tensors) -> Tensors:
        self.check_batch(rows, 1)
        return {"layer_stds": rows.layer_stds()}


class PromptedClassifier(Model):
    """A tuned prompt: an input of texts for each text column of its task; label, label word and probabilities out."""

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
        columns = names(self.inputs)
        if missing := [column for column in columns if column not in tensors]:
            raise RequestError(f"input {missing[0]} is missing")
        count = len(tensors[columns[0]])
        if not count or any(len(tensors[column]) != count for column in columns):
            raise RequestError(f"inputs {', '.join(columns)} must hold as many texts each, at least one")
        if count > self.limits.batch:
            raise RequestError(f"{count} texts are more than {self.limits.batch}; send fewer", 413)
        texts = [dict(zip(columns, row, strict=True)) for row in zip(*(tensors[c] for c in columns), strict=True)]
        probabilities = self.classifier.probabilities(texts)
        label = probabilities.argmax(axis=1)
        return {
            "label": label.astype(np.int64),
            "word": np.array(self.classifier.words, object)[label],
            "probabilities": probabilities.astype(np.float32),
        }, {}

    def facts(self) -> dict[str, str]:
        return super().facts() | {"task": self.classifier.task.name, "words": ", ".join(self.classifier.words)}


def make_models(engine: Engine, limits: Limits, run: Run | None = None) -> list[Model]:
    """The models of a bundle, and of a run on it."""
    kept = KeptRows(engine, limits)
    models: list[Model] = [Backbone(engine, limits, kept)]
    if engine.bundle.info.method == "bbtv2":
        models += [BackboneLayer(engine, limits, kept), BackboneStds(engine, limits, kept)]
    return models if run is None else [*models, PromptedClassifier(engine, limits, run)]
