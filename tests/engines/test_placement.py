"""Graphs that ONNX Runtime computes on a GPU as a whole: a copy from or to the host rules CUDA
graphs out.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")

import onnx_ir as ir
from conftest import Export
from tiny_backbones import RELATIVES, VARIANTS, marks

CPU_INPUTS = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 2, 3), "Tile": (1,),
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,), "Unsqueeze": (1,), "Squeeze": (1,), "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,), "ReduceMin": (1,), "Clip": (1, 2), "Split": (1,), "CumSum": (1,),
}  # fmt: skip
"""Inputs that ONNX Runtime's CUDA kernels read on the host."""
SMALL = 100
"""Elements up to which a constant counts as one of either device."""


def copies(graph: ir.Graph) -> list[str]:
    """Values that ONNX Runtime copies from the host to the GPU.

    Its rule: a node that reads nothing but values computed from shapes, constants and inputs of the
    graph is computed on the host, unless its kernel for the GPU reads the values there anyway
    (`GetCpuPreferredNodes`).
    """
    host: set[ir.Value] = set()
    found = []
    for node in graph:
        given = [(i, value) for i, value in enumerate(node.inputs) if value is not None]
        read = [
            value
            for i, value in given
            if i not in CPU_INPUTS.get(node.op_type, ()) and value in host
        ]
        if node.op_type in ("Shape", "Size") or (
            len(read) > 0 and all(v in host or _anywhere(v, graph) for _, v in given)
        ):
            host.update(node.outputs)
        else:
            found += [f"{node.op_type}({value.name})" for value in read]
    return found


def _anywhere(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether it is an input of the graph or a small constant."""
    node = value.producer()
    if value.is_initializer():
        return value.shape is not None and math.prod(value.shape.numpy()) <= SMALL
    return value in graph.inputs or (node is not None and node.op_type == "Constant")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=marks(v), id="-".join(v)) for v in VARIANTS + RELATIVES]
)
def test_every_node_of_a_graph_can_be_computed_on_a_gpu(
    tiny: Export, variant: tuple[str, str, str]
) -> None:
    bundle = tiny(*variant)
    for stage in bundle.info.stages:
        assert not copies(ir.load(bundle.path / f"{stage}.onnx").graph), stage
