"""A stage's graph as one runtime takes it best, in fp32 and with its weights inside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from bbt_accel.exporters import graph


def prepare(file: Path, target: str) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The graph, and how many operators were fused: for ONNX Runtime alone, other runtimes fuse by themselves."""
    if target == "ort":
        return fuse(file)
    return (onnx.load(str(file)) if target == "trt" else graph.load_stage(file)), {}


def fuse(file: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """onnxscript's fusions for ONNX Runtime: attention, skip connections with norms, bias with GELU."""
    model, counts = optimize_for_ort(ir.load(file), clear_metadata=True)
    proto = ir.to_proto(model)
    onnx.load_external_data_for_model(proto, str(file.parent))
    return proto, {name: count for name, count in counts.items() if count}
