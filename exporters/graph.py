"""Tracing a backbone into ONNX files: one graph for bbt; embedding, blocks and readout for bbtv2."""

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
import torch
from onnx import external_data_helper, helper, numpy_helper
from onnxscript.optimizer import optimize
from torch import Tensor, nn
from torch.export import Dim

from bbt_accel.exporters.axes import AXES
from bbt_accel.exporters.backbone import Backbone, State

OPSET = 20
SMALL = 1024
"""Elements or bytes up to which a tensor is folded, and stays inside the graph: mostly shape constants."""
PAGE = 4096
"""Tensors are aligned to memory pages, so that they can be mapped."""


@dataclass(frozen=True)
class Stage:
    """One graph: a stage of the backbone, example inputs by name, and the names of its outputs."""

    name: str
    inputs: State
    outputs: list[str]


class Traced(nn.Module):
    """A stage as torch.export wants it: a module with positional inputs, in the order of the stage's names."""

    def __init__(self, stage: Stage, backbone: Any) -> None:
        super().__init__()
        self.stage, self.backbone = stage, backbone

    def forward(self, *inputs: Tensor) -> State:
        return self.backbone.run(self.stage.name, dict(zip(self.stage.inputs, inputs, strict=True)))


def stages(backbone: Backbone, method: str, hidden_size: int) -> Iterator[Stage]:
    """The graphs of a bundle in the order in which they run, with example inputs of two candidates and three rows."""
    p, rows, length, n = 2, 3, backbone.n + 7, backbone.n
    ids = torch.ones(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids)  # a tensor of its own: torch.export takes one object for one input
    readout = torch.full((rows,), 1 if backbone.decodes else length - 2)
    prompts = torch.zeros(p, n, hidden_size)
    tail = {"readout": readout, "label_token_ids": torch.arange(1, 6)}
    if backbone.decodes:
        tail["decoder_input_ids"] = torch.ones(rows, 4, dtype=torch.int64)
    if method == "bbt":
        yield Stage("model", {"prompts": prompts, "input_ids": ids, "attention_mask": mask, **tail}, ["label_logits"])
        return
    state = backbone.embed(ids)
    yield Stage("embed", {"input_ids": ids}, list(state))
    state = {k: torch.zeros(4, *v.shape[1:]) for k, v in state.items()}  # a population that is not P's example
    inputs = {"prompts": prompts, **state, "attention_mask": mask}
    for i in range(backbone.layers - 1):
        yield Stage(f"block_{i:02d}", inputs, [f"{name}_out" for name in state])
    yield Stage("last", {**inputs, **tail}, ["label_logits"])


def dynamic_axes(inputs: State, n: int) -> tuple[dict[int, Any], ...]:
    """The dynamic axes of each input, as torch.export takes them."""
    dims = {name: Dim(name) for name in ("candidates", "state", "rows", "labels", "decoder_tokens")}
    dims["tokens"] = Dim("tokens", min=n + 2, max=2**20)
    dims["text"] = dims["tokens"] - n if "prefix" in inputs else dims["tokens"]
    return tuple({i: dims[axis] for i, axis in enumerate(AXES[name]) if axis is not None} for name in inputs)


def export_stage(stage: Stage, backbone: Backbone) -> onnx.ModelProto:
    """Trace one stage of a backbone into ONNX with dynamic axes."""
    return trace(stage, backbone, 0 if backbone.cat else backbone.n)


def trace(stage: Stage, backbone: Any, n: int = 0) -> onnx.ModelProto:
    """Trace a stage of any module that has a `run` like the backbone's. n: tokens that a prompt is added to."""
    axes = dynamic_axes(stage.inputs, n)
    with quiet():
        program = torch.onnx.export(
            Traced(stage, backbone).eval(), tuple(stage.inputs.values()), dynamo=True, opset_version=OPSET,
            dynamic_shapes={"inputs": axes}, input_names=list(stage.inputs),
            output_names=stage.outputs, external_data=False, verbose=False, optimize=False,
        )  # fmt: skip
        assert program is not None
        # Small constants are folded; weights keep the checkpoint's layout, so that all graphs share its file.
        optimize(program.model, input_size_limit=SMALL, output_size_limit=SMALL)
    model = program.model_proto
    found = sorted(i.name for i in model.graph.input), [o.name for o in model.graph.output]
    if found != (sorted(stage.inputs), stage.outputs):
        raise AssertionError(f"{stage.name} was traced with inputs and outputs {found}")
    for node in model.graph.node:
        del node.metadata_props[:]  # the tracer's stack traces
    return model


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
    """A file of tensors, found by their bytes, for graphs to refer to: ONNX external data is a file and an offset."""

    appends = False

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offsets: dict[bytes, int] = {}
        """sha256 of a tensor's bytes → where they begin."""

    def refer(self, tensor: onnx.TensorProto) -> bool:
        """Replace the tensor's bytes by a reference, if the file holds them or takes new ones."""
        content = tensor.raw_data
        name = hashlib.sha256(content).digest()
        if self.appends and name not in self.offsets:
            with self.file.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % PAGE))
                self.offsets[name] = stream.tell()
                stream.write(content)
        if name not in self.offsets:
            return False
        external_data_helper.set_external_data(tensor, self.file.name, self.offsets[name], len(content))
        tensor.ClearField("raw_data")
        return True


class NewWeights(WeightFile):
    """Tensors that are not in the checkpoint (folded, or in a lower precision), each written once."""

    appends = True


class SharedWeights(WeightFile):
    """The checkpoint: a safetensors file is a header, then plain row-major tensors. It serves PyTorch as well."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            for begin, end in (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"):
                stream.seek(8 + size + begin)
                self.offsets[hashlib.sha256(stream.read(end - begin)).digest()] = 8 + size + begin

    def refer_transposed(self, graph: onnx.GraphProto, tensor: onnx.TensorProto) -> bool:
        """The same for a tensor that the file holds transposed: the tracer transposes the weights of linear layers.

        Runtimes transpose them again at load.
        """
        if len(tensor.dims) != 2:
            return False
        array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        rows = numpy_helper.from_array(array, f"{tensor.name}_rows")
        if not self.refer(rows):
            return False
        graph.node.insert(0, helper.make_node("Transpose", [rows.name], [tensor.name], perm=[1, 0]))
        tensor.CopyFrom(rows)
        return True


def save_stage(
    model: onnx.ModelProto, folder: Path, name: str, checkpoint: SharedWeights | None, others: NewWeights
) -> None:
    """Write a graph whose weights are in the checkpoint's file, or in that of the others."""
    for tensor in list(model.graph.initializer):
        if not tensor.HasField("raw_data") or len(tensor.raw_data) <= SMALL:
            continue
        if checkpoint is None or not (checkpoint.refer(tensor) or checkpoint.refer_transposed(model.graph, tensor)):
            others.refer(tensor)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own."""
    taken: Counter[str] = Counter()
    for node in graph.node:
        name = node.name or node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace all nodes, and drop weights that none of them uses and types that are no longer known."""
    used = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
    weights = [t for t in graph.initializer if t.name in used]
    for field, values in ((graph.node, nodes), (graph.initializer, weights), (graph.value_info, [])):
        del field[:]
        field.extend(values)


def load_stage(file: Path) -> onnx.ModelProto:
    """A graph with its weights inside it, in the orientation in which matmuls take them."""
    model = onnx.load(str(file))
    weights = {t.name: t for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            array = numpy_helper.to_array(weights[node.input[0]]).transpose(helper.get_node_attr_value(node, "perm"))
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        else:
            nodes.append(node)
    replace_nodes(model.graph, nodes)
    return model
