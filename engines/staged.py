"""What all engines that run a bundle's stages share: buckets, populations, and bbtv2's cached layers.

A subclass of `StagedEngine` says how to run one stage and how arrays come and go; about 100 lines make an engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from bbt_accel.batch import Batch, Float32, Int64
from bbt_accel.bundle import PROJECT, TALLY, Bundle
from bbt_accel.decoder_input import with_decoder_input
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens, stacks
from bbt_accel.engines.cutting import buckets, cut
from bbt_accel.errors import EngineError, UsageError
from bbt_accel.objective import COLUMNS, Float64, check_targets
from bbt_accel.projection import Latent, Projection, Prompts, computed
from bbt_accel.savings import inside

Array = Any
"""An array of the engine's own kind, where the engine computes: numpy, torch, OrtValue, a device address."""
Arrays = dict[str, Array]
Bring = Callable[[int, int], list[Array]]
"""The prompts of candidates start .. stop - 1, as the engine's arrays: one, or one for each layer."""


class StagedEngine(Engine):
    """An engine over the stages of a bundle: `model` for bbt; `embed`, `block_00` … and `last` for bbtv2."""

    tokens_per_call = 4096
    """Tokens (candidates × rows × length) in one call: bounds the memory, and keeps activations near the cores."""
    bucket_step = 1
    """Rows whose lengths round up to the same multiple of this are computed together."""
    rows_per_call: int | None = None
    """Rows in one call at most, where what is compiled takes no more."""
    candidates_per_call: int | None = None
    """Candidates in one call at most, likewise."""
    on_device = False
    """Whether `run` runs the graphs `project` and `tally` too: then a matrix and the targets are brought there once, z
    comes in place of prompts, and a tally goes back in place of label logits."""

    def __init__(self, bundle: Bundle, device: str, threads: int | None, without: frozenset[str]) -> None:
        super().__init__(bundle)
        self.device, self.threads, self.without = device, threads, without
        self.projections: WeakKeyDictionary[Projection, Arrays] = WeakKeyDictionary()
        """The matrices that have been brought to where the engine computes, for as long as they are in use."""
        self.standing: dict[tuple[int, int], tuple[Float32, Array]] = {}
        """bbtv2 on a device: layer and population → the prompt that stood in the layer last, and its array."""
        missing = [name for name in inside(without) if name not in bundle.info.without]
        if missing:
            raise UsageError(f"{missing[0]} is part of the graphs of {bundle.path}: export --without {missing[0]}")

    @abstractmethod
    def run(self, stage: str, inputs: Arrays) -> Arrays:
        """Run one stage; outputs by name. Inputs that the stage does not take are ignored."""

    @abstractmethod
    def put(self, array: Float32 | Int64) -> Array:
        """Bring an array to where the engine computes."""

    @abstractmethod
    def get(self, array: Array) -> Float32:
        """Bring an array back."""

    def put_prompts(self, prompts: Prompts) -> Array:
        """Bring prompts to where the engine computes; those that are projected there come as z."""
        if not isinstance(prompts, Latent):
            return self.put(np.ascontiguousarray(prompts))
        return self.run(PROJECT, {"z": self.put(prompts.z), **self.matrices(prompts.projection)})["prompts"]

    def refill(self, array: Array | None, prompts: Float32) -> Array:
        """Bring prompts that take the place of others, into the same array where its address matters."""
        return self.put_prompts(prompts)

    def stand(self, layer: int, prompt: Float32, population: int) -> Array:
        """A layer's prompt (n, H), once for each of so many candidates; on a device it stays until it has changed."""
        if not self.on_device:
            return self.put_prompts(np.repeat(prompt[None], population, axis=0))
        known, array = self.standing.get((layer, population), (None, None))
        if known is None or not np.array_equal(known, prompt):
            known = prompt.copy()
            array = self.refill(array, np.repeat(known[None], population, axis=0))
            self.standing[layer, population] = known, array
        return array

    def matrices(self, projection: Projection) -> Arrays:
        """The inputs of the graph `project` besides z."""
        if projection not in self.projections:
            arrays = {"matrix": projection.matrix, "p0": projection.p0}
            self.projections[projection] = {name: self.put(array) for name, array in arrays.items()}
        return self.projections[projection]

    def close(self) -> None:
        self.projections.clear()
        self.standing.clear()

    def bind(self, batch: Batch) -> StagedBoundBatch:
        check_tokens(self.bundle, batch)
        return StagedBoundBatch(self, with_decoder_input(self.bundle.info, batch, "short-decoder" not in self.without))


