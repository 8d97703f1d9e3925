"""What all engines that run a bundle's stages share: buckets, populations, and bbtv2's cached
layers.

A subclass of `StagedEngine` defines how to run one stage, and how arrays reach its device; about 60
lines.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from bbt_accel.core.batch import Batch, Float32, Float64, Int64
from bbt_accel.core.bundle import PROJECT, STATES, STATISTICS, block_stage, state_name
from bbt_accel.core.objective import COLUMNS, check_targets
from bbt_accel.core.optimizations import in_graph
from bbt_accel.core.population import Latent, LayerPrompts, Population
from bbt_accel.core.projection import Projection
from bbt_accel.core.settings import DEFAULTS
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.bucketing import bucket_rows, trim
from bbt_accel.errors import EngineError, UsageError

if TYPE_CHECKING:
    from bbt_accel.engines.plans import ShapeProfile

Array = Any
"""An array of the engine's own kind, on its device: numpy, torch, OrtValue, device memory."""
Arrays = dict[str, Array]
GPU_CALL = 1024
"""`call_overhead` of a call that is a CUDA graph: what passes between its kernels, and the last
wave of each matmul. An estimate for RoBERTa-large on an H100 (docs/explanation/gpu.md); `make
gpu-check` measures it."""
CONTEXTS = 4
"""Contexts whose keys and values an engine keeps: those of the train and dev rows, and of another
task.
"""


class StagedEngine(Engine):
    """An engine over the stages of a bundle: `model` for bbt; `embed`, `block_00` … and `last` for
    bbtv2.

    Those of a decoder also read what the stage `context` makes of the tokens that all rows begin
    with.
    """

    tokens_per_call = 4096
    """Tokens (candidates × rows × length) per call: bounds the memory, and keeps activations in the
    caches.
    """
    bucket_step = 1
    """Rows whose keys round up to the same multiple of this share a bucket; on a device they are
    padded to it, which
    fused attention asks for: ONNX Runtime's with a bias takes multiples of 8 alone, and 8 halves
    are a vector."""
    call_overhead = 0
    """What a call costs beyond its tokens, as a number of tokens (candidates × rows × length)."""
    candidates = DEFAULTS.popsize
    """Candidates of a typical call, that of the papers' searches."""
    rows_per_call = candidates_per_call = 2**31
    """Rows and candidates per call at most, where compiled code accepts no more."""
    on_device = False
    """Whether `run` also runs the graphs `project` and `statistics`: then projection matrices and
    targets are uploaded once, z is sent instead of prompts, and batch statistics come back instead
    of label logits."""

    def load(self) -> None:
        self.longest = self.bundle.info.max_length
        """Tokens of the longest row that the engine takes."""
        self.projections: WeakKeyDictionary[Projection, Arrays] = WeakKeyDictionary()
        """Uploaded projections, for as long as they are in use."""
        self.fixed_prompts: dict[tuple[int, int], tuple[Float32, Array]] = {}
        """bbtv2 on a device: layer and population → the layer's last fixed prompt, and its
        array.
        """
        self.contexts: dict[bytes, Arrays] = {}
        """The tokens of a context → what the stage `context` makes of them, the latest last."""
        for name in in_graph(self.without):
            if name not in self.bundle.info.without:
                raise UsageError(
                    f"{name} is part of the graphs of {self.bundle.path}; "
                    f"export_bundle(..., without=[{name!r}]) omits it"
                )

    def limit(self, profile: ShapeProfile) -> None:
        """Keep to what compiled plans take."""
        self.longest, self.candidates = profile.tokens[2], profile.candidates[1]
        self.candidates_per_call, self.rows_per_call = profile.candidates[2], profile.rows[2]
        self.tokens_per_call = profile.candidates[2] * profile.rows[2] * profile.tokens[2]

    @abstractmethod
    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        """Run one stage; outputs by name. Inputs that the stage does not take are ignored.

        skip: outputs that nobody reads; an engine for which they cost something leaves them out.
        """

    def to_device(self, array: Float32 | Int64) -> Array:
        return np.ascontiguousarray(array)

    def to_host(self, array: Array) -> Float32:
        return np.asarray(array, np.float32)

    def upload_prompts(self, prompts: LayerPrompts) -> Array:
        """One layer's prompts on the device; those that are projected there are sent as z."""
        if not isinstance(prompts, Latent):
            return self.to_device(np.ascontiguousarray(prompts))
        inputs = {"z": self.to_device(prompts.z), **self.upload_projection(prompts.projection)}
        return self.run(PROJECT, inputs)["prompts"]

    def overwrite(self, array: Array | None, prompts: Float32) -> Array:
        """Upload prompts, replacing others: into the same array where CUDA graphs depend on its
        address.
        """
        return self.upload_prompts(prompts)

    def upload_fixed(self, layer: int, prompt: Float32, population: int) -> Array:
        """A layer's fixed prompt (n, H), repeated for each candidate; on a device it is kept until
        it changes.
        """
        if not self.on_device:
            return self.upload_prompts(np.repeat(prompt[None], population, axis=0))
        known, array = self.fixed_prompts.get((layer, population), (None, None))
        if known is None or not np.array_equal(known, prompt):
            array = self.overwrite(array, np.repeat(prompt[None], population, axis=0))
            self.fixed_prompts[layer, population] = prompt.copy(), array
        return array

    def upload_projection(self, projection: Projection) -> Arrays:
        """The inputs of the graph `project` besides z."""
        if projection not in self.projections:
            matrix, p0 = self.to_device(projection.matrix), self.to_device(projection.p0)
            self.projections[projection] = {"matrix": matrix, "p0": p0}
        return self.projections[projection]

    def shared_context(self, inputs: Arrays, key: bytes) -> Arrays:
        """A decoder's keys and values of the context that these rows begin with, from the cache if
        they are there.
        """
        if "context-cache" in self.without:
            return self.run("context", inputs)
        found = self.contexts.pop(key, None) or self.run("context", inputs)
        self.contexts[key] = found
        if len(self.contexts) > CONTEXTS:
            self.contexts.pop(next(iter(self.contexts)))
        return found

    closed = False

    def close(self) -> None:
        self.closed = True
        self.contexts.clear()
        self.projections.clear()
        self.fixed_prompts.clear()

    def bind(self, batch: Batch) -> StagedBoundBatch:
        check_tokens(self.bundle, batch, self.without)
        return StagedBoundBatch(
            self, batch.with_decoder_input(self.bundle.info, "short-decoder" not in self.without)
        )


