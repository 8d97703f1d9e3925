"""Writing small ONNX graphs by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
Values = Mapping[str, tuple[str, Sequence[str | int]]]
"""Inputs or outputs of a graph: dtype and shape by name."""


def value_infos(values: Values) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, TYPES[dtype], shape)
        for name, (dtype, shape) in values.items()
    ]


class Builder:
    """Collects nodes and constants; values are strings, the names of the graph's values."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: npt.ArrayLike, dtype: str = "int64") -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(
            numpy_helper.from_array(
                np.ascontiguousarray(value, dtype).reshape(np.shape(value)), name
            )
        )
        return name

    def op(self, kind: str, *inputs: str | int, name: str | None = None, **attributes: Any) -> str:
        """A node with one output, which gets the name. An integer among the inputs is a constant,
        int64 of shape ().
        """
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        given = [self.constant(value) if isinstance(value, int) else value for value in inputs]
        self.nodes.append(helper.make_node(kind, given, [name], name=name, **attributes))
        return name

    def cast(self, value: str, dtype: str) -> str:
        return self.op("Cast", value, to=TYPES[dtype])

    def total(self, values: Sequence[str | int]) -> str:
        """The sum of at least one value."""
        first, *others = values
        found = self.constant(first) if isinstance(first, int) else first
        for value in others:
            found = self.op("Add", found, value)
        return found

    def model(self, name: str, inputs: Values, outputs: Values, opset: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, name, value_infos(inputs), value_infos(outputs), self.constants
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
