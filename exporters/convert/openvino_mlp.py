"""Gated MLPs, (act(x A) * (x B)) C, in graphs for OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np

ELEMENTWISE = frozenset(
    {"Add", "Divide", "Erf", "Gelu", "Multiply", "Power", "Sigmoid", "Swish", "Tanh"}
)
"""What activations consist of, before OpenVINO has fused them."""


def separate_mlps(model: Any) -> int:
    """Make OpenVINO compute the three matmuls of each gated MLP one by one. Returns the number of
    MLPs.

    In bf16 on processors with AMX it replaces the MLP by a single operator, which ends the process
    with a floating-point exception where there is one thread
    (github.com/openvinotoolkit/openvino/issues/33300). That operator
    takes three axes, so the MLP gets a fourth, of size one, around its three matmuls: a reshape,
    which copies nothing.
    """
    from openvino import opset13 as ops

    found = [
        (node, before) for node in model.get_ordered_ops() if (before := gated_projections(node))
    ]
    axis = ops.constant(np.int64(0))
    for down, projections in found:
        wider = ops.unsqueeze(projections[0].input_value(0), axis)
        for projection in projections:
            projection.input(0).replace_source_output(wider.output(0))
        readers = down.output(0).get_target_inputs()
        narrower = ops.squeeze(down.output(0), axis)
        for reader in readers:
            reader.replace_source_output(narrower.output(0))
    model.validate_nodes_and_infer_types()
    return len(found)


def gated_projections(down: Any) -> list[Any]:
    """The two projections of the same three-dimensional input in the MLP that ends with this
    matmul; none if none.
    """
    if not (is_matmul(down) and producer(down, 0).get_type_name() == "Multiply"):
        return []
    projections = matmuls_before(producer(down, 0))
    inputs = [projection.input_value(0) for projection in projections]
    shared = len(inputs) == 2 and inputs[0] == inputs[1] and len(inputs[0].get_partial_shape()) == 3
    return projections if shared else []


def matmuls_before(node: Any) -> list[Any]:
    """The matmuls whose outputs a node combines by elementwise operators alone; none if there is
    anything else.
    """
    matmuls, seen, waiting = [], {node.get_friendly_name()}, [node]
    while waiting:
        node = waiting.pop()
        if is_matmul(node):
            matmuls.append(node)
            continue
        if node.get_type_name() not in ELEMENTWISE:
            return []
        before = {
            n.get_friendly_name(): n for n in (producer(node, i) for i in range(len(node.inputs())))
        }
        waiting += [
            n for name, n in before.items() if name not in seen and n.get_type_name() != "Constant"
        ]
        seen |= set(before)
    return matmuls


def is_matmul(node: Any) -> bool:
    """Whether a node multiplies by weights that are not quantized."""
    return bool(
        node.get_type_name() == "MatMul" and producer(node, 1).get_type_name() == "Constant"
    )


def producer(node: Any, i: int) -> Any:
    return node.input_value(i).get_node()
