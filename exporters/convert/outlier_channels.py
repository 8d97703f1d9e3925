"""Channel splitting: an 8-bit range for most channels, and extra columns of the matmul for the
outlier channels.

A transformer's hidden states have a few outlier channels, many times as large as the rest; one
scale for all would leave the rest a handful of steps. Here the range ends where most channels end,
and outlier channels are split: what exceeds the range goes into extra columns of the same matmul,
each clipped to the range, with the channel's weights
repeated: x w = clip(x) w + clip(x − r) w + clip(x − 2r) w + …
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.exporters.convert.calibration import Channels

SPLIT_SHARE = 1 / 16
"""Extra columns for outlier channels, at most, relative to the channels: their relative cost is of
that order. Twice as many where a weight has several uses, whose outliers differ."""


@dataclass(frozen=True)
class SplitRange:
    """The range of an activation in uint8, and the extra columns for what outlier channels have
    beyond it.

    Extra column j is what channel[j] has beyond times[j] times the range, in the same range.
    """

    scale: np.float32
    zero: np.uint8
    channel: NDArray[np.int64]
    times: NDArray[np.int64]

    @property
    def ends(self) -> tuple[np.float32, np.float32]:
        """The smallest and the largest value."""
        return -self.scale * np.float32(self.zero), self.scale * np.float32(255 - self.zero)


def extra_columns(uses: list[Channels]) -> NDArray[np.int64]:
    """The number of extra columns of each channel, (K,), within `SPLIT_SHARE`, that narrow the
    ranges most.

    In several uses of a weight, all by the same factor, relative to what each could have by itself.
    """
    ends = [np.maximum(np.maximum(seen.high, -seen.low), 1e-6) for seen in uses]
    allowed = int(len(ends[0]) * SPLIT_SHARE)
    joint = np.max([end / narrowest_reach(end, allowed) for end in ends], axis=0)
    return columns_needed(joint, narrowest_reach(joint, allowed * min(len(uses), 2)))


def columns_needed(ends: NDArray[np.float32], reach: float) -> NDArray[np.int64]:
    """Extra columns of each channel, (K,), for what exceeds `reach`."""
    return np.maximum(np.ceil(ends / reach) - 1, 0).astype(np.int64)


def narrowest_reach(ends: NDArray[np.float32], allowed: int) -> float:
    """The narrowest range for which outlier channels need no more than the extra columns that are
    allowed.
    """
    wide, narrow = float(ends.max()), 0.0
    for _ in range(30):  # bisection
        reach = (wide + narrow) / 2
        if columns_needed(ends, reach).sum() <= allowed:
            wide = reach
        else:
            narrow = reach
    return wide


def fit_range(seen: Channels, extra: NDArray[np.int64]) -> SplitRange:
    """The narrowest range for an activation whose channels have so many extra columns, (K,)."""
    high = max(float((seen.high / (1 + extra)).max()), 0.0)
    low = min(float((seen.low / (1 + extra)).min()), 0.0)
    scale = np.float32(max((high - low) / 255, 1e-12))
    channel = np.repeat(np.arange(len(extra)), extra)
    times = 1 + np.arange(len(channel)) - np.repeat(np.cumsum(extra) - extra, extra)
    return SplitRange(scale, np.uint8(np.clip(round(-low / scale), 0, 255)), channel, times)


def quantize_activation(
    graph: onnx.GraphProto, name: str, fitted: SplitRange
) -> list[onnx.NodeProto]:
    """Quantize to uint8 with a zero point, so that 0 is exact, and back, with the extra columns
    appended.
    """

    def constant(kind: str, value: object) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{kind}"))
        return f"{name}_{kind}"

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(
            kind, inputs, [f"{name}_{output}"], f"{name}_{output}", **attributes
        )

    scaling = [constant("scale", fitted.scale), constant("zero", fitted.zero)]
    back = node("DequantizeLinear", [f"{name}_quantized", *scaling], "int8")
    if not fitted.channel.size:
        return [node("QuantizeLinear", [name, *scaling], "quantized"), back]
    low, high = (fitted.times.astype(np.float32) * end for end in fitted.ends)
    return [
        node("QuantizeLinear", [name, *scaling], "clipped"),
        node("Gather", [name, constant("channel", fitted.channel)], "outliers", axis=-1),
        node("Max", [f"{name}_outliers", constant("low", low)], "raised"),
        node("Min", [f"{name}_raised", constant("high", high)], "within"),
        node("Sub", [f"{name}_outliers", f"{name}_within"], "beyond"),
        node("QuantizeLinear", [f"{name}_beyond", *scaling], "extra"),
        node("Concat", [f"{name}_clipped", f"{name}_extra"], "quantized", axis=-1),
        back,
    ]


def pad_activation(graph: onnx.GraphProto, name: str, fitted: SplitRange) -> list[onnx.NodeProto]:
    """Zeros for the extra columns, which an activation in fp32 does not need."""
    for kind, value in (("pads", [0, len(fitted.channel)]), ("axes", [-1])):
        graph.initializer.append(
            numpy_helper.from_array(np.array(value, np.int64), f"{name}_{kind}")
        )
    return [
        helper.make_node(
            "Pad", [name, f"{name}_pads", "", f"{name}_axes"], [f"{name}_int8"], f"{name}_padded"
        )
    ]


def quantize_weight(
    graph: onnx.GraphProto,
    weight: NDArray[np.float32],
    name: str,
    transpose: bool,
    fitted: SplitRange,
) -> None:
    """Add a weight as symmetric int8 with one scale per output channel; outlier channels have a row
    per column.
    """
    rows = weight.T if transpose else weight
    scale = np.maximum(np.abs(rows).max(axis=0) / 127, 1e-12).astype(np.float32)
    quantized = split_weight(rows / scale, fitted)
    quantized = np.ascontiguousarray(quantized.T if transpose else quantized)
    constants = {"values": quantized, "scale": scale, "zero": np.zeros(scale.size, np.int8)}
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{name}_{kind}") for kind, value in constants.items()
    )


def dequantize_weight(name: str, output: str, transpose: bool) -> onnx.NodeProto:
    inputs = [f"{name}_{kind}" for kind in ("values", "scale", "zero")]
    return helper.make_node(
        "DequantizeLinear", inputs, [output], output, axis=0 if transpose else 1
    )


def split_weight(exact: NDArray[np.float32], fitted: SplitRange) -> NDArray[np.int8]:
    """Weights (K, M) in units of their scale → int8 (K + J, M), whatever the scale of the
    activation.

    An outlier passes through its channel's columns one after the other. Their rows add up to the
    weight's multiple, rounded once; otherwise the rounding error of the channel's weights would be
    multiplied by the whole outlier.
    """
    of_column, times = exact[fitted.channel], fitted.times[:, None]
    extra = np.rint(of_column * (times + 1)) - np.rint(of_column * times)
    return np.clip(np.concatenate([np.rint(exact), extra]), -127, 127).astype(np.int8)