@dataclass
class Bucket:
    """Rows that are computed together, on the engine's device."""

    rows: Int64
    length: int
    inputs: Arrays
    context: bytes = b""
    """The tokens that a decoder's rows begin with."""
    layer: int = -1
    key: bytes = b""
    state: Arrays = field(default_factory=dict)
    """bbtv2's cache: what enters block `layer` when `key` are the prompts of the layers below."""


class StagedBoundBatch(BoundBatch):
    """Rows bound to a staged engine."""

    def __init__(self, engine: StagedEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine, self.info = engine, engine.bundle.info
        self.projects = engine.on_device
        self.buckets = self.upload_buckets(engine.without, engine.bucket_step)

    def upload_buckets(self, without: frozenset[str], step: int) -> list[Bucket]:
        engine, aligned = self.engine, step if self.engine.on_device else 1
        limits = (
            engine.tokens_per_call,
            engine.rows_per_call,
            engine.call_overhead // engine.candidates,
        )
        longest = engine.longest
        if (
            longest == self.info.max_length and self.batch.context_ids is not None
        ):  # plans count rows without a context
            longest -= len(self.batch.context_ids)
        buckets = []
        for rows in bucket_rows(self.info, self.batch, without, step, *limits):
            part = trim(self.info, self.batch, rows, without, aligned, longest)
            part = part.with_decoder_input(self.info, "short-decoder" not in without)
            arrays: dict[str, Any] = part.graph_inputs(self.info)
            context = b"".join(
                arrays[name].tobytes() for name in ("context_ids", "context_mask") if name in arrays
            )
            if self.engine.on_device:
                arrays["classes"] = classes = np.arange(len(part.label_token_ids), dtype=np.float32)
                arrays["targets"] = np.equal.outer(part.targets, classes).astype(np.float32)
            inputs = {name: self.engine.to_device(value) for name, value in arrays.items()}
            buckets.append(Bucket(rows, part.input_ids.shape[1], inputs, context))
        return buckets

    def _label_logits(self, population: Population) -> Float32:
        return self.gather(population, ["label_logits"])["label_logits"]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        return self.gather(population, ["label_logits", *STATES])

    def gather(self, population: Population, names: Collection[str]) -> dict[str, Float32]:
        """Outputs of all calls by name, on the host: (P, N, …)."""
        whole: dict[str, Float32] = {}
        for bucket, some, found in self.calls(
            population, [name for name in STATES if name not in names]
        ):
            for name in names:
                part = self.engine.to_host(found[name])
                if name not in whole:
                    whole[name] = np.empty(
                        (len(population), len(self.batch), part.shape[-1]), np.float32
                    )
                whole[name][some, bucket.rows] = part
        return whole

    def _statistics(self, population: Population) -> Float64:
        if not self.engine.on_device:
            return super()._statistics(population)
        check_targets(self.batch.targets, len(self.batch.label_token_ids))
        parts = [
            (some, self.engine.run(STATISTICS, bucket.inputs | outputs)["statistics"])
            for bucket, some, outputs in self.calls(population)
        ]
        found = np.zeros((len(population), len(COLUMNS)))
        for some, part in parts:  # the host waits once, after everything has been enqueued
            found[some] += self.engine.to_host(part)
        return found

    def require_open(self) -> None:
        """Raises EngineError for rows, or an engine, that were closed."""
        if self.engine.closed:
            raise EngineError("the engine is closed; load it again")
        if not self.buckets:
            raise EngineError("these rows are closed; bind them again")

    def calls(
        self, population: Population, skip: Collection[str] = STATES
    ) -> Iterator[tuple[Bucket, slice, Arrays]]:
        """Run the population on every bucket, a few candidates at a time; yields their outputs on
        the device.
        """
        self.require_open()
        if "layer-cache" in self.engine.without:
            population = population.whole()
        uploaded: dict[tuple[int, int], list[Array]] = {}
        for bucket in self.buckets:
            self.add_context(bucket)
            state = self.entering(bucket, population)
            for some in self.chunks(len(population), bucket):
                key = some.start, some.stop
                prompts = uploaded.get(key) or self.upload_candidates(population[some])
                if (
                    self.engine.on_device
                ):  # one upload serves all buckets; on a host a copy would only take memory
                    uploaded[key] = prompts
                if self.info.method == "bbt":
                    outputs = self.engine.run(
                        "model", {**bucket.inputs, "prompts": prompts[0]}, skip
                    )
                else:
                    outputs = self.run_from(population.layer or 0, bucket, state, prompts, skip)
                yield bucket, some, outputs

    def add_context(self, bucket: Bucket) -> None:
        """Add to a decoder's inputs what the stage `context` makes of the tokens that its rows
        begin with.
        """
        if self.info.causal:
            bucket.inputs |= self.engine.shared_context(bucket.inputs, bucket.context)

    def upload_candidates(self, some: Population) -> list[Array]:
        """The prompts of each layer from the first in which candidates differ; of bbt the only
        ones.
        """
        if self.info.method == "bbt":
            return [self.engine.upload_prompts(some.candidates)]
        arrays = []
        for layer in range(some.layer or 0, self.info.n_layers):
            prompts = some.of_layer(layer)
            if prompts is not None:
                arrays.append(self.engine.upload_prompts(prompts))
            elif some.fixed is not None:
                arrays.append(self.engine.upload_fixed(layer, some.fixed[layer], len(some)))
        return arrays

    def entering(self, bucket: Bucket, population: Population) -> Arrays:
        """bbtv2: the hidden states that enter the first layer in which candidates differ, from the
        cache if it fits.
        """
        if self.info.method == "bbt":
            return {}
        if population.layer is None or population.fixed is None:
            return self.engine.run("embed", bucket.inputs)
        layer, fixed = population.layer, population.fixed
        if not (0 <= bucket.layer <= layer and bucket.key == fixed[: bucket.layer].tobytes()):
            # Its memory is free again, as in the first sweep over the layers; a call that fails
            # leaves no key behind.
            bucket.layer, bucket.key, bucket.state = -1, b"", {}
            bucket.layer, bucket.state = 0, self.engine.run("embed", bucket.inputs)
        while bucket.layer < layer:
            prompt = self.engine.upload_fixed(bucket.layer, fixed[bucket.layer], 1)
            bucket.state = self.run_block(bucket.layer, bucket, bucket.state, prompt)
            bucket.layer += 1
        bucket.key = fixed[:layer].tobytes()
        return bucket.state

    def run_block(self, layer: int, bucket: Bucket, state: Arrays, prompts: Array) -> Arrays:
        """Block `layer` with its prompts (P or 1, n, H)."""
        out = self.engine.run(block_stage(layer), {**bucket.inputs, **state, "prompts": prompts})
        return {state_name(name): value for name, value in out.items()}

    def run_from(
        self, layer: int, bucket: Bucket, state: Arrays, prompts: list[Array], skip: Collection[str]
    ) -> Arrays:
        """From what enters block `layer` to the last outputs; one array of prompts for each block
        from there.
        """
        for i, own in enumerate(prompts[:-1]):
            state = self.run_block(layer + i, bucket, state, own)
        return self.engine.run("last", {**bucket.inputs, **state, "prompts": prompts[-1]}, skip)

    def layer_stds(self) -> Float32:
        self.require_open()
        self.bundle.require("bbtv2")
        check_tokens(self.bundle, self.batch, frozenset({"buckets"}))
        buckets = self.upload_buckets(
            frozenset({"buckets"}), 1
        )  # the original measures the padded batch
        for bucket in buckets:
            self.add_context(bucket)
        states = [self.engine.run("embed", bucket.inputs) for bucket in buckets]
        zero = self.engine.upload_prompts(np.zeros((1, *self.info.prompt_shape[1:]), np.float32))
        stds = []
        for layer in range(self.info.n_layers):
            if layer:
                states = [
                    self.run_block(layer - 1, b, s, zero)
                    for b, s in zip(buckets, states, strict=True)
                ]
            stds.append(
                clipped_std(np.concatenate(list(map(partial(self.hidden, layer), buckets, states))))
            )
        return np.array(stds, np.float32)

    def hidden(self, layer: int, bucket: Bucket, state: Arrays) -> Float32:
        """All hidden states that enter a block, as one flat array; what rows share counts once per
        row.
        """
        text: Float32 = self.engine.to_host(state["hidden"])[0]
        parts = [text]
        if "prefix" in state:
            parts.insert(0, self.engine.to_host(state["prefix"]))
        if self.info.causal:
            real = self.engine.to_host(bucket.inputs["context_mask"]) >= 0
            parts.insert(0, self.engine.to_host(bucket.inputs["context_hidden"])[layer, real][None])
        whole = [np.broadcast_to(part, (len(text), *part.shape[1:])) for part in parts]
        return np.concatenate(whole, axis=1).reshape(-1)

    def chunks(self, population: int, bucket: Bucket) -> Iterator[slice]:
        """Candidates per call."""
        fitting = self.engine.tokens_per_call // (len(bucket.rows) * bucket.length)
        size = (
            1
            if "population" in self.engine.without
            else max(1, min(fitting, self.engine.candidates_per_call))
        )
        for start in range(0, population, size):
            yield slice(start, min(start + size, population))

    def close(self) -> None:
        self.buckets = []


def clipped_std(values: Float32, rounds: int = 5) -> float:
    """Standard deviation after rounds of clipping to mean ± 3 standard deviations."""
    for _ in range(rounds):
        mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        values = np.clip(values, mean - 3 * std, mean + 3 * std)
    return float(values.std(dtype=np.float64))
