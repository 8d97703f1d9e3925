"""Each target's own format: graphs as its runtime reads them best, or PyTorch's weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bbt_accel.errors import ExportError, first_line
from bbt_accel.exporters import graph
from bbt_accel.exporters.families import DTYPES
from bbt_accel.exporters.sessions import temporary_graph
from bbt_accel.machine import describe_machine


def read_graph(file: Path, target: str) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A stage in fp32 with its weights inside, and how many operators of each kind were fused.

    Fused for ONNX Runtime alone: other runtimes fuse by themselves, and TensorRT has no ONNX Runtime operators.
    """
    if target != "ort":
        return (onnx.load(str(file)) if target == "trt" else graph.load_stage(file)), {}
    # onnxscript's fusions: attention, skip connections with norms, bias with GELU.
    model, counts = optimize_for_ort(ir.load(file), clear_metadata=True)
    proto = ir.to_proto(model)
    onnx.load_external_data_for_model(proto, str(file.parent))
    return proto, {name: count for name, count in counts.items() if count}


def save_openvino(model: onnx.ModelProto, folder: Path, stage: str) -> Counter[str]:
    """Write a graph in OpenVINO's format. Returns the count of each operator.

    OpenVINO's low-precision transformations turn quantized matmuls into 8-bit ones when the graph is loaded.
    """
    import openvino

    with temporary_graph(model, folder) as file:
        converted = openvino.convert_model(file)
    openvino.save_model(converted, folder / f"{stage}.xml", compress_to_fp16=False)
    return Counter(op.get_type_name() for op in converted.get_ops())


def openvino_bf16() -> str:
    """How OpenVINO computes bf16 on this processor: natively, emulated (much slower than fp32), or not at all."""
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "not supported by this processor: computed in fp32"
    if "bf16" in describe_machine()["features"]:
        return "native"
    return "emulated by this processor: slower than fp32"  # AVX-512 without bf16


def convert_checkpoint(source: Path, folder: Path, precision: str) -> None:
    """Write config.json and model.safetensors with the floating-point weights in `precision`, clipped to its range.

    Raises ExportError when the disk is full.
    """
    dtype = DTYPES[precision]
    limits = torch.finfo(dtype)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.clamp(limits.min, limits.max).to(dtype)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # no OSError, even where the disk is full
        why = first_line(error)
        raise ExportError(f"cannot write the weights ({why}); free some space or choose another -o") from None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
