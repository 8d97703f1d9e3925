"""From an exported bundle to a faster one for a single engine: fused operators, fp16, bf16, int8, TensorRT plans."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle, write_info
from bbt_accel.engine_specs import Precision, targets
from bbt_accel.errors import BundleError, ExportError, UsageError, check_known
from bbt_accel.exporters import graph
from bbt_accel.exporters.calibration import TaskRows, random_prompts, stage_feeds
from bbt_accel.exporters.convert import convert_checkpoint, openvino_bf16, read_graph, save_openvino
from bbt_accel.exporters.device import write_device_graphs
from bbt_accel.exporters.fidelity import fidelity, scaled_error
from bbt_accel.exporters.half import TYPES, emulate_bf16, to_half
from bbt_accel.exporters.int8 import to_int8
from bbt_accel.exporters.precision import Matmul, select_fp32
from bbt_accel.exporters.sessions import Feeds, run_stages
from bbt_accel.exporters.tensorrt import OPERATORS, build_plans, check_capabilities, shape_profile
from bbt_accel.exporters.validate import reference_logits
from bbt_accel.files import new_folder
from bbt_accel.machine import installed
from bbt_accel.progress import Tell, silent

CALIBRATION_ROWS = 16
"""Rows, times the prompts of `random_prompts`, that activation ranges are read from."""
MAX_RMSE = 0.05
"""Relative logit RMSE of int8 above which matmuls are kept in fp32."""
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
    progress: Tell = silent,
) -> Bundle:
    """Write a new bundle for one engine, with a report of what was converted, its size and its fidelity.

    calibrate: the task whose few-shot train rows set int8 ranges and serve to measure fidelity, and whose rows and
    preset set TensorRT's shape profile; without it the shipped texts. max_rmse: int8 keeps matmuls in fp32 until the
    relative logit RMSE is at most this. compute_capability: build TensorRT plans ahead of time for these (8.9, or
    8.6,8.9) instead of this machine's GPU.
    Raises UsageError for a combination that does not exist or an output that is the source, BundleError for a source
    that is optimized already, ExportError for NaN logits or a lost attention mask, PlanError when TensorRT rejects the
    graph, EngineError when it needs a GPU that is missing.
    """
    source, output = Path(source), Path(output)
    check(source, output, precision, target, max_rmse)
    capabilities = check_capabilities(compute_capability, target)
    bundle = Bundle.read(source)
    if bundle.info.target != "onnx":
        raise BundleError(f"{source} is optimized already ({bundle.info.precision}, {bundle.info.target})")
    rows = TaskRows(bundle, calibrate, data)
    job = Job(bundle, target, precision, rows.calibration(), random_prompts(bundle), max_rmse, progress)
    with new_folder(output) as folder:
        report = CONVERTERS[target](job, folder)
        versions = {name: version for name in TOOLS if (version := installed(name))}
        changes = {"precision": precision, "target": target, "source": bundle.digest}
        info = bundle.info.model_copy(update=changes | {"versions": bundle.info.versions | versions})
        made = Bundle(folder, write_info(folder, info))
        report |= measure(job, made)
        if target == "trt":
            report["profile"] = shape_profile(info, rows.train, rows.longest(), rows.settings).model_dump()
            made = Bundle(folder, write_info(folder, info.model_copy(update={"optimization": report})))
            report |= build_plans(made, capabilities, progress)
        report |= {"calibrated_on": calibrate or "shipped texts", "bytes_before": bundle.size, "bytes": made.size}
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
        raise UsageError(
            f"--target {target} is an engine of another package, for which optimize has no converter; "
            "optimize for a built-in target, or use the exported bundle"
        )
    if precision not in known[target].optimized:
        raise UsageError(f"--target {target} supports {', '.join(known[target].optimized)}, not {precision}")
    if not max_rmse >= 0:
        raise UsageError(f"--max-rmse must be 0 or more, not {max_rmse}")


# Convert -----------------------------------------------------------------------------------------------------


def to_checkpoint(job: Job, folder: Path) -> Report:
    """PyTorch's weights in the target precision, without graphs."""
    shutil.copyfile(job.bundle.path / "tokenizer.json", folder / "tokenizer.json")
    convert_checkpoint(job.bundle.path, folder, job.precision)
    return {}


