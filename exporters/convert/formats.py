"""Each target's own format: graphs as its runtime reads them best, or PyTorch's weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bbt_accel.errors import ExportError, first_line
from bbt_accel.exporters.families.loading import DTYPES
from bbt_accel.exporters.trace import graph

Fused = tuple[ir.Model, dict[str, int]]
"""A graph, and how many operators of each kind were fused."""


def fuse_for_ort(model: ir.Model) -> Fused:
    """Fuse operators for ONNX Runtime, by onnxscript: attention, skip connections with norms, bias
    with GELU.
    """
    with graph.quick_rules():
        model, found = optimize_for_ort(model, clear_metadata=True)
    return model, {name: count for name, count in found.items() if count}


@contextmanager
def graph_on_disk(
    file: Path, fuse: Callable[[ir.Model], Fused], folder: Path
) -> Iterator[tuple[Path, dict[str, int]]]:
    """A stage in fp32, fused, in a temporary file of `folder`, its weights in another beside it.

    None of them is in memory. And how many operators of each kind were fused.
    """
    model = ir.load(file)
    transpose_weights(model)
    model, counts = fuse(model)
    place = folder / f"{file.stem}.fp32.onnx"
    try:
        ir.save(model, place, external_data=f"{place.name}.data", size_threshold_bytes=graph.SMALL)
        del model
        gc.collect()  # nodes and values refer to each other, and to the source's weights in memory
        yield place, counts
    finally:
        place.unlink(missing_ok=True)
        place.with_name(f"{place.name}.data").unlink(missing_ok=True)


def transpose_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Weights in the orientation in which matmuls take them; each is read when it is written.

    Returns each as the checkpoint has it, by the new name.
    """
    weights = model.graph.initializers
    originals: dict[str, ir.TensorProtocol] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name not in weights:
            continue
        stored, result = source.const_value, node.outputs[0]
        name = f"{result.name}_transposed"
        shape = ir.Shape([stored.shape[1], stored.shape[0]])
        read = partial(transposed, stored)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(stored.dtype))
        value.const_value = ir.LazyTensor(read, dtype=stored.dtype, shape=shape, name=name)
        weights.add(value)
        originals[name] = stored
        ir.convenience.replace_all_uses_with(result, value)
        model.graph.remove(node, safe=True)
    for name in [
        name for name, value in weights.items() if not value.uses() and not value.is_graph_output()
    ]:
        weights.pop(name)
    return originals


def transposed(stored: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.ascontiguousarray(stored.numpy().T))


def transpose_in_matmuls(model: ir.Model, originals: dict[str, ir.TensorProtocol]) -> None:
    """Weights as the checkpoint has them, which ONNX Runtime's own matmul takes.

    Transpose nodes would be computed at load, into a second copy of all weights in memory.
    """
    weights = model.graph.initializers
    for name in [name for name in originals if name in weights]:
        value, rows = weights[name], graph.add_weight(model.graph, originals[name])
        for matmul in [
            use.node for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 1
        ]:
            matmul.op_type, matmul.domain = "FusedMatMul", graph.MICROSOFT
            matmul.attributes["transB"] = ir.AttrInt64("transB", 1)
            matmul.replace_input_with(1, rows)
            model.graph.opset_imports[graph.MICROSOFT] = 1
        graph.transpose(model.graph, value, rows)


def convert_checkpoint(source: Path, folder: Path, precision: str) -> None:
    """Write config.json and model.safetensors with the floating-point weights in `precision`,
    clipped to its range.

    Raises ExportError when the disk is full.
    """
    dtype = DTYPES[precision]
    limits = torch.finfo(dtype)
    weights = load_file(source / graph.CHECKPOINT)
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.clamp(limits.min, limits.max).to(dtype)
    try:
        save_file(weights, folder / graph.CHECKPOINT, metadata={"format": "pt"})
    except SafetensorError as error:  # no OSError, even where the disk is full
        why = first_line(error)
        raise ExportError(
            f"cannot write the weights ({why}); free some space or choose another -o"
        ) from None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
