"""What passes through the graphs on real rows: the rows, the inputs of every stage, and the values
in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.core.batch import Batch, Float32, Int64
from bbt_accel.core.bundle import Bundle, BundleInfo, state_name
from bbt_accel.core.settings import Settings, resolve
from bbt_accel.engines.cuda import GPU_TOKENS
from bbt_accel.exporters.trace.sessions import (
    Feeds,
    calls,
    initial_feeds,
    open_session,
    open_stage,
    prompt_feeds,
    temporary_graph,
)
from bbt_accel.exporters.trace.validate import sample_rows

ROWS = 32
"""Rows that a bundle is calibrated and measured on, at most."""
ROWS_PER_CALL = 2
"""Of calibration: more take more memory, and make the runs longer that measure the sensitivity of
matmuls.
"""
SCALES = (0.0, 1.0, 3.0, 6.0)
"""Standard deviations of calibration prompts, relative to the word embeddings': a search starts at
1 and grows.
"""


@dataclass(frozen=True)
class Calibration:
    """The rows that a bundle is calibrated and measured on, and what a search with them asks of
    shape profiles.

    train: the train rows, encoded. longest: tokens of the longest row that a search or a score
    reads. settings: of the search. source: what the rows are, for a report, which may be published:
    without paths.
    """

    train: Batch
    longest: int
    settings: Settings
    source: str

    @classmethod
    def shipped(cls, bundle: Bundle) -> Calibration:
        """The shipped texts; the longest row is what the backbone takes in a call of a population
        on a GPU.
        """
        settings = resolve()
        longest = min(bundle.info.max_length, GPU_TOKENS // settings.popsize)
        return cls(sample_rows(bundle, count=ROWS), longest, settings, "shipped texts")

    def batch(self, info: BundleInfo) -> Batch:
        """At most `ROWS` of the train rows, evenly spaced, without padding that all of them
        share.
        """
        batch = self.train.rows(slice(None, None, max(1, len(self.train) // ROWS))).rows(
            slice(0, ROWS)
        )
        return batch.padded(int(lengths(batch).max()), info.special.pad)


def lengths(batch: Batch) -> Int64:
    """Real tokens of each row, (N,)."""
    return np.asarray(batch.attention_mask.sum(axis=1))


def calibration_prompts(bundle: Bundle, seed: int = 0) -> Float32:
    """(4, n, H) or (4, L, n, H): random prompts of the scales that a search goes through, zero
    first.
    """
    rng, std = np.random.default_rng(seed), bundle.info.word_embedding_std
    return np.array(
        [scale * std * rng.standard_normal(bundle.info.prompt_shape) for scale in SCALES],
        np.float32,
    )


def stage_feeds(
    bundle: Bundle, batch: Batch, prompts: Float32
) -> Iterator[tuple[str, list[Feeds]]]:
    """Every stage with its inputs, some rows at a time, as the stages before it computed them."""
    feeds = initial_feeds(bundle, batch, calls(bundle.info, batch, ROWS_PER_CALL))
    for stage in bundle.info.stages:
        for feed in feeds:
            feed |= prompt_feeds(bundle.info, stage, prompts)
        yield stage, feeds
        if stage != bundle.info.stages[-1]:
            run = open_stage(bundle, stage)
            feeds = [feed | run(feed) for feed in feeds]


@dataclass(frozen=True)
class Channels:
    """Smallest and largest value of each channel (last axis) of an activation, (K,) each, and the
    tokens per call.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    tokens: int


def channels(
    file: Path, feeds: list[Feeds], names: dict[str, int]
) -> tuple[dict[str, Channels], list[Feeds]]:
    """Smallest and largest value of each channel of float tensors, over all feeds; and the graph's
    own outputs.

    file: a graph whose weights lie beside it. names: tensor → its channels. They are reduced inside
    the graph, so that no activation is kept.
    """
    model = onnx.load(str(file), load_external_data=False)
    own = [output.name for output in model.graph.output]
    for name, size in names.items():
        model.graph.node.extend(reductions(name, size, model.graph))
    tapped = file.with_name(f"tapped.{file.name}")
    try:
        tapped.write_bytes(model.SerializeToString())
        session = open_session(tapped)
    finally:
        tapped.unlink(missing_ok=True)
    inputs, outputs = (
        [i.name for i in session.get_inputs()],
        [o.name for o in session.get_outputs()],
    )
    found, results = dict[str, Channels](), []
    for feed in feeds:
        values = dict(zip(outputs, session.run(None, {k: feed[k] for k in inputs}), strict=True))
        results.append({state_name(name): values[name] for name in own})
        for name in names:
            low, high = values[f"{name}_low"], values[f"{name}_high"]
            tokens = int(values[f"{name}_rows"].sum())
            if not tokens:
                continue
            if name in found:
                low, high = np.minimum(low, found[name].low), np.maximum(high, found[name].high)
                tokens = max(tokens, found[name].tokens)
            found[name] = Channels(low, high, tokens)
    return found, results


def reductions(name: str, size: int, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes for the smallest and the largest value of each channel of a tensor, and its number of
    rows.
    """
    flat, shape, axis = f"{name}_flat", f"{name}_flat_shape", f"{name}_axis"
    graph.initializer.append(numpy_helper.from_array(np.array([-1, size], np.int64), shape))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axis))
    yield helper.make_node("Reshape", [name, shape], [flat])
    for kind, operator in (("low", "ReduceMin"), ("high", "ReduceMax")):
        graph.output.append(
            helper.make_tensor_value_info(f"{name}_{kind}", onnx.TensorProto.FLOAT, [size])
        )
        yield helper.make_node(operator, [flat, axis], [f"{name}_{kind}"], keepdims=0)
    graph.output.append(helper.make_tensor_value_info(f"{name}_rows", onnx.TensorProto.INT64, [1]))
    yield helper.make_node("Shape", [flat], [f"{name}_rows"], start=0, end=1)


def intermediate_values(
    model: onnx.ModelProto, feeds: list[Feeds], names: list[str], folder: Path
) -> Iterator[Feeds]:
    """The named float tensors of a graph, for each of the feeds."""
    if not names:
        return
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    new = set(names) - {o.name for o in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in new)
    with temporary_graph(tapped, folder) as file:
        session = open_session(file)
    inputs = [i.name for i in session.get_inputs()]
    for feed in feeds:
        values = zip(names, session.run(names, {k: feed[k] for k in inputs}), strict=True)
        # ONNX Runtime returns None for an output that a fused operator leaves out.
        yield {
            n: value
            for n, value in values
            if value is not None and value.dtype == np.float32 and value.size
        }