def to_graphs(job: Job, folder: Path) -> Report:
    """Every stage in the target's format and precision. Returns what was done, summed over the stages."""
    # The checkpoint's own tensors serve fused fp32 graphs alone; other graphs have their own.
    shared = (job.target, job.precision) == ("ort", "fp32")
    for name in ("config.json", "tokenizer.json", *(["model.safetensors"] if shared else [])):
        shutil.copyfile(job.bundle.path / name, folder / name)
    if job.target != "openvino":  # runs on the CPU
        write_device_graphs(folder, job.bundle.info)
    checkpoint = graph.SharedWeights(folder / "model.safetensors") if shared else None
    others = graph.NewWeights(folder / "weights.data")
    hinted = (job.target, job.precision) == ("openvino", "bf16")  # OpenVINO rounds when it compiles the fp32 graphs
    precise = PrecisionConverter(job, folder, "fp32" if hinted else job.precision)
    operators: Counter[str] = Counter()
    for done, (stage, feeds) in enumerate(precise.stages()):
        job.tell(f"converting {stage}", done, len(job.bundle.info.stages))
        model, fused = read_graph(job.bundle.path / f"{stage}.onnx", job.target)
        operators.update(fused)
        model = precise.convert(model, stage, feeds)
        if job.target == "openvino":
            operators.update(save_openvino(model, folder, stage))
            continue
        if job.target == "trt":
            operators.update(node.op_type for node in model.graph.node if node.op_type in OPERATORS)
        graph.save_stage(model, folder, stage, checkpoint, others)
    report: Report = {"fused" if job.target == "ort" else "operators": dict(operators)} | precise.report()
    return report | ({"bf16": openvino_bf16()} if hinted else {})


CONVERTERS: dict[str, Callable[[Job, Path], Report]] = {
    "torch": to_checkpoint,
    "ort": to_graphs,
    "openvino": to_graphs,
    "trt": to_graphs,
}


class PrecisionConverter:
    """Converts the graphs of a bundle, stage by stage, to one precision."""

    def __init__(self, job: Job, folder: Path, precision: Precision) -> None:
        self.job, self.folder, self.precision = job, folder, precision
        self.rows = job.batch.rows(slice(0, CALIBRATION_ROWS))
        self.quantized = 0
        self.kept: list[str] = []
        self.fallback: set[Matmul] = set()
        if precision == "int8":
            job.tell("measuring the sensitivity of matmuls", 0, 1)
            self.fallback = select_fp32(job.bundle, job.target, self.rows, job.prompts, job.max_rmse, folder)

    def stages(self) -> Iterable[tuple[str, list[Feeds]]]:
        """Every stage with the inputs that it is calibrated on; none for fp32."""
        if self.precision == "fp32":
            return ((stage, []) for stage in self.job.bundle.info.stages)
        return stage_feeds(self.job.bundle, self.rows, self.job.prompts, rows=4)

    def convert(self, model: onnx.ModelProto, stage: str, feeds: list[Feeds]) -> onnx.ModelProto:
        kept: list[str] = []
        if self.precision in TYPES:
            model, kept = to_half(model, feeds, self.folder, TYPES[self.precision])
        elif self.precision == "int8":
            made = to_int8(model, feeds, self.folder, keep={name for where, name in self.fallback if where == stage})
            model, kept = made.model, made.kept
            self.quantized += len(made.quantized)
        self.kept += [f"{stage}: {name}" for name in kept]
        return model

    def report(self) -> Report:
        """Counts and names of what was quantized, and of what stays in fp32."""
        found: Report = {} if self.precision == "fp32" else {"kept_fp32": self.kept}
        if self.precision == "int8":
            fallback = [f"{stage}: {name}" for stage, name in sorted(self.fallback)]
            found |= {"quantized": self.quantized, "fp32_fallback": fallback}
        return found


# Measure -----------------------------------------------------------------------------------------------------


def measure(job: Job, made: Bundle) -> Report:
    """Fidelity to the source's logits on the job's rows, and the effect of more padding.

    Raises ExportError for logits that are not finite, and when padding changes them by more than `LEAK`.
    """
    with tempfile.TemporaryDirectory(prefix=".emulated.", dir=made.path.parent) as folder:
        if (job.target, job.precision) == ("trt", "bf16"):
            made = emulate_bf16(made, Path(folder))
        logits = label_logits(made, job.batch, job.prompts)
        if not np.isfinite(logits).all():
            raise ExportError(f"the {job.precision} bundle has NaN or infinite logits on real rows")
        rows = job.batch.rows(slice(0, 8))
        padded = rows.padded(rows.input_ids.shape[1] + 16, made.info.special.pad)
        leak = scaled_error(label_logits(made, padded, job.prompts), logits[:, :8])
    if leak > LEAK:
        raise ExportError(f"padding changes the logits by {leak:.1%}: the attention mask was lost")
    return {
        **fidelity(logits, run_stages(job.bundle, job.batch, job.prompts)),
        "padding_error": leak,
        "rows": len(job.batch),
        "candidates": len(job.prompts),
    }


def label_logits(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of an optimized bundle on the CPU."""
    if bundle.info.target == "torch":
        return reference_logits(bundle, batch, prompts)
    return run_stages(bundle, batch, prompts)
