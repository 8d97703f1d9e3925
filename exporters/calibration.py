"""What passes through the graphs on real rows: inputs of every stage, and the range of every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.decoder_input import with_decoder_input
from bbt_accel.exporters.rows import sample_rows
from bbt_accel.exporters.sessions import Feeds, open_stage, prompt_feeds, row_feeds, session_of

Ranges = dict[str, tuple[float, float]]
"""Smallest and largest value of each tensor."""


def calibration_rows(bundle: Bundle, task: str | None, data: Path | None, most: int = 32) -> Batch:
    """The task's few-shot train rows, as a search with the default seed sees them; the shipped texts without a task."""
    if task is None:
        return sample_rows(bundle, count=32)
    from bbt_accel.data import few_shot, load_rows
    from bbt_accel.encoding import Encoder
    from bbt_accel.tasks import load_task

    loaded = load_task(task)
    train, _ = few_shot(load_rows(loaded, "train", data), loaded.n_classes, 16, 42)
    step = max(1, len(train) // most)
    return Encoder(bundle, loaded).encode(train[::step][:most])


SIZES = (0.0, 1.0, 3.0, 6.0)
"""Spread of calibration prompts, in that of the word embeddings: a search starts at 1 and goes several times as far."""


def random_prompts(bundle: Bundle, seed: int = 0) -> Float32:
    """(4, ...) random prompts of the sizes that a search goes through, zero first."""
    info = bundle.info
    rng = np.random.default_rng(seed)
    prompts = [size * info.word_embedding_std * rng.standard_normal(info.prompt_shape) for size in SIZES]
    return np.stack(prompts).astype(np.float32)


def stage_feeds(bundle: Bundle, batch: Batch, prompts: Float32, rows: int) -> Iterator[tuple[str, list[Feeds]]]:
    """Every stage with its inputs, some rows at a time, as the stages before it computed them."""
    batch = with_decoder_input(bundle.info, batch)
    feeds = [row_feeds(batch.rows(slice(i, i + rows))) for i in range(0, len(batch), rows)]
    for stage in bundle.info.stages:
        for feed in feeds:
            feed |= prompt_feeds(bundle.info, stage, prompts)
        yield stage, feeds
        if stage != bundle.info.stages[-1]:
            run = open_stage(bundle, stage)
            feeds = [feed | run(feed) for feed in feeds]


@dataclass(frozen=True)
class Channels:
    """What an activation's channels (its last axis) reach, (K,) each, and the tokens of a call."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    tokens: int


def ranges(model: onnx.ModelProto, feeds: list[Feeds], names: list[str], folder: Path) -> Ranges:
    """Smallest and largest value that each named tensor takes; tensors that are no floats are left out."""
    found: Ranges = {}
    for values in passing(model, feeds, names, folder):
        for name, value in values.items():
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


def channels(model: onnx.ModelProto, feeds: list[Feeds], names: list[str], folder: Path) -> dict[str, Channels]:
    """The same for each channel."""
    found: dict[str, Channels] = {}
    for values in passing(model, feeds, names, folder):
        for name, value in values.items():
            flat = value.reshape(-1, value.shape[-1])
            low, high, tokens = flat.min(axis=0), flat.max(axis=0), len(flat)
            if name in found:
                low, high = np.minimum(low, found[name].low), np.maximum(high, found[name].high)
                tokens = max(tokens, found[name].tokens)
            found[name] = Channels(low, high, tokens)
    return found


def passing(model: onnx.ModelProto, feeds: list[Feeds], names: list[str], folder: Path) -> Iterator[Feeds]:
    """The float tensors of these names that pass through a graph, for each of the feeds."""
    if not names:
        return
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    outputs = {o.name for o in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    file = folder / "tapped.onnx"
    try:
        onnx.save(tapped, str(file), save_as_external_data=True, location="tapped.onnx.data")
        session = session_of(file)
    finally:
        file.unlink(missing_ok=True)
        file.with_suffix(".onnx.data").unlink(missing_ok=True)
    takes = [i.name for i in session.get_inputs()]
    for feed in feeds:
        values = zip(names, session.run(names, {k: feed[k] for k in takes}), strict=True)
        yield {name: value for name, value in values if value.dtype == np.float32 and value.size}
