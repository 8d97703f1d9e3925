"""Static int8: 8-bit matmuls with activation ranges fixed at calibration and one weight scale per output channel.

Fixed ranges keep the candidates of a population independent: dynamic ones would span the whole batch.

A transformer's hidden states have a few outlier channels, many times as large as the rest; one scale for all would
leave the rest a handful of steps. Here the range ends where most channels end, and outlier channels are split: what
exceeds the range goes into extra columns of the same matmul, each clipped to the range, with the channel's weights
repeated: x w = clip(x) w + clip(x − r) w + clip(x − 2r) w + …

Where that is not enough, some matmuls stay in fp32, chosen by the effect of each on the logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
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
"""Extra columns for outlier channels, at most, relative to the channels: their relative cost is of that order."""


@dataclass(frozen=True)
class SplitRange:
    """The range [low, high] of an activation, and the extra columns for what outlier channels have beyond it.

    Extra column j is max(0, sign[j] · x[channel[j]] − offset[j]), in the same range.
    """

    low: float
    high: float
    channel: NDArray[np.int64]
    sign: NDArray[np.float32]
    offset: NDArray[np.float32]


def quantizable_matmuls(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Matmuls of an activation with a constant weight."""
    rank = {t.name: len(t.dims) for t in graph.initializer}
    matmuls = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node for node in matmuls if node.input[0] not in rank and rank.get(node.input[1]) == 2]


@dataclass(frozen=True)
class CalibratedStage:
    """A stage in fp32 with what calibration saw.

    file: its graph, with the weights beside it. fused: how many operators of each kind. seen: of the matmuls' inputs.
    work: of each matmul, the tokens in a call and its weight's shape, whose product is what it costs.
    feeds: the stage's inputs, some rows at a time, as the stages before it compute them in fp32.
    """

    name: str
    file: Path
    fused: dict[str, int]
    seen: dict[str, Channels]
    work: dict[str, tuple[int, ...]]
    feeds: list[Feeds]


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
        graph = onnx.load(str(file), load_external_data=False).graph
        name_nodes(graph)
        matmuls, shapes = quantizable_matmuls(graph), {t.name: tuple(t.dims) for t in graph.initializer}
        seen, results = channels(file, feeds, {node.input[0]: input_channels(graph, node) for node in matmuls})
        tokens = {name: c.tokens for name, c in seen.items()}
        work = {node.name: (tokens.get(node.input[0], 0), *shapes[node.input[1]]) for node in matmuls}
        found.append(CalibratedStage(stage, file, fused, seen, work, feeds))
        feeds = [feed | result for feed, result in zip(feeds, results, strict=True)]
    return found


def is_transposed(node: onnx.NodeProto) -> bool:
    return any(a.name == "transB" and a.i for a in node.attribute)


