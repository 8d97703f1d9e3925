"""A bundle's stages as plain functions from arrays to arrays, on the CPU: for checks and calibration.

Engines are what runs a search; this is what an exporter needs to look at its own work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle, BundleInfo
from bbt_accel.decoder_input import with_decoder_input
from bbt_accel.errors import ExportError, MissingDependency

Feeds = dict[str, Any]
"""Inputs or outputs of a stage by name, numpy."""
RunStage = Callable[[Feeds], Feeds]


def open_stage(bundle: Bundle, stage: str) -> RunStage:
    """One stage of a bundle. What it returns has the names that the next stage takes."""
    if bundle.info.target == "openvino":
        return openvino_stage(bundle.path / f"{stage}.xml")
    return onnx_stage(bundle.path / f"{stage}.onnx")


def onnx_stage(file: Path) -> RunStage:
    """A graph in ONNX Runtime."""
    session = session_of(file)
    takes = [i.name for i in session.get_inputs()]
    gives = [o.name.removesuffix("_out") for o in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        missing = [name for name in takes if name not in feeds]
        if missing:
            raise ExportError(f"{file.name} asks for {', '.join(missing)}, which no stage before it gives")
        return dict(zip(gives, session.run(None, {name: feeds[name] for name in takes}), strict=True))

    return run


def session_of(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency('the check needs ONNX Runtime: pip install "bbt-accel[cpu]" (or [gpu])') from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])


def openvino_stage(file: Path) -> RunStage:
    """An OpenVINO model in full precision, where it is not quantized."""
    try:
        import openvino
    except ImportError:
        raise MissingDependency('openvino is not installed: pip install "bbt-accel[openvino]"') from None
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    takes = [i.get_any_name() for i in model.inputs]
    gives = [o.get_any_name().removesuffix("_out") for o in model.outputs]

    def run(feeds: Feeds) -> Feeds:
        found = model({name: feeds[name] for name in takes})
        return {name: np.array(found[i]) for i, name in enumerate(gives)}

    return run


def run_stages(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of all stages as they lie on disk."""
    feeds = row_feeds(with_decoder_input(bundle.info, batch))
    for stage in bundle.info.stages:
        feeds |= prompt_feeds(bundle.info, stage, prompts)
        feeds |= open_stage(bundle, stage)(feeds)
    logits: Float32 = feeds["label_logits"]
    return logits


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
