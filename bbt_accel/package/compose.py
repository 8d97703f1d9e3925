"""One graph from the rows, a bundle's stages with constants instead of their other inputs, and the
readout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import compose, helper, numpy_helper
from onnxscript.optimizer import optimize

from bbt_accel.exporters.trace.graph import from_proto, quick_rules
from bbt_accel.package.builder import Values, value_infos
from bbt_accel.package.rows import INPUTS

Constants = Mapping[str, npt.NDArray[np.generic]]
LARGEST = 2**31 - 2**20
"""Bytes that a protobuf message may have, with room for what is no weight."""
UNLIMITED = 2**62
DATA = "_data"  # the end of the name of the file beside a graph


@dataclass(frozen=True)
class Part:
    """A graph with constants for some of its inputs; the others are outputs of earlier parts, by
    name.

    renamed: outputs under other names than their own.
    """

    name: str
    model: onnx.ModelProto
    constants: Constants = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def composed(parts: Sequence[Part], outputs: Values, folder: Path) -> ir.Model:
    """One graph with the inputs of a package; what depends on constants alone is computed, what
    nobody reads left out.

    folder: that of the weights that the parts refer to. A weight of several parts is one.
    """
    known = {name: name for name in INPUTS}  # what parts call a value → its name in the whole
    weights: dict[object, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    opsets: dict[str, int] = {}
    for part in parts:
        prefix, model = f"{part.name}.", compose.add_prefix(part.model, f"{part.name}.")
        constants = (
            numpy_helper.from_array(value, prefix + name) for name, value in part.constants.items()
        )
        names = dict(shared(weights, [*model.graph.initializer, *constants]))
        names |= {
            prefix + i.name: known[i.name]
            for i in part.model.graph.input
            if i.name not in part.constants
        }
        known |= {
            part.renamed.get(o.name, o.name): prefix + o.name for o in part.model.graph.output
        }
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            nodes.append(node)
        opsets |= {o.domain: max(o.version, opsets.get(o.domain, 0)) for o in model.opset_import}
    public = {known[name]: name for name in outputs}
    for node in nodes:
        for names_of in (node.input, node.output):
            names_of[:] = [public.get(name, name) for name in names_of]
    return folded(
        nodes,
        weights.values(),
        outputs,
        opsets,
        max(part.model.ir_version for part in parts),
        folder,
    )


def shared(
    weights: dict[object, onnx.TensorProto], tensors: Iterable[onnx.TensorProto]
) -> Iterator[tuple[str, str]]:
    """Add tensors to those of the whole graph; yields the name of each, and of the one with the
    same content.
    """
    for tensor in tensors:
        if tensor.external_data:
            content: object = tuple((entry.key, entry.value) for entry in tensor.external_data)
        else:
            content = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()
        yield (
            tensor.name,
            weights.setdefault((*tensor.dims, tensor.data_type, content), tensor).name,
        )


def folded(
    nodes: Sequence[onnx.NodeProto],
    weights: Iterable[onnx.TensorProto],
    outputs: Values,
    opsets: Mapping[str, int],
    ir_version: int,
    folder: Path,
) -> ir.Model:
    graph = helper.make_graph(
        nodes, "classifier", value_infos(INPUTS), value_infos(outputs), list(weights)
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = from_proto(
        helper.make_model(graph, opset_imports=imports, ir_version=ir_version), folder
    )
    with quick_rules():
        optimize(model, input_size_limit=UNLIMITED, output_size_limit=UNLIMITED)
    separate_zero_points(model.graph)
    for node in model.graph:
        node.metadata_props.clear()
    return model


def separate_zero_points(graph: ir.Graph) -> None:
    """Give each int8 weight a zero point of its own, after equal ones became one.

    Without VNNI, ONNX Runtime converts the zero point with its weight, and can do so only once.
    """
    taken: set[ir.Value] = set()
    for node in graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        zero = node.inputs[2]
        if zero is None or zero.const_value is None:
            continue
        if zero in taken:
            name = f"{node.outputs[0].name}_zero"
            value = ir.tensor(zero.const_value.numpy().copy(), name=name)
            zero = ir.Value(name=name, shape=zero.shape, type=zero.type, const_value=value)
            graph.register_initializer(zero)
            node.replace_input_with(2, zero)
        taken.add(zero)


def has_data_file(file: Path) -> bool:
    """Whether the weights of a saved graph are in a file beside it."""
    return file.with_name(f"{file.name}{DATA}").exists()


def save(model: ir.Model, file: Path) -> None:
    """Write the graph with its weights in one file, or beside it as FILE_data, the name that
    loaders look for.
    """
    data = f"{file.name}{DATA}"
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    if size > LARGEST:
        ir.save(model, file, external_data=data)
    else:
        ir.save(ir.external_data.load_to_model(model), file)
    for written in file.parent.iterdir():
        written.chmod(0o644)
