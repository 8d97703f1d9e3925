"""Static int8 for ONNX Runtime: 8-bit matrix products with ranges fixed at calibration, one scale a weight channel.

Fixed ranges keep the candidates of a population independent: dynamic ones would span the whole batch.

A transformer's hidden states have a few channels that are many times as large as the rest, and one scale for all
would leave the rest a handful of steps. Here the range ends where most channels end; what a large channel has beyond
it goes on in further columns of the same product, each clipped to the range, with the channel's weights repeated:
x w = clip(x) w + clip(x − r) w + clip(x − 2r) w + …
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.exporters.calibration import Channels, channels
from bbt_accel.exporters.half import drop_unused
from bbt_accel.exporters.sessions import Feeds

FEW_TOKENS = 0.25
"""Weights that meet at most this share of the tokens stay in fp32: those of what is computed once a row or a candidate
(calibration has four of each in a call), at the readout position, or in a short decoder. It is little of the work."""
FURTHER_COLUMNS = 1 / 16
"""Columns that large channels may take further, relative to the channels: what they cost is of that order."""


@dataclass(frozen=True)
class Range:
    """The range of an activation, and what large channels have beyond it.

    Column j of the further ones is max(0, sign[j] · x[channel[j]] − offset[j]), in the same range.
    """

    low: float
    high: float
    channel: NDArray[np.int64]
    sign: NDArray[np.float32]
    offset: NDArray[np.float32]

    def side(self, sign: float) -> tuple[float, float]:
        """How far the channel's own column reaches on this side, and each further one."""
        return sides(self.high, -self.low)[0 if sign > 0 else 1]


def products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Matrix products of an activation with a constant weight."""
    constants = {t.name: t for t in graph.initializer}
    return [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm")
        and node.input[0] not in constants
        and node.input[1] in constants
        and len(constants[node.input[1]].dims) == 2
    ]


@dataclass(frozen=True)
class Quantized:
    """A graph with 8-bit products: the names of those, and of the products that stayed in fp32."""

    model: onnx.ModelProto
    products: list[str]
    kept: list[str]


def to_int8(
    model: onnx.ModelProto, feeds: list[Feeds], folder: Path, keep: Collection[str] = (), switches: bool = False
) -> Quantized:
    """Quantize matrix products with constant weights: uint8 activations, int8 weights, float results.

    keep: names of products to leave in fp32, besides those over `FEW_TOKENS`. switches: the graph takes one boolean
    more for each product, named by `switch`, and where it is true the product is computed in fp32.
    """
    graph = model.graph
    name_nodes(graph)
    found = products(graph)
    seen = channels(model, feeds, sorted({n.input[0] for n in found}), folder)
    most = max((c.tokens for c in seen.values()), default=0)
    tokens: dict[str, int] = defaultdict(int)  # of the products with each weight, which it is stored once for
    for node in found:
        if node.input[0] in seen:
            tokens[node.input[1]] = max(tokens[node.input[1]], seen[node.input[0]].tokens)
    chosen = [
        n.name for n in found if n.name not in keep and n.input[0] in seen and tokens[n.input[1]] > FEW_TOKENS * most
    ]
    fits = {n.input[0]: fit(seen[n.input[0]]) for n in found if n.name in chosen}
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in {n.input[1] for n in found}}
    activations: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        name, weight = node.input[0], f"{node.name}_weight"
        if name not in activations:
            activations.add(name)
            nodes += quantized_activation(graph, name, fits[name])
        nodes.append(quantized_weight(graph, weights[node.input[1]], weight, transposed(node), fits[name]))
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[0], product.input[1] = f"{name}_int8", weight
        nodes += either(graph, node, product) if switches else [product]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return Quantized(model, chosen, [n.name for n in found if n.name not in chosen])


def switch(name: str) -> str:
    """The graph input that switches a product to fp32."""
    return f"{name}_exact"


def either(graph: onnx.GraphProto, exact: onnx.NodeProto, quantized: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Both products, and the one that the switch says."""
    graph.input.append(helper.make_tensor_value_info(switch(exact.name), onnx.TensorProto.BOOL, [1]))
    (result,) = exact.output
    ends = [switch(exact.name), f"{result}_fp32", f"{result}_uint8"]
    exact.output[0], quantized.output[0] = ends[1:]
    quantized.name = f"{exact.name}_uint8"
    return [exact, quantized, helper.make_node("Where", ends, [result], f"{exact.name}_either")]


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own."""
    taken: dict[str, int] = defaultdict(int)
    for node in graph.node:
        name = node.name or node.op_type
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def fit(seen: Channels) -> Range:
    """The narrowest range for which large channels need no more than `FURTHER_COLUMNS`."""
    allowed = int(len(seen.low) * FURTHER_COLUMNS)
    top, bottom = max(float(seen.high.max()), 0.0), max(float(-seen.low.min()), 0.0)
    wide, narrow = max(top, bottom, 1e-6), 0.0
    for _ in range(30):  # bisection of the reach on either side
        reach = (wide + narrow) / 2
        if sum(steps.sum() for steps in needed(seen, min(top, reach), min(bottom, reach))) <= allowed:
            wide = reach
        else:
            narrow = reach
    high, low = min(top, wide), min(bottom, wide)
    return Range(-low, high, *further(seen, high, low))


def sides(high: float, low: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Above and below: how far the channel's own column reaches in [−low, high], and each further one.

    Further columns are positive on both sides, so none goes beyond `high`.
    """
    return (high, high), (low, min(low, high))


