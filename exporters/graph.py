"""Tracing a backbone into ONNX files: one graph for bbt; embedding, blocks and readout for bbtv2."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import external_data_helper, numpy_helper
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

    def __init__(self, backbone: Backbone, stage: Stage) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage

    def forward(self, *inputs: Tensor) -> State:
        return self.backbone.run(self.stage.name, dict(zip(self.stage.inputs, inputs, strict=True)))


def stages(backbone: Backbone, method: str, hidden_size: int) -> Iterator[Stage]:
    """The graphs of a bundle in the order in which they run, with example inputs of two candidates and three rows."""
    p, rows, length, n = 2, 3, backbone.n + 7, backbone.n
    ids = torch.ones(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids)  # a tensor of its own: torch.export takes one object for one input
    readout = torch.full((rows,), length - 2 if not backbone.decodes else 1)
    prompts = torch.zeros(p, n, hidden_size)
    tail = {"readout": readout, "label_token_ids": torch.tensor([1, 2, 3, 4, 5])}
    if backbone.decodes:
        tail["decoder_input_ids"] = torch.ones(rows, 4, dtype=torch.int64)
    if method == "bbt":
        inputs = {"prompts": prompts, "input_ids": ids, "attention_mask": mask, **tail}
        yield Stage("model", inputs, ["label_logits"])
        return
    state = backbone.embed(ids)
    yield Stage("embed", {"input_ids": ids}, list(state))
    state = {k: torch.zeros(4, *v.shape[1:]) for k, v in state.items()}  # a population that is not P's example
    inputs = {"prompts": prompts, **state, "attention_mask": mask}
    for i in range(backbone.layers - 1):
        yield Stage(f"block_{i:02d}", inputs, [f"{name}_out" for name in state])
    yield Stage("last", {**inputs, **tail}, ["label_logits"])


def dynamic_axes(inputs: State, n: int, cat: bool) -> tuple[dict[int, Any], ...]:
    """The dynamic axes of each input, as torch.export takes them."""
    dims = {name: Dim(name) for name in ("candidates", "state", "rows", "labels", "decoder_tokens")}
    tokens = dims["tokens"] = Dim("tokens", min=2 if cat else n + 2, max=2**20)
    dims["text"] = tokens - n if "prefix" in inputs and not cat else tokens
    return tuple({i: dims[axis] for i, axis in enumerate(AXES[name]) if axis is not None} for name in inputs)


def export_stage(stage: Stage, backbone: Backbone) -> onnx.ModelProto:
    """Trace one stage into ONNX with dynamic axes."""
    axes = dynamic_axes(stage.inputs, backbone.n, backbone.cat)
    with quiet():
        program = torch.onnx.export(
            Traced(backbone, stage).eval(), tuple(stage.inputs.values()), dynamo=True, opset_version=OPSET,
            dynamic_shapes={"inputs": axes}, input_names=list(stage.inputs),
            output_names=stage.outputs, external_data=False, verbose=False, optimize=False,
        )  # fmt: skip
        assert program is not None
        # Small constants are folded; weights keep the checkpoint's layout, so that all graphs share its file.
        optimize(program.model, input_size_limit=SMALL, output_size_limit=SMALL)
    model = program.model_proto
    check_names(model, stage)
    for node in model.graph.node:
        del node.metadata_props[:]  # the tracer's stack traces
    return model


def check_names(model: onnx.ModelProto, stage: Stage) -> None:
    found = [i.name for i in model.graph.input], [o.name for o in model.graph.output]
    wanted = list(stage.inputs), stage.outputs
    if (sorted(found[0]), found[1]) != (sorted(wanted[0]), wanted[1]):
        raise AssertionError(f"{stage.name} was traced with inputs and outputs {found}, not {wanted}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class SharedWeights:
    """The tensors of a safetensors file, found by their bytes, for graphs to refer to.

    ONNX external data is a file, an offset and a length, and a safetensors file is a header followed by plain row-major
    tensors: one copy of the checkpoint serves all graphs and PyTorch.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            self.places: dict[tuple[int, bytes], tuple[int, int]] = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                stream.seek(8 + size + begin)
                self.places[key(stream.read(end - begin))] = (8 + size + begin, end - begin)

    def refer(self, graph: onnx.GraphProto, tensor: onnx.TensorProto) -> bool:
        """Replace the tensor's bytes by a reference, if the file holds them, as they are or transposed."""
        place = self.places.get(key(tensor.raw_data))
        if place is None and len(tensor.dims) == 2:
            array = numpy_helper.to_array(tensor)
            place = self.places.get(key(np.ascontiguousarray(array.T).tobytes()))
            if place is not None:
                # The tracer transposes the weights of linear layers; runtimes transpose them again at load.
                rows = f"{tensor.name}_rows"
                graph.node.insert(0, onnx.helper.make_node("Transpose", [rows], [tensor.name], perm=[1, 0]))
                tensor.name = rows
                tensor.dims[:] = reversed(tensor.dims)
        if place is None:
            return False
        external_data_helper.set_external_data(tensor, self.file.name, offset=place[0], length=place[1])
        tensor.ClearField("raw_data")
        return True


class NewWeights:
    """A file of tensors that are not in the checkpoint (folded, or in a lower precision), each written once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.places: dict[tuple[int, bytes], tuple[int, int]] = {}

    def refer(self, graph: onnx.GraphProto, tensor: onnx.TensorProto) -> bool:
        """Replace the tensor's bytes by a reference to the file, appending them if they are new."""
        name = key(tensor.raw_data)
        if name not in self.places:
            with self.file.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % PAGE))
                self.places[name] = stream.tell(), len(tensor.raw_data)
                stream.write(tensor.raw_data)
        offset, length = self.places[name]
        external_data_helper.set_external_data(tensor, self.file.name, offset=offset, length=length)
        tensor.ClearField("raw_data")
        return True


def key(data: bytes) -> tuple[int, bytes]:
    return len(data), hashlib.sha256(data).digest()


def save_stage(
    model: onnx.ModelProto, folder: Path, name: str, checkpoint: SharedWeights | None, others: NewWeights
) -> None:
    """Write a graph whose weights are in the checkpoint's file, or in that of the others."""
    for tensor in list(model.graph.initializer):
        large = tensor.HasField("raw_data") and len(tensor.raw_data) > SMALL
        if large and (checkpoint is None or not checkpoint.refer(model.graph, tensor)):
            others.refer(model.graph, tensor)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def load_stage(file: Path) -> onnx.ModelProto:
    """A graph with its weights inside it, in the orientation in which matmuls take them."""
    model = onnx.load(str(file))
    weights = {t.name: t for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            (axes,) = (a.ints for a in node.attribute if a.name == "perm")
            array = numpy_helper.to_array(weights[node.input[0]]).transpose(axes)
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
