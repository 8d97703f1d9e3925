"""What TensorRT made of a graph: which attentions became one kernel, and which projections one
matmul.

The builder reports a plan's layers, with the ONNX nodes that each computes, in its verbose log, as
the engine inspector does of a plan that is loaded. Loading one needs a driver; the log is there
wherever a plan is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, Field

LAYER = re.compile(
    r"^ *Name: (?P<name>.*?), LayerType: (?P<kind>\w+),.*Metadata: ?(?P<nodes>.*)$", re.MULTILINE
)
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
MERGED = "gemm"
"""The kind of a layer that is a matmul alone, or several of the same input side by side."""


class Layers(BaseModel):
    """The layers of a plan."""

    layers: int = Field(description="After fusion.")
    fused_attention: int = Field(
        description="Softmaxes computed in one kernel with the matmuls around them."
    )
    other_attention: list[str] = Field(
        description="ONNX nodes of softmaxes with a kernel of their own."
    )
    merged_matmuls: list[list[str]] = Field(description="ONNX nodes of matmuls that became one.")


def read_layers(log: Iterable[str], operators: Mapping[str, str]) -> Layers | None:
    """The layers in the messages of a builder's log; None where it reports none.

    operators: the type of each of the network's layers, by its name, which is that of its ONNX
    node.
    """
    found = [match for message in log for match in LAYER.finditer(message)]
    if not found:
        return None
    fused, alone, merged = set[str](), set[str](), list[list[str]]()
    for layer in found:
        nodes = NODE.findall(layer["nodes"])
        matmuls = [node for node in nodes if operators.get(node) == "MATRIX_MULTIPLY"]
        softmaxes = {node for node in nodes if operators.get(node) == "SOFTMAX"}
        (fused if len(matmuls) == 2 else alone).update(softmaxes)
        if layer["kind"] == MERGED and len(matmuls) > 1:
            merged.append(matmuls)
    return Layers(
        layers=len(found),
        fused_attention=len(fused - alone),
        other_attention=sorted(alone),
        merged_matmuls=merged,
    )
