"""What int8 needs to know of every stage: its matmuls with constant weights, and the ranges of what
they multiply.

A weight may have several uses: a decoder's meets context, prompt and text, ALBERT's all layers. All
uses have the same extra columns, so that it has one copy in int8, but each has a range r of its
own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import Bundle
from bbt_accel.exporters.convert.calibration import ROWS_PER_CALL, Channels, channels
from bbt_accel.exporters.convert.formats import Fused, graph_on_disk
from bbt_accel.exporters.convert.matmuls import content_hash, input_channels, quantizable_matmuls
from bbt_accel.exporters.convert.outlier_channels import SplitRange, extra_columns, fit_range
from bbt_accel.exporters.trace.graph import name_nodes
from bbt_accel.exporters.trace.sessions import Feeds, calls, initial_feeds, prompt_feeds
from bbt_accel.io.progress import Tell

FEW_TOKENS = 0.4
"""Weights that meet at most this share of the tokens stay in fp32: matmuls once per row or
candidate (calibration has two rows and four candidates in a call), at the readout position, or in a
short decoder. They are little of the work."""


@dataclass(frozen=True)
class Use:
    """A matmul of an activation with a constant weight.

    weight: the sha256 of its bytes, by which all uses in all stages know it. work: the tokens in a
    call and the weight's shape, whose product is what it costs.
    """

    input: str
    weight: str
    work: tuple[int, ...]


@dataclass(frozen=True)
class CalibratedStage:
    """A stage in fp32 with what calibration saw.

    file: its graph, with the weights beside it. fused: how many operators of each kind. seen: of
    the matmuls' inputs.
    uses: by the name of the matmul. feeds: the stage's inputs, some rows at a time, as the stages
    before it compute them in fp32. ranges: of the inputs of weights that can be quantized.
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
        """Whether activations stay in fp32: the context runs once per search, and its first token
        has by far the largest outliers, which all rows attend to."""
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
    feeds = initial_feeds(bundle, batch, calls(bundle.info, batch, ROWS_PER_CALL))
    for done, stage in enumerate(bundle.info.stages):
        tell(f"calibrating {stage}", done, len(bundle.info.stages))
        feeds = [feed | prompt_feeds(bundle.info, stage, prompts) for feed in feeds]
        source = bundle.path / f"{stage}.onnx"
        file, fused = files.enter_context(graph_on_disk(source, fuse, folder))
        seen, uses, results = calibrate_graph(file, feeds)
        found.append(CalibratedStage(stage, file, fused, seen, uses, feeds))
        feeds = [feed | result for feed, result in zip(feeds, results, strict=True)]
    return fit_ranges(found)


def calibrate_graph(
    file: Path, feeds: list[Feeds]
) -> tuple[dict[str, Channels], dict[str, Use], list[Feeds]]:
    """What the matmuls of a graph with constant weights see, those matmuls by their names, and the
    graph's outputs.
    """
    graph = onnx.load(str(file), load_external_data=False).graph
    name_nodes(graph)
    matmuls, weights = quantizable_matmuls(graph), {t.name: t for t in graph.initializer}
    seen, results = channels(
        file, feeds, {node.input[0]: input_channels(graph, node) for node in matmuls}
    )
    tokens = {name: c.tokens for name, c in seen.items()}
    digest = {
        name: content_hash(weights[name], file.parent)
        for name in {node.input[1] for node in matmuls}
    }
    uses: dict[str, Use] = {}
    for node in matmuls:
        name, weight = node.input[0], node.input[1]
        uses[node.name] = Use(name, digest[weight], (tokens.get(name, 0), *weights[weight].dims))
    return seen, uses, results


def frequent(stages: list[CalibratedStage]) -> dict[str, tuple[int, ...]]:
    """The weights to quantize, with the tokens of all their uses, and their shape.

    A weight is stored once, so it is quantized in all uses or in none: in all if it meets more than
    `FEW_TOKENS` of a stage's tokens in one of them.
    """
    uses, often = defaultdict[str, list[Use]](list), set[str]()
    for stage in stages:
        most = max((use.work[0] for use in stage.uses.values()), default=0)
        for use in stage.uses.values():
            uses[use.weight].append(use)
            if use.work[0] > FEW_TOKENS * most:
                often.add(use.weight)
    measured = (
        weight for weight in uses if weight in often and all(use.work[0] for use in uses[weight])
    )
    return {
        weight: (sum(use.work[0] for use in uses[weight]), *uses[weight][0].work[1:])
        for weight in measured
    }


def fit_ranges(stages: list[CalibratedStage]) -> list[CalibratedStage]:
    """The stages with the ranges of their weights' inputs. Inputs that share a weight share its
    extra columns.
    """
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
            seen = [
                stages[number].seen[name] for number, name in inputs if not stages[number].exact
            ]
            extra = extra_columns(seen or [stages[number].seen[name] for number, name in inputs])
            for number, name in inputs:
                ranges[number][name] = fit_range(stages[number].seen[name], extra)
    return [replace(stage, ranges=found) for stage, found in zip(stages, ranges, strict=True)]
