"""Bundles for OpenVINO: its own format, in fp32 or with the int8 of `exporters.int8`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from bbt_accel.errors import MissingDependency


def save_openvino(model: onnx.ModelProto, folder: Path, stage: str) -> Counter[str]:
    """Convert one graph, which holds its weights, and write it. Returns how often each of its operators stands in it.

    OpenVINO's own low-precision transformations turn the quantized products into 8-bit ones when the graph is loaded.
    """
    openvino = library()
    file = folder / f"{stage}.onnx"
    try:
        onnx.save(model, str(file), save_as_external_data=True, location=f"{stage}.onnx.data")
        converted = openvino.convert_model(file)
    finally:
        file.unlink(missing_ok=True)
        file.with_suffix(".onnx.data").unlink(missing_ok=True)
    openvino.save_model(converted, folder / f"{stage}.xml", compress_to_fp16=False)
    return Counter(op.get_type_name() for op in converted.get_ops())


def library() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingDependency('--target openvino needs OpenVINO: pip install "bbt-accel[openvino]"') from None
    return openvino