@dataclass
class Bucket:
    """Rows that are computed together, held by the engine."""

    rows: Int64
    length: int
    inputs: Arrays
    layer: int = -1
    below: bytes = b""
    state: Arrays = field(default_factory=dict)
    """What enters block `layer` when the prompts below it are `below`: bbtv2's cache."""


Calls = Iterator[tuple[Bucket, slice, Array]]
"""Label logits of some candidates on the rows of a bucket, call after call."""


class StagedBoundBatch(BoundBatch):
    """Rows bound to a staged engine."""

    def __init__(self, engine: StagedEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine, self.info = engine, engine.bundle.info
        self.on_device = engine.on_device
        groups = self.groups(engine.without, engine.bucket_step)
        self.buckets = [self.hold(rows, engine.without) for rows in groups]

    def groups(self, without: frozenset[str], step: int) -> list[Int64]:
        """Row indices of each bucket."""
        found = buckets(self.info, self.batch, without, self.engine.tokens_per_call, step)
        most = self.engine.rows_per_call or len(self.batch)
        return [rows[i : i + most] for rows in found for i in range(0, len(rows), most)]

    def hold(self, rows: Int64, without: frozenset[str]) -> Bucket:
        part = cut(self.info, self.batch, rows, without)
        if part.decoder_input_ids is not None and "short-decoder" not in without:
            part = with_decoder_input(self.info, part)
        names = ("input_ids", "attention_mask", "readout", "label_token_ids", "decoder_input_ids")
        found = {name: getattr(part, name) for name in names}
        if self.on_device:
            found["classes"] = np.arange(len(part.label_token_ids), dtype=np.float32)
            found["targets"] = np.equal.outer(part.targets, found["classes"]).astype(np.float32)
        inputs = {name: self.engine.put(value) for name, value in found.items() if value is not None}
        return Bucket(rows, part.input_ids.shape[1], inputs)

    def _label_logits(self, prompts: Prompts) -> Float32:
        return self.logits(len(prompts), self.calls(prompts))

    def _layer_logits(self, stack: Float32, layer: int, candidates: Prompts) -> Float32:
        return self.logits(len(candidates), self.layer_calls(stack, layer, candidates))

    def _tally(self, prompts: Prompts) -> Float64:
        if not self.on_device:
            return super()._tally(computed(prompts))
        return self.tallied(len(prompts), self.calls(prompts))

    def _layer_tally(self, stack: Float32, layer: int, candidates: Prompts) -> Float64:
        if not self.on_device:
            return super()._layer_tally(stack, layer, computed(candidates))
        return self.tallied(len(candidates), self.layer_calls(stack, layer, candidates))

    def logits(self, population: int, calls: Calls) -> Float32:
        """The label logits of all calls, in the order of the rows."""
        found = np.empty((population, len(self.batch), len(self.batch.label_token_ids)), np.float32)
        for bucket, some, logits in calls:
            found[some, bucket.rows] = self.engine.get(logits)
        return found

    def tallied(self, population: int, calls: Calls) -> Float64:
        """The tally of all calls. What is waited for is waited for once, when all has been given to the device."""
        check_targets(self.batch.targets, len(self.batch.label_token_ids))
        parts = [
            (some, self.engine.run(TALLY, {**bucket.inputs, "label_logits": logits})["tally"])
            for bucket, some, logits in calls
        ]
        found = np.zeros((population, len(COLUMNS)))
        for some, part in parts:
            found[some] += self.engine.get(part)
        return found

    def calls(self, prompts: Prompts) -> Calls:
        """Run whole populations; label logits are yielded where the engine computes."""
        self.require_open()

        @self.once
        def brought(start: int, stop: int) -> list[Array]:
            some = prompts[start:stop]
            deep = self.info.method == "bbtv2"
            return [self.engine.put_prompts(p) for p in (np.moveaxis(computed(some), 1, 0) if deep else [some])]

        for bucket in self.buckets:
            for some in self.chunks(len(prompts), bucket):
                here = brought(some.start, some.stop)
                if self.info.method == "bbt":
                    out = self.engine.run("model", {**bucket.inputs, "prompts": here[0]})["label_logits"]
                else:
                    out = self.upward(bucket, self.embed(bucket), 0, here)
                yield bucket, some, out

    def layer_calls(self, stack: Float32, layer: int, candidates: Prompts) -> Calls:
        """Run the candidates of one layer, from what is cached of the layers below."""
        if "layer-cache" in self.engine.without:
            yield from self.calls(stacks(stack, layer, computed(candidates)))
            return
        self.require_open()

        @self.once
        def brought(start: int, stop: int) -> list[Array]:
            above = [self.engine.stand(i, stack[i], stop - start) for i in range(layer + 1, self.info.n_layers)]
            return [self.engine.put_prompts(candidates[start:stop]), *above]

        for bucket in self.buckets:
            self.advance(bucket, stack, layer)
            for some in self.chunks(len(candidates), bucket):
                yield bucket, some, self.upward(bucket, bucket.state, layer, brought(some.start, some.stop))

    def advance(self, bucket: Bucket, stack: Float32, layer: int) -> None:
        """Bring the cached state to what enters block `layer`, from where it stands or from the embedding."""
        if not (0 <= bucket.layer <= layer and bucket.below == stack[: bucket.layer].tobytes()):
            bucket.layer, bucket.state = 0, self.embed(bucket)
        while bucket.layer < layer:
            here = self.engine.stand(bucket.layer, stack[bucket.layer], 1)
            bucket.state = self.block(bucket, bucket.state, bucket.layer, here)
            bucket.layer += 1
        bucket.below = stack[:layer].tobytes()

    def once(self, bring: Bring) -> Bring:
        """On a device, what is brought for one bucket serves the others; elsewhere it would but take memory."""
        return cache(bring) if self.on_device else bring

    def embed(self, bucket: Bucket) -> Arrays:
        return self.engine.run("embed", bucket.inputs)

    def block(self, bucket: Bucket, state: Arrays, layer: int, prompts: Array) -> Arrays:
        """Block `layer` with its prompts (P or 1, n, H)."""
        out = self.engine.run(f"block_{layer:02d}", {**bucket.inputs, **state, "prompts": prompts})
        return {name.removesuffix("_out"): value for name, value in out.items()}

    def upward(self, bucket: Bucket, state: Arrays, layer: int, prompts: Sequence[Array]) -> Array:
        """From what enters block `layer` to the label logits; one array of prompts for each block from there."""
        *below, last = prompts
        for here in below:
            state = self.block(bucket, state, layer, here)
            layer += 1
        return self.engine.run("last", {**bucket.inputs, **state, "prompts": last})["label_logits"]

    def layer_stds(self) -> Float32:
        whole = frozenset({"buckets"})  # the original measures the padded batch
        held = [self.hold(rows, whole) for rows in self.groups(whole, 1)]
        states = [self.embed(bucket) for bucket in held]
        nothing = self.engine.put_prompts(np.zeros((1, *self.info.prompt_shape[1:]), np.float32))
        stds = []
        for layer in range(self.info.n_layers):
            stds.append(clipped_std(np.concatenate([self.hidden(s) for s in states])))
            if layer < self.info.n_layers - 1:
                states = [self.block(b, s, layer, nothing) for b, s in zip(held, states, strict=True)]
        return np.array(stds, np.float32)

    def hidden(self, state: Arrays) -> Float32:
        """All hidden states of some rows as one flat array; a shared prefix counts once a row."""
        text: Float32 = self.engine.get(state["hidden"])[0]
        if "prefix" not in state:
            return text.reshape(-1)
        prefix = self.engine.get(state["prefix"])
        return np.concatenate([np.broadcast_to(prefix, (len(text), *prefix.shape[1:])), text], axis=1).reshape(-1)

    def chunks(self, population: int, bucket: Bucket) -> Iterator[slice]:
        """Candidates that fit one call."""
        size = max(1, self.engine.tokens_per_call // (len(bucket.rows) * bucket.length))
        size = min(size, self.engine.candidates_per_call or size)
        if "population" in self.engine.without:
            size = 1
        for start in range(0, population, size):
            yield slice(start, min(start + size, population))

    def require_open(self) -> None:
        if not self.buckets:
            raise EngineError("these rows are closed; bind them again")

    def close(self) -> None:
        self.buckets = []


def clipped_std(values: Float32, rounds: int = 5) -> float:
    """Standard deviation after rounds of clipping to mean ± 3 standard deviations."""
    for _ in range(rounds):
        mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        values = np.clip(values, mean - 3 * std, mean + 3 * std)
    return float(values.std(dtype=np.float64))
