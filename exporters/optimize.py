"""From an exported bundle to one for a single engine: fused operators, fp16, bf16, int8, int4, TensorRT plans."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import INITIAL_PROMPT, OPENVINO_WEIGHTS, Bundle, write_info
from bbt_accel.engine_specs import Precision, targets
from bbt_accel.errors import BundleError, ExportError, UsageError, check_known, translated
from bbt_accel.exporters import graph
from bbt_accel.exporters.calibration import TaskRows, lengths, random_prompts, stage_feeds
from bbt_accel.exporters.convert import (
    convert_checkpoint,
    fuse,
    graph_on_disk,
    transpose_in_matmuls,
    transpose_weights,
)
from bbt_accel.exporters.device import write_device_graphs
from bbt_accel.exporters.half import TYPES, emulate_bf16, to_half
from bbt_accel.exporters.int4 import to_int4
from bbt_accel.exporters.int8 import (
    CalibratedStage,
    by_sensitivity,
    calibrate,
    frequent,
    keep_more,
    make_switchable,
    to_int8,
)
from bbt_accel.exporters.openvino_ir import openvino_bf16, save_openvino
from bbt_accel.exporters.sessions import limited_threads, run_stages, temporary_graph
from bbt_accel.exporters.tensorrt import OPERATORS, build_plans, check_capabilities, shape_profile
from bbt_accel.exporters.validate import fidelity, reference_logits, relative_rmse, scaled_error
from bbt_accel.files import new_folder
from bbt_accel.machine import installed
from bbt_accel.progress import Tell, silent

CALIBRATION_ROWS = 16  # rows, times the prompts of `random_prompts`, that activation ranges are read from
MAX_RMSE = 0.05  # relative logit RMSE of int8 above which matmuls are kept in fp32
LEAK = 0.05
"""Largest change of a row's logits when padding is added, relative to the largest logit; more means a lost mask."""
TOOLS = ("onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx_cu13", "torch")
"""Distributions whose versions the bundle records."""
Report = dict[str, object]


@dataclass(frozen=True)
class Job:
    """What is converted, for which target, and the rows and prompts (4, …) that it is calibrated and measured on."""

    bundle: Bundle
    target: str
    precision: Precision
    batch: Batch
    prompts: Float32
    max_rmse: float
    tell: Tell

    @cached_property
    def reference(self) -> Float32:
        """The source's label logits of these rows and prompts, (P, N, C)."""
        return run_stages(self.bundle, self.batch, self.prompts)


def optimize_bundle(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "fp32",
    target: str = "ort",
    calibrate: str | None = None,
    data: Path | None = None,
    max_rmse: float = MAX_RMSE,
    compute_capability: str | None = None,
    threads: int | None = None,
    progress: Tell = silent,
) -> Bundle:
    """Write a new bundle for one engine, with a report of what was converted, its size and its fidelity.

    calibrate: the task, or the run, whose few-shot train rows set int8 ranges and serve to measure fidelity, and whose
    rows and preset set TensorRT's shape profile; without it the shipped texts. max_rmse: int8 keeps matmuls in fp32
    until the relative logit RMSE is at most this. compute_capability: build TensorRT plans ahead of time for these
    (8.9, or 8.6,8.9) instead of this machine's GPU. threads: of the CPU; all cores unless given.
    Raises UsageError for a combination that does not exist or an output that is the source, BundleError for a source
    that is optimized already, ExportError for NaN logits or a lost attention mask, PlanError when TensorRT rejects the
    graph, EngineError when it needs a GPU that is missing.
    """
    source, output = Path(source), Path(output)
    check(source, output, precision, target, max_rmse)
    if data is not None and calibrate is None:
        raise UsageError("--data is the folder of the rows of --calibrate TASK; give both")
    capabilities = check_capabilities(compute_capability, target)
    bundle = Bundle.read(source)
    if bundle.info.target != "onnx":
        raise BundleError(f"{source} is optimized already ({bundle.info.precision}, {bundle.info.target})")
    rows = TaskRows(bundle, calibrate, data)
    job = Job(bundle, target, precision, rows.calibration(), random_prompts(bundle), max_rmse, progress)
    refused = translated(BundleError, f"{source} cannot be optimized")
    with new_folder(output) as folder, limited_threads(threads), refused:
        if (bundle.path / INITIAL_PROMPT).exists():
            shutil.copyfile(bundle.path / INITIAL_PROMPT, folder / INITIAL_PROMPT)
        report, logits = CONVERTERS[target](job, folder)
        versions = {name: version for name in TOOLS if (version := installed(name))}
        changes = {"precision": precision, "target": target, "source": bundle.digest}
        info = bundle.info.model_copy(update=changes | {"versions": bundle.info.versions | versions})
        made = Bundle(folder, write_info(folder, info))
        report |= measure(job, made, logits)
        if target == "trt":
            report["profile"] = shape_profile(info, rows.train, rows.longest(), rows.settings).model_dump()
            made = Bundle(folder, write_info(folder, info.model_copy(update={"optimization": report})))
            report |= build_plans(made, capabilities, progress)
        report |= {"calibrated_on": rows.source, "bytes_before": bundle.size, "bytes": made.size}
        write_info(folder, info.model_copy(update={"optimization": report}))
    return Bundle.read(output, verify=False)