def needed(seen: Channels, high: float, low: float) -> list[NDArray[np.floating]]:
    """Above and below: further columns of each channel, (K,), for what lies beyond [−low, high]."""
    reaches = zip((seen.high, -seen.low), sides(high, low), strict=True)
    return [np.ceil(np.maximum(ends - reach, 0) / max(step, 1e-12)) for ends, (reach, step) in reaches]


def further(
    seen: Channels, high: float, low: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Channel, sign and offset of the further columns."""
    channel, sign, offset = [], [], []
    for side, (reach, step), steps in zip((1.0, -1.0), sides(high, low), needed(seen, high, low), strict=True):
        for c in np.flatnonzero(steps):
            for i in range(int(steps[c])):
                channel.append(c)
                sign.append(side)
                offset.append(reach + step * i)
    return np.array(channel, np.int64), np.array(sign, np.float32), np.array(offset, np.float32)


def quantized_activation(graph: onnx.GraphProto, name: str, fitted: Range) -> list[onnx.NodeProto]:
    """Quantize to uint8 with a zero point, so that 0 is exact, and back, with the further columns behind the rest."""
    scale = np.float32(max((fitted.high - fitted.low) / 255, 1e-12))
    zero = np.uint8(np.clip(round(-fitted.low / scale), 0, 255))

    def constant(kind: str, value: object) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{kind}"))
        return f"{name}_{kind}"

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}_{output}"], f"{name}_{output}", **attributes)

    ends = [constant("scale", scale), constant("zero", zero)]
    if not fitted.channel.size:
        return [
            node("QuantizeLinear", [name, *ends], "quantized"),
            node("DequantizeLinear", [f"{name}_quantized", *ends], "int8"),
        ]
    return [
        node("QuantizeLinear", [name, *ends], "clipped"),
        node("Gather", [name, constant("channel", fitted.channel)], "large", axis=-1),
        node("Mul", [f"{name}_large", constant("sign", fitted.sign)], "upright"),
        node("Sub", [f"{name}_upright", constant("offset", fitted.offset)], "beyond"),
        node("Relu", [f"{name}_beyond"], "positive"),
        node("QuantizeLinear", [f"{name}_positive", *ends], "further"),
        node("Concat", [f"{name}_clipped", f"{name}_further"], "quantized", axis=-1),
        node("DequantizeLinear", [f"{name}_quantized", *ends], "int8"),
    ]


def quantized_weight(
    graph: onnx.GraphProto, weight: NDArray[np.float32], name: str, transpose: bool, fitted: Range
) -> onnx.NodeProto:
    """Symmetric int8 with one scale an output channel; the rows of large channels once more for each further column."""
    rows = weight.T if transpose else weight
    scale = np.maximum(np.abs(rows).max(axis=0) / 127, 1e-12).astype(np.float32)
    quantized = with_further_rows(rows / scale, fitted)
    quantized = np.ascontiguousarray(quantized.T if transpose else quantized)
    graph.initializer.append(numpy_helper.from_array(quantized, f"{name}_values"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}_zero"))
    inputs = [f"{name}_values", f"{name}_scale", f"{name}_zero"]
    return helper.make_node("DequantizeLinear", inputs, [name], name, axis=0 if transpose else 1)


def with_further_rows(exact: NDArray[np.float32], fitted: Range) -> NDArray[np.int8]:
    """Weights (K, M) in units of their scale → int8 (K + J, M).

    A large value passes through its channel's columns one after the other. Each rounds what the ones before it left
    (error diffusion), or the rounding error of the channel's weights would be multiplied by the whole large value.
    """
    rounded = np.rint(exact)
    further = np.zeros((len(fitted.channel), exact.shape[1]), np.float32)
    passed: dict[tuple[int, float], NDArray[np.float32]] = defaultdict(lambda: np.zeros_like(exact[0]))
    for j, (channel, sign, offset) in enumerate(zip(fitted.channel, fitted.sign, fitted.offset, strict=True)):
        reach, step = fitted.side(sign)
        wanted = exact[channel] * (offset + step) - rounded[channel] * reach - passed[channel, sign]
        row = np.clip(np.rint(wanted / step), -127, 127)
        passed[channel, sign] += row * step
        further[j] = sign * row
    return np.concatenate([np.clip(rounded, -127, 127), further]).astype(np.int8)
