"""Each target's own format: graphs as its runtime reads them best, or PyTorch's weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bbt_accel.errors import ExportError, first_line
from bbt_accel.exporters import graph
from bbt_accel.exporters.families import DTYPES
from bbt_accel.machine import describe_machine

CONSTANT_ALIGNMENT = 64
"""Of OpenVINO's constants, which are mapped: bytes of a vector register. Pages would cost more than small constants."""


def load_graph(file: Path, target: str) -> tuple[ir.Model, dict[str, int]]:
    """A stage in fp32 with its weights as matmuls take them, each read when it is written.

    And how many operators of each kind were fused: for ONNX Runtime alone, by onnxscript (attention, skip connections
    with norms, bias with GELU). Other runtimes fuse by themselves, and TensorRT has no ONNX Runtime operators.
    """
    model = ir.load(file)
    transpose_weights(model)
    if target != "ort":
        return model, {}
    with graph.quick_rules():
        model, found = optimize_for_ort(model, clear_metadata=True)
    return model, {name: count for name, count in found.items() if count}


@contextmanager
def graph_on_disk(file: Path, target: str, folder: Path) -> Iterator[tuple[Path, dict[str, int]]]:
    """`load_graph` in a temporary file of `folder`, its weights in another beside it; none of them is in memory."""
    model, counts = load_graph(file, target)
    place = folder / f"{file.stem}.fp32.onnx"
    try:
        ir.save(model, place, external_data=f"{place.name}.data", size_threshold_bytes=graph.SMALL)
        del model
        yield place, counts
    finally:
        place.unlink(missing_ok=True)
        place.with_name(f"{place.name}.data").unlink(missing_ok=True)


def transpose_weights(model: ir.Model) -> None:
    """Weights in the orientation in which matmuls take them; each is read when it is written."""
    weights = model.graph.initializers
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in weights:
            continue
        stored, result = source.const_value, node.outputs[0]
        name = result.name
        shape = ir.Shape([stored.shape[1], stored.shape[0]])
        read = partial(transposed, stored)
        value = ir.Value(name=f"{name}_transposed", shape=shape, type=ir.TensorType(stored.dtype))
        value.const_value = ir.LazyTensor(read, dtype=stored.dtype, shape=shape, name=value.name)
        weights.add(value)
        ir.convenience.replace_all_uses_with(result, value)
        model.graph.remove(node, safe=True)
    for name in [name for name, value in weights.items() if not value.uses() and not value.is_graph_output()]:
        weights.pop(name)


def transposed(stored: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(stored.numpy().T))


def save_openvino(file: Path, folder: Path, stage: str, weights: graph.NewWeights) -> Counter[str]:
    """Write an ONNX file in OpenVINO's format. Returns the count of each operator.

    OpenVINO's low-precision transformations turn quantized matmuls into 8-bit ones when the graph is loaded.
    """
    import openvino

    converted = openvino.convert_model(file)
    xml = folder / f"{stage}.xml"
    openvino.save_model(converted, xml, compress_to_fp16=False)
    operators = Counter(op.get_type_name() for op in converted.get_ops())
    share_constants(xml, weights)
    return operators


def share_constants(xml: Path, weights: graph.NewWeights) -> None:
    """Move the constants of a saved OpenVINO model to a file that all stages share, each stored once."""
    own, tree = xml.with_suffix(".bin"), ElementTree.parse(xml)
    with own.open("rb") as stream:
        for data in tree.iterfind(".//layer[@type='Const']/data"):
            stream.seek(int(data.attrib["offset"]))
            data.set("offset", str(weights.place(stream.read(int(data.attrib["size"])), CONSTANT_ALIGNMENT)))
    tree.write(xml, encoding="utf-8", xml_declaration=True)
    own.unlink()


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