def check(source: Path, output: Path, precision: str, target: str, max_rmse: float) -> None:
    """Raises UsageError for arguments that are wrong whatever the bundle."""
    if output.resolve() == source.resolve():
        raise UsageError(f"-o {output} is the bundle itself; optimize writes a new one")
    if output.exists():
        raise UsageError(f"{output} exists already; choose another -o or remove it")
    known = targets()
    check_known("target", target, known)
    if target not in CONVERTERS:
        why = f"--target {target} is an engine of another package, for which optimize has no converter"
        raise UsageError(f"{why}; optimize for a built-in target, or use the exported bundle")
    if precision not in known[target].optimized:
        raise UsageError(f"--target {target} supports {', '.join(known[target].optimized)}, not {precision}")
    if not max_rmse >= 0:
        raise UsageError(f"--max-rmse must be 0 or more, not {max_rmse}")


# Convert: what was done, and the new bundle's label logits where they are known ------------------------------------

Converted = tuple[Report, Float32 | None]


def to_checkpoint(job: Job, folder: Path) -> Converted:
    """PyTorch's weights in the target precision, without graphs."""
    shutil.copyfile(job.bundle.path / "tokenizer.json", folder / "tokenizer.json")
    convert_checkpoint(job.bundle.path, folder, job.precision)
    return {}, None


def to_graphs(job: Job, folder: Path) -> Converted:
    """Every stage in the target's format and precision; the report is summed over the stages."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(job.bundle.path / name, folder / name)
    if job.target != "openvino":  # runs on the CPU
        write_device_graphs(folder, job.bundle.info)
    if job.precision == "int8":
        return to_int8_graphs(job, folder)
    hinted = (job.target, job.precision) == ("openvino", "bf16")  # OpenVINO rounds when it compiles the fp32 graphs
    if hinted or job.precision == "fp32":
        return to_fp32_graphs(job, folder) | ({"bf16": openvino_bf16()} if hinted else {}), None
    return to_low_precision_graphs(job, folder), None


def to_fp32_graphs(job: Job, folder: Path) -> Report:
    """Every stage in fp32, fused for ONNX Runtime, whose graphs refer to the checkpoint's own tensors."""
    others = new_weights(job, folder)
    if job.target == "ort":  # a copy: runtimes refuse external data with several hard links
        shutil.copyfile(job.bundle.path / graph.CHECKPOINT, folder / graph.CHECKPOINT)
    operators: Counter[str] = Counter()
    for done, stage in enumerate(job.bundle.info.stages):
        job.tell(f"converting {stage}", done, len(job.bundle.info.stages))
        file = job.bundle.path / f"{stage}.onnx"
        if job.target == "openvino":
            operators.update(save_openvino(file, folder, stage, others))
            continue
        model = ir.load(file)
        originals = transpose_weights(model)
        model, fused = fuse(model, job.target)
        if job.target == "ort":
            transpose_in_matmuls(model, originals)
        graph.save_stage(model, folder, stage, None, others)
        operators.update(fused)
        operators.update(tensorrt_operators(job, model.graph))
    return {"fused" if job.target == "ort" else "operators": dict(operators)}


def to_low_precision_graphs(job: Job, folder: Path) -> Report:
    """Every stage in fp16, bf16 or int4."""
    bundle, others = job.bundle, new_weights(job, folder)
    half = job.precision in TYPES
    rows = job.batch.rows(slice(0, CALIBRATION_ROWS))
    stages = stage_feeds(bundle, rows, job.prompts) if half else ((stage, []) for stage in bundle.info.stages)
    operators: Counter[str] = Counter()
    kept, quantized = list[str](), 0
    for done, (stage, feeds) in enumerate(stages):
        job.tell(f"converting {stage}", done, len(bundle.info.stages))
        with graph_on_disk(bundle.path / f"{stage}.onnx", job.target, folder) as (file, fused):
            model = onnx.load(str(file), load_external_data=False)
            if half:
                kept += [f"{stage}: {name}" for name in to_half(model, feeds, folder, TYPES[job.precision])]
            else:
                quantized += len(to_int4(model, job.target, folder))
            operators.update(fused)
            operators.update(tensorrt_operators(job, model.graph.node))
            operators.update(write_stage(job, model, folder, stage, others))
    report: Report = {"fused" if job.target == "ort" else "operators": dict(operators)}
    return report | ({"kept_fp32": kept} if half else {"quantized": quantized})


def new_weights(job: Job, folder: Path) -> graph.NewWeights:
    """The file of the weights that the checkpoint does not hold as the graphs take them."""
    return graph.NewWeights(folder / (OPENVINO_WEIGHTS if job.target == "openvino" else "weights.data"))


