"""Check a freshly exported bundle against eager PyTorch: names, shapes and values, on real padded rows.

Run as `python -m bbt_accel.exporters.validate BUNDLE`, in a process that has not traced anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bbt_accel.exporters.rows import sample_rows

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle, BundleInfo
from bbt_accel.decoder_input import with_decoder_input
from bbt_accel.errors import BbtError, ExportError, MissingDependency

Feeds = dict[str, Any]
"""Inputs of a stage by name, numpy."""


def run_stages(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of the graphs as they lie on disk, with ONNX Runtime on the CPU."""
    feeds = row_feeds(with_decoder_input(bundle.info, batch))
    for stage in bundle.info.stages:
        feeds |= prompt_feeds(bundle.info, stage, prompts)
        feeds |= run_stage(open_session(bundle, stage), stage, feeds)
    logits: Float32 = feeds["label_logits"]
    return logits


def run_stage(session: Any, stage: str, feeds: Feeds) -> Feeds:
    """Outputs of one stage, under the names that the next stage takes."""
    missing = [i.name for i in session.get_inputs() if i.name not in feeds]
    if missing:
        raise ExportError(f"{stage} asks for {missing}, which no stage before it gives")
    outputs = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return {o.name.removesuffix("_out"): v for o, v in zip(session.get_outputs(), outputs, strict=True)}


def row_feeds(batch: Batch) -> Feeds:
    names = ("input_ids", "attention_mask", "readout", "label_token_ids", "decoder_input_ids")
    found = {name: getattr(batch, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def prompt_feeds(info: BundleInfo, stage: str, prompts: Float32) -> Feeds:
    """The prompts that a stage takes: all of them for bbt, those of its layer for bbtv2."""
    if info.method == "bbt":
        return {"prompts": prompts}
    if stage == "embed":
        return {}
    layer = info.n_layers - 1 if stage == "last" else int(stage.removeprefix("block_"))
    return {"prompts": np.ascontiguousarray(prompts[:, layer])}


def open_session(bundle: Bundle, stage: str) -> Any:
    """A stage of a bundle in ONNX Runtime on the CPU."""
    return session_of(bundle.path / f"{stage}.onnx")


def session_of(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency('the check needs ONNX Runtime: pip install "bbt-accel[cpu]" (or [gpu])') from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])


def reference_logits(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of transformers' own class, one candidate at a time."""
    import torch
    from bbt_accel.exporters.families import load_model
    from bbt_accel.exporters.reference import Reference

    reference = Reference(load_model(bundle.path), bundle.info)
    fields = (batch.input_ids, batch.attention_mask, batch.readout, batch.label_token_ids)
    rows = [torch.from_numpy(x) for x in fields]
    each = [reference.label_logits(torch.from_numpy(p), *rows).numpy() for p in prompts]
    return np.stack(each)


def scaled_error(logits: Float32, wanted: Float32) -> float:
    """Largest absolute difference, relative to the largest logit where that is beyond 1; inf for other shapes."""
    if logits.shape != wanted.shape:
        return float("inf")
    return float(np.abs(logits - wanted).max() / max(1.0, np.abs(wanted).max()))


def main(path: str) -> None:
    bundle = Bundle.read(path)
    batch = sample_rows(bundle)
    rng = np.random.default_rng(0)
    shape = (3, *bundle.info.prompt_shape)
    prompts = (bundle.info.word_embedding_std * rng.standard_normal(shape)).astype(np.float32)
    error = scaled_error(run_stages(bundle, batch, prompts), reference_logits(bundle, batch, prompts))
    print(json.dumps({"max_error": error, "rows": len(batch), "candidates": len(prompts)}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BbtError as problem:
        sys.exit(str(problem))
