"""Static int8: 8-bit matmuls with activation ranges fixed at calibration and one weight scale per output channel.

Fixed ranges keep the candidates of a population independent: dynamic ones would span the whole batch.

A transformer's hidden states have a few outlier channels, many times as large as the rest; one scale for all would
leave the rest a handful of steps. Here the range ends where most channels end, and outlier channels are split: what
exceeds the range goes into extra columns of the same matmul, each clipped to the range, with the channel's weights
repeated: x w = clip(x) w + clip(x − r) w + clip(x − 2r) w + …

A weight may have several uses: a decoder's meets context, prompt and text, ALBERT's all layers. All uses have the same
extra columns, so that it has one copy in int8, but each has a range r of its own. A decoder's context takes the int8
weights, too, but multiplies in fp32.

Where that is not enough, some weights stay in fp32, chosen by the effect of each on the logits.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.exporters.calibration import ROWS_PER_CALL, Channels, channels
from bbt_accel.exporters.convert import Fused, graph_on_disk
from bbt_accel.exporters.graph import name_nodes, replace_nodes
from bbt_accel.exporters.sessions import Feeds, RunStage, initial_feeds, onnx_stage, prompt_feeds, temporary_graph
from bbt_accel.exporters.validate import relative_rmse
from bbt_accel.progress import Tell

FEW_TOKENS = 0.4
"""Weights that meet at most this share of the tokens stay in fp32: matmuls once per row or candidate (calibration has
two rows and four candidates in a call), at the readout position, or in a short decoder. They are little of the work."""
SPLIT_SHARE = 1 / 16
"""Extra columns for outlier channels, at most, relative to the channels: their relative cost is of that order. Twice as
many where a weight has several uses, whose outliers differ."""


@dataclass(frozen=True)
class SplitRange:
    """The range of an activation in uint8, and the extra columns for what outlier channels have beyond it.

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


