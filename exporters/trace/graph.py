"""Tracing a backbone into ONNX files: one graph for bbt; embedding, blocks and readout for
bbtv2.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import rewriter
from onnxscript.optimizer import optimize
from torch import Tensor, nn
from torch.export import Dim

from bbt_accel.core.axes import AXES
from bbt_accel.exporters.families.backbone import Backbone, Inputs

OPSET = 20
SMALL = 1024
"""Elements or bytes up to which a tensor is folded, and stays inside the graph: mostly shape
constants.
"""
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
CHECKPOINT = "model.safetensors"
"""The file of a bundle that holds its weights, for PyTorch as well."""
CHUNK = 2**24
"""Bytes of a weight in memory while it is hashed."""
PAGE = 4096
"""Tensors are aligned to memory pages, so that they can be mapped."""


@dataclass(frozen=True)
class Stage:
    """One graph: a stage of the backbone, example inputs by name, and the names of its outputs."""

    name: str
    inputs: Inputs
    outputs: list[str]


class Traced(nn.Module):
    """A stage as torch.export wants it: a module with positional inputs, in the order of the
    stage's names.
    """

    def __init__(self, stage: Stage, backbone: Any) -> None:
        super().__init__()
        self.stage, self.backbone = stage, backbone

    def forward(self, *inputs: Tensor) -> Inputs:
        return self.backbone.run(self.stage.name, dict(zip(self.stage.inputs, inputs, strict=True)))


def stages(backbone: Backbone, method: str, hidden_size: int) -> Iterator[Stage]:
    """The graphs of a bundle in the order in which they run, with example inputs of two candidates
    and three rows.
    """
    p, rows, length, n = 2, 3, backbone.n + 7, backbone.n
    known: Inputs = {
        "prompts": torch.zeros(p, n, hidden_size),
        "input_ids": torch.ones(rows, length, dtype=torch.int64),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "readout": torch.full((rows,), 1 if backbone.decodes else length - 2),
        "label_token_ids": torch.arange(1, 6),
        "decoder_input_ids": torch.ones(rows, 4, dtype=torch.int64),
        "context_ids": torch.ones(5, dtype=torch.int64),
        "context_mask": torch.ones(5, dtype=torch.int64),
    }
    for name in backbone.stages(method):
        inputs = {i: known[i] for i in backbone.inputs(name)}
        yield Stage(name, inputs, list(backbone.outputs(name)))
        if name in ("context", "embed"):
            known |= backbone.run(name, inputs)
        if name == "embed":  # a population that is not P's example
            known |= {i: torch.zeros(4, *known[i].shape[1:]) for i in backbone.state}


def dynamic_axes(inputs: Inputs, n: int) -> tuple[dict[int, Any], ...]:
    """The dynamic axes of each input, as torch.export takes them."""
    dims = {
        name: Dim(name)
        for name in ("candidates", "state", "rows", "labels", "decoder_tokens", "context")
    }
    dims["tokens"] = Dim("tokens", min=n + 2, max=2**20)
    dims["text"] = dims["tokens"] - n if "prefix" in inputs else dims["tokens"]
    return tuple(
        {i: dims[axis] for i, axis in enumerate(AXES[name]) if axis is not None} for name in inputs
    )


def export_stage(stage: Stage, backbone: Backbone) -> ir.Model:
    """Trace one stage of a backbone into ONNX with dynamic axes. The weights are those of the
    backbone, not copies.
    """
    return trace(stage, backbone, 0 if backbone.cat else backbone.n)


def trace(stage: Stage, backbone: Any, n: int = 0) -> ir.Model:
    """Trace a stage of any module that has a `run` like the backbone's. n: tokens that a prompt is
    added to.
    """
    axes = dynamic_axes(stage.inputs, n)
    with quiet():
        program = torch.onnx.export(
            Traced(stage, backbone).eval(),
            tuple(stage.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"inputs": axes},
            input_names=list(stage.inputs),
            output_names=stage.outputs,
            external_data=False,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        # small constants are folded; weights stay as they are, so that all graphs share the file
        with quick_rules():
            optimize(program.model, input_size_limit=SMALL, output_size_limit=SMALL)
    model: ir.Model = program.model
    found = sorted(str(i.name) for i in model.graph.inputs), [o.name for o in model.graph.outputs]
    if found != (sorted(stage.inputs), stage.outputs):
        raise AssertionError(f"{stage.name} was traced with inputs and outputs {found}")
    for node in model.graph:
        node.metadata_props.clear()  # the tracer's stack traces
    return model


@contextmanager
def quick_rules() -> Iterator[None]:
    """onnxscript's optimizer without its only rule of several outputs.

    For that rule the optimizer lists all nodes of the graph at each of them: minutes where there
    are 30 blocks.
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    kept = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        if kept:
            rewriter._DEFAULT_REWRITE_RULES = kept
        yield
    finally:
        if kept:
            rewriter._DEFAULT_REWRITE_RULES = rules


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