def input_channels(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Channels of a matmul's input."""
    (dims,) = (t.dims for t in graph.initializer if t.name == node.input[1])
    return int(dims[1 if is_transposed(node) else 0])


def to_int8(
    file: Path, seen: dict[str, Channels], keep: Collection[str] = (), switchable: bool = False
) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """The graph with its matmuls with constant weights quantized: uint8 activations, int8 weights, float results.

    Returns it, whose other weights stay beside `file`; the names of those matmuls, and of the ones that stay in fp32.
    keep: names of matmuls to leave in fp32, besides those below `FEW_TOKENS`. switchable: the graph gets a boolean
    input for each quantized matmul, named by `switch`, that computes it in fp32 where it is true.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    name_nodes(graph)
    matmuls = quantizable_matmuls(graph)
    chosen = {node.name for node in frequent(matmuls, seen) if node.name not in keep}
    weights = {t.name: t for t in graph.initializer}
    fitted: dict[str, SplitRange] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        name, weight = node.input[0], f"{node.name}_weight"
        if name not in fitted:
            fitted[name] = fit_range(seen[name])
            nodes += quantize_activation(graph, name, fitted[name])
        exact = numpy_helper.to_array(weights[node.input[1]], str(file.parent))
        nodes.append(quantize_weight(graph, exact, weight, is_transposed(node), fitted[name]))
        matmul = onnx.NodeProto()
        matmul.CopyFrom(node)
        matmul.input[:2] = f"{name}_int8", weight
        nodes += switchable_matmul(graph, node, matmul) if switchable else [matmul]
    replace_nodes(graph, nodes)
    names = [node.name for node in matmuls]
    return model, [name for name in names if name in chosen], [name for name in names if name not in chosen]


def frequent(matmuls: list[onnx.NodeProto], seen: dict[str, Channels]) -> list[onnx.NodeProto]:
    """Matmuls whose weight, which is stored once, meets more than `FEW_TOKENS` of the tokens in one of its uses."""
    most = max((c.tokens for c in seen.values()), default=0)
    measured = [node for node in matmuls if node.input[0] in seen]
    often = {node.input[1] for node in measured if seen[node.input[0]].tokens > FEW_TOKENS * most}
    return [node for node in measured if node.input[1] in often]


def switch(name: str) -> str:
    """The graph input that switches a matmul to fp32."""
    return f"{name}_exact"


def switchable_matmul(graph: onnx.GraphProto, exact: onnx.NodeProto, quantized: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Both matmuls, and the result of the one that the switch selects."""
    graph.input.append(helper.make_tensor_value_info(switch(exact.name), onnx.TensorProto.BOOL, [1]))
    (result,) = exact.output
    inputs = [switch(exact.name), f"{result}_fp32", f"{result}_uint8"]
    exact.output[0], quantized.output[0] = inputs[1:]
    quantized.name = f"{exact.name}_uint8"
    return [exact, quantized, helper.make_node("Where", inputs, [result], f"{exact.name}_switch")]


# Channel splitting -------------------------------------------------------------------------------------------


def fit_range(seen: Channels) -> SplitRange:
    """The narrowest range for which outlier channels need no more than `SPLIT_SHARE` extra columns."""
    allowed = int(len(seen.low) * SPLIT_SHARE)
    top, bottom = max(float(seen.high.max()), 0.0), max(float(-seen.low.min()), 0.0)
    wide, narrow = max(top, bottom, 1e-6), 0.0
    for _ in range(30):  # bisection of the reach on either side
        reach = (wide + narrow) / 2
        if sum(columns_needed(seen, *side).sum() for side in sides(min(top, reach), min(bottom, reach))) <= allowed:
            wide = reach
        else:
            narrow = reach
    high, low = min(top, wide), min(bottom, wide)
    columns = [
        (channel, sign, reach + step * i)
        for sign, reach, step in sides(high, low)
        for channel, needed in enumerate(columns_needed(seen, sign, reach, step))
        for i in range(int(needed))
    ]
    channel, sign, offset = zip(*columns, strict=True) if columns else ((), (), ())
    return SplitRange(-low, high, np.array(channel, np.int64), np.array(sign, np.float32), np.array(offset, np.float32))


def sides(high: float, low: float) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Above and below 0: the sign, how far the channel's own column reaches in [−low, high], and each extra one.

    Extra columns are positive on both sides, so none exceeds `high`.
    """
    return (1.0, high, high), (-1.0, low, min(low, high))


def columns_needed(seen: Channels, sign: float, reach: float, step: float) -> NDArray[np.floating]:
    """Extra columns of each channel, (K,), for what exceeds `reach` on one side of 0."""
    ends = seen.high if sign > 0 else -seen.low
    return np.asarray(np.ceil(np.maximum(ends - reach, 0) / max(step, 1e-12)))


def quantize_activation(graph: onnx.GraphProto, name: str, fitted: SplitRange) -> list[onnx.NodeProto]:
    """Quantize to uint8 with a zero point, so that 0 is exact, and back, with the extra columns appended."""
    scale = np.float32(max((fitted.high - fitted.low) / 255, 1e-12))
    zero = np.uint8(np.clip(round(-fitted.low / scale), 0, 255))

    def constant(kind: str, value: object) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{kind}"))
        return f"{name}_{kind}"

    def node(kind: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}_{output}"], f"{name}_{output}", **attributes)

    scaling = [constant("scale", scale), constant("zero", zero)]
    back = node("DequantizeLinear", [f"{name}_quantized", *scaling], "int8")
    if not fitted.channel.size:
        return [node("QuantizeLinear", [name, *scaling], "quantized"), back]
    return [
        node("QuantizeLinear", [name, *scaling], "clipped"),
        node("Gather", [name, constant("channel", fitted.channel)], "outliers", axis=-1),
        node("Mul", [f"{name}_outliers", constant("sign", fitted.sign)], "upright"),
        node("Sub", [f"{name}_upright", constant("offset", fitted.offset)], "beyond"),
        node("Relu", [f"{name}_beyond"], "positive"),
        node("QuantizeLinear", [f"{name}_positive", *scaling], "extra"),
        node("Concat", [f"{name}_clipped", f"{name}_extra"], "quantized", axis=-1),
        back,
    ]


def quantize_weight(
    graph: onnx.GraphProto, weight: NDArray[np.float32], name: str, transpose: bool, fitted: SplitRange
) -> onnx.NodeProto:
    """Symmetric int8 with one scale per output channel; an outlier channel has a further row per extra column."""
    rows = weight.T if transpose else weight
    scale = np.maximum(np.abs(rows).max(axis=0) / 127, 1e-12).astype(np.float32)
    quantized = split_weight(rows / scale, fitted)
    quantized = np.ascontiguousarray(quantized.T if transpose else quantized)
    constants = {"values": quantized, "scale": scale, "zero": np.zeros(scale.size, np.int8)}
    graph.initializer.extend(numpy_helper.from_array(value, f"{name}_{kind}") for kind, value in constants.items())
    inputs = [f"{name}_{kind}" for kind in constants]
    return helper.make_node("DequantizeLinear", inputs, [name], name, axis=0 if transpose else 1)


def split_weight(exact: NDArray[np.float32], fitted: SplitRange) -> NDArray[np.int8]:
    """Weights (K, M) in units of their scale → int8 (K + J, M).

    An outlier passes through its channel's columns one after the other. Each rounds what the ones before it left
    (error diffusion); otherwise the rounding error of the channel's weights would be multiplied by the whole outlier.
    """
    rounded = np.rint(exact)
    extra = np.zeros((len(fitted.channel), exact.shape[1]), np.float32)
    passed: dict[tuple[int, float], NDArray[np.float32]] = defaultdict(lambda: np.zeros_like(exact[0]))
    for j, (channel, sign, offset) in enumerate(zip(fitted.channel, fitted.sign, fitted.offset, strict=True)):
        _, reach, step = sides(fitted.high, -fitted.low)[0 if sign > 0 else 1]
        wanted = exact[channel] * (offset + step) - rounded[channel] * reach - passed[channel, sign]
        row = np.clip(np.rint(wanted / step), -127, 127)
        passed[channel, sign] += row * step
        extra[j] = sign * row
    return np.concatenate([np.clip(rounded, -127, 127), extra]).astype(np.int8)


# Sensitivity fallback ----------------------------------------------------------------------------------------

Matmul = tuple[str, str]  # a stage and the name of a matmul in it
MEASUREMENTS = 32
"""Groups of matmuls whose error is measured, at most; each measurement is a run of the network on one call's rows."""


@dataclass(frozen=True)
class SwitchableStage:
    """One stage in which every matmul runs in fp32 or int8, as its switch says."""

    name: str
    run: RunStage
    work: dict[str, tuple[int, ...]]  # as in `CalibratedStage`, of the quantized matmuls
    feeds: list[Feeds]  # the stage's inputs, some rows at a time, as the stages before it compute them in fp32


def by_sensitivity(stages: list[SwitchableStage]) -> list[tuple[Matmul, float]]:
    """The quantized matmuls, those with the largest error for their cost first, and the squared error of each."""
    work = {(stage.name, name): product for stage in stages for name, product in stage.work.items()}
    error = measure_errors(stages, work)
    order = sorted(error, key=lambda m: error[m] / max(1, math.prod(work[m])), reverse=True)
    return [(matmul, error[matmul]) for matmul in order]


def keep_more(ranked: list[tuple[Matmul, float]], kept: int, share: float) -> int:
    """How many matmuls to keep in fp32, more than `kept`, for at most this share of the squared error that is left.

    Squared errors of matmuls add up, but for a factor that changes little.
    """
    allowed = share * sum(error for _, error in ranked[kept:])
    kept += 1
    while sum(error for _, error in ranked[kept:]) > allowed:
        kept += 1
    return kept


def measure_errors(stages: list[SwitchableStage], work: dict[Matmul, tuple[int, ...]]) -> dict[Matmul, float]:
    """The squared relative logit RMSE, on the rows of one call, that each matmul in int8 adds.

    Matmuls with weights of one shape and as many tokens form a group, which is measured as a whole; then the group with
    the largest error is split into its lower and its upper layers, and so on. Those of one group share its error.
    """
    reference = run_from(stages, 0, work, calls=1)
    position = {stage.name: i for i, stage in enumerate(stages)}

    def measured(group: list[Matmul]) -> tuple[float, list[Matmul]]:
        found = run_from(stages, position[group[0][0]], work.keys() - set(group), calls=1)
        return relative_rmse(found, reference) ** 2, group

    alike: dict[tuple[int, ...], list[Matmul]] = defaultdict(list)
    for matmul, product in work.items():
        alike[product].append(matmul)
    groups = [measured(group) for group in alike.values()]
    for _ in range((MEASUREMENTS - len(groups)) // 2):
        largest = max(groups, key=lambda group: group[0] if len(group[1]) > 1 else -1)
        if len(largest[1]) == 1:
            break
        groups.remove(largest)
        half = len(largest[1]) // 2
        groups += [measured(largest[1][:half]), measured(largest[1][half:])]
    return {matmul: error / len(group) for error, group in groups for matmul in group}


def make_switchable(stages: list[CalibratedStage], folder: Path) -> list[SwitchableStage]:
    found = []
    for stage in stages:
        model, quantized, _ = to_int8(stage.file, stage.seen, switchable=True)
        with temporary_graph(model, folder) as file:
            work = {name: stage.work[name] for name in quantized}
            found.append(SwitchableStage(stage.name, onnx_stage(file), work, stage.feeds))
    return found


def run_from(stages: list[SwitchableStage], first: int, fp32: Collection[Matmul], calls: int | None = None) -> Float32:
    """Label logits (P, N, C) from stage `first` on, with these matmuls in fp32 and the others in int8.

    calls: run on the rows of the first calls alone.
    """
    exact = set(fp32)
    parts: list[Float32] = []
    for number in range(len(stages[first].feeds[:calls])):
        state: Feeds = {}
        for stage in stages[first:]:
            switches = {switch(name): np.array([(stage.name, name) in exact]) for name in stage.work}
            state |= stage.run(stage.feeds[number] | state | switches)
        parts.append(state["label_logits"])
    return np.concatenate(parts, axis=1)