def quantizable_matmuls(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Matmuls of an activation with a constant weight."""
    rank = {t.name: len(t.dims) for t in graph.initializer}
    matmuls = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node for node in matmuls if node.input[0] not in rank and rank.get(node.input[1]) == 2]


@dataclass(frozen=True)
class Use:
    """A matmul of an activation with a constant weight.

    weight: the sha256 of its bytes, by which all uses in all stages know it. work: the tokens in a call and the
    weight's shape, whose product is what it costs.
    """

    input: str
    weight: str
    work: tuple[int, ...]


@dataclass(frozen=True)
class CalibratedStage:
    """A stage in fp32 with what calibration saw.

    file: its graph, with the weights beside it. fused: how many operators of each kind. seen: of the matmuls' inputs.
    uses: by the name of the matmul. feeds: the stage's inputs, some rows at a time, as the stages before it compute
    them in fp32. ranges: of the inputs of weights that can be quantized.
    """

    name: str
    file: Path
    fused: dict[str, int]
    seen: dict[str, Channels]
    uses: dict[str, Use]
    feeds: list[Feeds]
    ranges: dict[str, SplitRange] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether activations stay in fp32: the context runs once per search, and its first token has by far the
        largest outliers, which all rows attend to."""
        return self.name == "context"


def calibrate(
    files: ExitStack,
    bundle: Bundle,
    fuse: Callable[[ir.Model], Fused],
    batch: Batch,
    prompts: Float32,
    folder: Path,
    tell: Tell,
) -> list[CalibratedStage]:
    """Every stage of a bundle as calibrated on these rows and prompts.

    files: closes the temporary files in `folder`.
    """
    found: list[CalibratedStage] = []
    feeds = initial_feeds(bundle, batch, ROWS_PER_CALL)
    for done, stage in enumerate(bundle.info.stages):
        tell(f"calibrating {stage}", done, len(bundle.info.stages))
        feeds = [feed | prompt_feeds(bundle.info, stage, prompts) for feed in feeds]
        source = bundle.path / f"{stage}.onnx"
        file, fused = files.enter_context(graph_on_disk(source, fuse, folder))
        seen, uses, results = calibrate_graph(file, feeds)
        found.append(CalibratedStage(stage, file, fused, seen, uses, feeds))
        feeds = [feed | result for feed, result in zip(feeds, results, strict=True)]
    return fit_ranges(found)


def calibrate_graph(file: Path, feeds: list[Feeds]) -> tuple[dict[str, Channels], dict[str, Use], list[Feeds]]:
    """What the matmuls of a graph with constant weights see, those matmuls by their names, and the graph's outputs."""
    graph = onnx.load(str(file), load_external_data=False).graph
    name_nodes(graph)
    matmuls, weights = quantizable_matmuls(graph), {t.name: t for t in graph.initializer}
    seen, results = channels(file, feeds, {node.input[0]: input_channels(graph, node) for node in matmuls})
    tokens = {name: c.tokens for name, c in seen.items()}
    digest = {name: content_hash(weights[name], file.parent) for name in {node.input[1] for node in matmuls}}
    uses: dict[str, Use] = {}
    for node in matmuls:
        name, weight = node.input[0], node.input[1]
        uses[node.name] = Use(name, digest[weight], (tokens.get(name, 0), *weights[weight].dims))
    return seen, uses, results


def content_hash(tensor: onnx.TensorProto, folder: Path) -> str:
    return hashlib.sha256(numpy_helper.to_array(tensor, str(folder)).tobytes()).hexdigest()


def is_transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def input_channels(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Channels of a matmul's input."""
    (dims,) = (t.dims for t in graph.initializer if t.name == node.input[1])
    return int(dims[1 if is_transposed(node) else 0])


def to_int8(
    stage: CalibratedStage, weights: Collection[str], switchable: bool = False
) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """The graph with the matmuls of these weights quantized: uint8 activations, int8 weights, float results.

    Returns it, whose other weights stay beside the stage's file; the names of those matmuls, and of the ones that stay
    in fp32. switchable: the graph gets a boolean input for each quantized weight, named by `switch`, that has its
    matmuls computed in fp32 where it is true.
    """
    model = onnx.load(str(stage.file), load_external_data=False)
    graph = model.graph
    name_nodes(graph)
    exact = {t.name: t for t in graph.initializer}
    done: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        use = stage.uses.get(node.name)
        if use is None or use.weight not in weights:
            nodes.append(node)
            continue
        fitted, weight, transpose = stage.ranges[use.input], f"{node.input[1]}_int8", is_transposed(node)
        if use.input not in done:
            nodes += (pad_activation if stage.exact else quantize_activation)(graph, use.input, fitted)
        if weight not in done:
            array = numpy_helper.to_array(exact[node.input[1]], str(stage.file.parent))
            quantize_weight(graph, array, weight, transpose, fitted)
            if switchable:
                graph.input.append(helper.make_tensor_value_info(switch(use.weight), onnx.TensorProto.BOOL, [1]))
        done |= {use.input, weight}
        matmul = onnx.NodeProto()
        matmul.CopyFrom(node)
        matmul.input[:2] = f"{use.input}_int8", f"{node.name}_weight"
        nodes.append(dequantize_weight(weight, matmul.input[1], transpose))
        nodes += switchable_matmul(node, matmul, switch(use.weight)) if switchable else [matmul]
    replace_nodes(graph, nodes)
    quantized = [name for name, use in stage.uses.items() if use.weight in weights]
    return model, quantized, [name for name in stage.uses if name not in quantized]


def frequent(stages: list[CalibratedStage]) -> dict[str, tuple[int, ...]]:
    """The weights to quantize, with the tokens of all their uses, and their shape.

    A weight is stored once, so it is quantized in all uses or in none: in all if it meets more than `FEW_TOKENS` of a
    stage's tokens in one of them.
    """
    uses, often = defaultdict[str, list[Use]](list), set[str]()
    for stage in stages:
        most = max((use.work[0] for use in stage.uses.values()), default=0)
        for use in stage.uses.values():
            uses[use.weight].append(use)
            if use.work[0] > FEW_TOKENS * most:
                often.add(use.weight)
    measured = (weight for weight in uses if weight in often and all(use.work[0] for use in uses[weight]))
    return {weight: (sum(use.work[0] for use in uses[weight]), *uses[weight][0].work[1:]) for weight in measured}


def switch(weight: str) -> str:
    """The graph input that switches a weight's matmuls to fp32."""
    return f"{weight}_exact"


def switchable_matmul(exact: onnx.NodeProto, quantized: onnx.NodeProto, switch: str) -> list[onnx.NodeProto]:
    """Both matmuls, and the result of the one that the switch selects."""
    (result,) = exact.output
    inputs = [switch, f"{result}_fp32", f"{result}_uint8"]
    exact.output[0], quantized.output[0] = inputs[1:]
    quantized.name = f"{exact.name}_uint8"
    return [exact, quantized, helper.make_node("Where", inputs, [result], f"{exact.name}_switch")]


# Channel splitting -------------------------------------------------------------------------------------------


def fit_ranges(stages: list[CalibratedStage]) -> list[CalibratedStage]:
    """The stages with the ranges of their weights' inputs. Inputs that share a weight share its extra columns."""
    weights = frequent(stages)
    groups: list[tuple[set[str], list[tuple[int, str]]]] = []  # weights, and their inputs by stage
    for number, stage in enumerate(stages):
        for name in stage.seen:
            own = {use.weight for use in stage.uses.values() if use.input == name} & weights.keys()
            touched = [group for group in groups if group[0] & own]
            groups = [group for group in groups if not group[0] & own]
            inputs = [place for group in touched for place in group[1]]
            groups.append((own.union(*(group[0] for group in touched)), [*inputs, (number, name)]))
    ranges: list[dict[str, SplitRange]] = [{} for _ in stages]
    for own, inputs in groups:
        if own:
            seen = [stages[number].seen[name] for number, name in inputs if not stages[number].exact]
            extra = extra_columns(seen or [stages[number].seen[name] for number, name in inputs])
            for number, name in inputs:
                ranges[number][name] = fit_range(stages[number].seen[name], extra)
    return [replace(stage, ranges=found) for stage, found in zip(stages, ranges, strict=True)]


def extra_columns(uses: list[Channels]) -> NDArray[np.int64]:
    """The number of extra columns of each channel, (K,), within `SPLIT_SHARE`, that narrow the ranges most.

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
    """The narrowest range for which outlier channels need no more than the extra columns that are allowed."""
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


def quantize_activation(graph: onnx.GraphProto, name: str, fitted: SplitRange) -> list[onnx.NodeProto]:
    """Quantize to uint8 with a zero point, so that 0 is exact, and back, with the extra columns appended."""

    def constant(kind: str, value: object) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{kind}"))
        return f"{name}_{kind}"

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}_{output}"], f"{name}_{output}", **attributes)

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
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{name}_{kind}"))
    return [helper.make_node("Pad", [name, f"{name}_pads", "", f"{name}_axes"], [f"{name}_int8"], f"{name}_padded")]


def quantize_weight(
    graph: onnx.GraphProto, weight: NDArray[np.float32], name: str, transpose: bool, fitted: SplitRange
) -> None:
    """Add a weight as symmetric int8 with one scale per output channel; outlier channels have a row per column."""
    rows = weight.T if transpose else weight
    scale = np.maximum(np.abs(rows).max(axis=0) / 127, 1e-12).astype(np.float32)
    quantized = split_weight(rows / scale, fitted)
    quantized = np.ascontiguousarray(quantized.T if transpose else quantized)
    constants = {"values": quantized, "scale": scale, "zero": np.zeros(scale.size, np.int8)}
    graph.initializer.extend(numpy_helper.from_array(value, f"{name}_{kind}") for kind, value in constants.items())


def dequantize_weight(name: str, output: str, transpose: bool) -> onnx.NodeProto:
    inputs = [f"{name}_{kind}" for kind in ("values", "scale", "zero")]
    return helper.make_node("DequantizeLinear", inputs, [output], output, axis=0 if transpose else 1)


def split_weight(exact: NDArray[np.float32], fitted: SplitRange) -> NDArray[np.int8]:
    """Weights (K, M) in units of their scale → int8 (K + J, M), whatever the scale of the activation.

    An outlier passes through its channel's columns one after the other. Their rows add up to the weight's multiple,
    rounded once; otherwise the rounding error of the channel's weights would be multiplied by the whole outlier.
    """
    of_column, times = exact[fitted.channel], fitted.times[:, None]
    extra = np.rint(of_column * (times + 1)) - np.rint(of_column * times)
    return np.clip(np.concatenate([np.rint(exact), extra]), -127, 127).astype(np.int8)


# Sensitivity fallback ----------------------------------------------------------------------------------------

MEASUREMENTS = 32
"""Groups of weights whose error is measured, at most; each measurement is a run of the network on one call's rows."""


@dataclass(frozen=True)
class SwitchableStage:
    """One stage in which the matmuls of every weight run in fp32 or int8, as its switch says."""

    run: RunStage
    weights: set[str]  # those that have a switch here
    feeds: list[Feeds]  # the stage's inputs, some rows at a time, as the stages before it compute them in fp32


def by_sensitivity(stages: list[SwitchableStage], work: dict[str, tuple[int, ...]]) -> list[tuple[str, float]]:
    """The quantized weights, those with the largest error for their cost first, and the squared error of each.

    work: as from `frequent`.
    """
    error = measure_errors(stages, work)
    order = sorted(error, key=lambda weight: error[weight] / max(1, math.prod(work[weight])), reverse=True)
    return [(weight, error[weight]) for weight in order]


def keep_more(ranked: list[tuple[str, float]], kept: int, share: float) -> int:
    """How many weights to keep in fp32, more than `kept`, for at most this share of the squared error that is left.

    Squared errors of weights add up, but for a factor that changes little.
    """
    allowed = share * sum(error for _, error in ranked[kept:])
    kept += 1
    while sum(error for _, error in ranked[kept:]) > allowed:
        kept += 1
    return kept


def measure_errors(stages: list[SwitchableStage], work: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """The squared relative logit RMSE, on the rows of one call, that each weight in int8 adds.

    Weights of one shape that meet as many tokens form a group, which is measured as a whole; then the group with the
    largest error is split into its lower and its upper layers, and so on. Those of one group share its error.
    """
    reference = run_from(stages, 0, work, calls=1)

    def measured(group: list[str]) -> tuple[float, list[str]]:
        first = next(i for i, stage in enumerate(stages) if not stage.weights.isdisjoint(group))
        return relative_rmse(run_from(stages, first, work.keys() - set(group), calls=1), reference) ** 2, group

    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for weight, product in work.items():
        alike[product].append(weight)
    groups = [measured(group) for group in alike.values()]
    for _ in range((MEASUREMENTS - len(groups)) // 2):
        largest = max(groups, key=lambda group: group[0] if len(group[1]) > 1 else -1)
        if len(largest[1]) == 1:
            break
        groups.remove(largest)
        half = len(largest[1]) // 2
        groups += [measured(largest[1][:half]), measured(largest[1][half:])]
    return {weight: error / len(group) for error, group in groups for weight in group}


def make_switchable(stages: list[CalibratedStage], weights: Collection[str], folder: Path) -> list[SwitchableStage]:
    found = []
    for stage in stages:
        model, _, _ = to_int8(stage, weights, switchable=True)
        with temporary_graph(model, folder) as file:
            own = {use.weight for use in stage.uses.values() if use.weight in weights}
            found.append(SwitchableStage(onnx_stage(file), own, stage.feeds))
    return found


def run_from(stages: list[SwitchableStage], first: int, fp32: Collection[str], calls: int | None = None) -> Float32:
    """Label logits (P, N, C) from stage `first` on, with these weights in fp32 and the others in int8.

    calls: run on the rows of the first calls alone.
    """
    exact = set(fp32)
    parts: list[Float32] = []
    for number in range(len(stages[first].feeds[:calls])):
        state: Feeds = {}
        for stage in stages[first:]:
            switches = {switch(weight): np.array([weight in exact]) for weight in stage.weights}
            state |= stage.run(stage.feeds[number] | state | switches)
        parts.append(state["label_logits"])
    return np.concatenate(parts, axis=1)