def tensorrt_operators(job: Job, nodes: Iterable[Any]) -> Counter[str]:
    """The count of the operators that matter for TensorRT, which does not say what it fused."""
    return Counter(node.op_type for node in nodes if job.target == "trt" and node.op_type in OPERATORS)


def to_int8_graphs(job: Job, folder: Path) -> tuple[Report, Float32]:
    """Every stage in int8; with the weights in fp32 that the limit on the logits' error asks for, if it does."""
    made = Bundle(folder, job.bundle.info.model_copy(update={"precision": "int8", "target": job.target}))
    ranked, kept = list[tuple[str, float]](), 0
    with ExitStack() as files:
        rows = job.batch.rows(slice(0, CALIBRATION_ROWS))
        stages = calibrate(files, job.bundle, job.target, rows, job.prompts, folder, job.tell)
        weights = frequent(stages)
        while True:
            fallback = {weight for weight, _ in ranked[:kept]}
            report = write_int8(job, stages, weights.keys() - fallback, folder)
            logits = run_stages(made, job.batch, job.prompts)
            found = relative_rmse(logits, job.reference)
            if not found > job.max_rmse:
                break
            if not ranked:
                job.tell("measuring the sensitivity of matmuls", 0, 1)
                ranked = by_sensitivity(make_switchable(stages, weights, folder), weights)
            if kept == len(ranked):
                break
            kept = keep_more(ranked, kept, (job.max_rmse / found) ** 2)
    uses = sorted((stage.name, name) for stage in stages for name, use in stage.uses.items() if use.weight in fallback)
    return report | {"fp32_fallback": [f"{stage}: {name}" for stage, name in uses]}, logits


def write_stage(job: Job, model: onnx.ModelProto, folder: Path, stage: str, others: graph.NewWeights) -> dict[str, int]:
    """Write a graph in the target's format; returns the count of each operator, where that is of interest."""
    if job.target == "openvino":
        with temporary_graph(model, folder) as file:
            return save_openvino(file, folder, stage, others)
    graph.save_stage(graph.from_proto(model, folder), folder, stage, None, others)
    return {}


def write_int8(job: Job, stages: list[CalibratedStage], weights: Collection[str], folder: Path) -> Report:
    """Write every stage with these weights in int8. Returns what was done, summed over the stages."""
    others = new_weights(job, folder)
    others.file.unlink(missing_ok=True)
    operators: Counter[str] = Counter()
    quantized, kept = 0, list[str]()
    in_fp32 = in_all = 0
    for done, stage in enumerate(stages):
        job.tell(f"converting {stage.name}", done, len(stages))
        model, made, exact = to_int8(stage, weights)
        quantized, kept = quantized + len(made), kept + [f"{stage.name}: {name}" for name in exact]
        in_fp32 += sum(math.prod(stage.uses[name].work) for name in exact)
        in_all += sum(math.prod(use.work) for use in stage.uses.values())
        operators.update(stage.fused)
        operators.update(write_stage(job, model, folder, stage.name, others))
    report: Report = {"fused" if job.target == "ort" else "operators": dict(operators)}
    return report | {"kept_fp32": kept, "quantized": quantized, "fp32_share": in_fp32 / max(1, in_all)}


CONVERTERS = {"torch": to_checkpoint, "ort": to_graphs, "openvino": to_graphs, "trt": to_graphs}


# Measure -----------------------------------------------------------------------------------------------------


def measure(job: Job, made: Bundle, logits: Float32 | None) -> Report:
    """Fidelity to the source's logits on the job's rows, and the effect of more padding.

    logits: of the new bundle, where they are known already.
    Raises ExportError for logits that are not finite, and when padding changes them by more than `LEAK`.
    """
    with tempfile.TemporaryDirectory(prefix=".emulated.", dir=made.path) as folder:
        if (job.target, job.precision) == ("trt", "bf16"):
            made = emulate_bf16(made, Path(folder))
        label_logits = reference_logits if job.target == "torch" else run_stages
        logits = label_logits(made, job.batch, job.prompts) if logits is None else logits
        if not np.isfinite(logits).all():
            raise ExportError(f"the {job.precision} bundle has NaN or infinite logits on real rows")
        shortest = np.argsort(lengths(job.batch), kind="stable")[:8]  # which have room for padding, if any have
        rows = job.batch.rows(shortest)
        width = min(int(lengths(rows).max()) + 16, made.info.max_length)
        padded = rows.padded(width, made.info.special.pad)
        leak = scaled_error(label_logits(made, padded, job.prompts), logits[:, shortest])
    if leak > LEAK:
        raise ExportError(f"padding changes the logits by {leak:.1%}: the attention mask was lost")
    counts = {"rows": len(job.batch), "candidates": len(job.prompts)}
    return {**fidelity(logits, job.reference), "padding_error": leak, **counts}