class WeightFile:
    """A file of tensors, found by their bytes, for graphs to refer to: ONNX external data is a file
    and an offset.
    """

    appends = False

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offsets: dict[bytes, int] = {}
        """sha256 of a tensor's bytes → where they begin."""

    def place(self, content: bytes | memoryview, align: int = PAGE) -> int | None:
        """Where these bytes begin in the file, if it holds them or takes new ones."""
        name = hashlib.sha256(content).digest()
        if self.appends and name not in self.offsets:
            with self.file.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % align))
                self.offsets[name] = stream.tell()
                stream.write(content)
        return self.offsets.get(name)

    def find(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor | None:
        """The tensor as one in the file, if that holds its bytes or takes new ones."""
        array = tensor.numpy()
        copied = array.dtype.isbuiltin != 1 or not array.flags.c_contiguous
        content = tensor.tobytes() if copied else memoryview(array).cast("B")
        offset = self.place(content)
        if offset is None:
            return None
        place = {"location": self.file.name, "offset": offset, "length": len(content)}
        shape = ir.Shape(tensor.shape)
        return ir.ExternalTensor(
            **place,
            dtype=tensor.dtype,
            shape=shape,
            name=str(tensor.name),
            base_dir=self.file.parent,
        )


class NewWeights(WeightFile):
    """Tensors that are not in the checkpoint (folded, or in a lower precision), each written
    once.
    """

    appends = True


class SharedWeights(WeightFile):
    """The checkpoint: a safetensors file is a header, then plain row-major tensors. It serves
    PyTorch as well.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            for begin, end in (
                entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
            ):
                stream.seek(8 + size + begin)
                content = hashlib.sha256()
                for start in range(begin, end, CHUNK):
                    content.update(stream.read(min(CHUNK, end - start)))
                self.offsets[content.digest()] = 8 + size + begin


def save_stage(
    model: ir.Model, folder: Path, name: str, checkpoint: SharedWeights | None, others: NewWeights
) -> None:
    """Write a graph whose weights are in the checkpoint's file, or in that of the others; one at a
    time is copied.

    The tracer transposes the weights of linear layers. They are read as the checkpoint has them,
    and transposed by a node; runtimes do that once, at load. Tensors of a checkpoint that is in the
    folder already stay as they are.
    """
    there = (folder / CHECKPOINT).is_file()
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes <= SMALL:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
            continue
        if there and isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == CHECKPOINT:
            continue
        found = None if checkpoint is None else checkpoint.find(tensor)
        if found is None and checkpoint is not None and len(tensor.shape) == 2:
            rows = ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=f"{value.name}_rows")
            if (stored := checkpoint.find(rows)) is not None:
                transpose(model.graph, value, add_weight(model.graph, stored))
                continue
        value.const_value = found or others.find(tensor)
    (folder / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString())


def add_weight(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The graph's initializer of this tensor, new where it has none of its name."""
    if str(tensor.name) not in graph.initializers:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
        graph.initializers.add(
            ir.Value(name=tensor.name, shape=shape, type=kind, const_value=tensor)
        )
    return graph.initializers[str(tensor.name)]


def transpose(graph: ir.Graph, value: ir.Value, rows: ir.Value) -> None:
    """Replace an initializer, where it is still used, by the transposition of another."""
    graph.initializers.pop(str(value.name))
    if not value.uses():
        return
    node = ir.node("Transpose", [rows], attributes={"perm": [1, 0]})
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    node.outputs[0].name = value.name
    graph.insert_before(next(iter(graph)), node)


def from_proto(model: onnx.ModelProto, folder: Path) -> ir.Model:
    """A graph with weights in files of the folder, which may be links, as in the hub's cache: ir
    follows none.
    """
    made = ir.from_proto(model)
    ir.external_data.set_base_dir(made.graph, folder)
    for value in made.graph.initializers.values():
        if (
            isinstance(tensor := value.const_value, ir.ExternalTensor)
            and (folder / tensor.location).is_symlink()
        ):
            file = (folder / tensor.location).resolve()
            place = {"name": tensor.name, "shape": tensor.shape, "base_dir": file.parent}
            value.const_value = ir.ExternalTensor(
                file.name, tensor.offset, tensor.length, tensor.dtype, **place
            )
    return made


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own."""
    taken: Counter[str] = Counter()
    for node in graph.node:
        name = node.name or node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace all nodes, and drop weights that none of them uses and types that are no longer
    known.
    """
    used = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
    weights = [t for t in graph.initializer if t.name in used]
    for field, values in (
        (graph.node, nodes),
        (graph.initializer, weights),
        (graph.value_info, []),
    ):
        del field[:]
        field.extend(values)
