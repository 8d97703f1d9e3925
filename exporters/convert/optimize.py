"""From an exported bundle to one for a single engine: fused operators, fp16, bf16, int8, int4,
TensorRT plans.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import onnx

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import INITIAL_PROMPT, Bundle, write_info
from bbt_accel.core.comparison import (
    CONVERSION,
    PADDING,
    fidelity,
    relative_rmse,
    scaled_error,
)
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, Precision, targets
from bbt_accel.core.option_types import MAX_RMSE, check_threads
from bbt_accel.errors import (
    BundleError,
    ExportError,
    UsageError,
    check_known,
    first_line,
    translated,
)
from bbt_accel.exporters.convert.calibration import (
    Calibration,
    calibration_prompts,
    lengths,
    stage_feeds,
)
from bbt_accel.exporters.convert.converters import Converted, Converter, OptimizeJob, Report
from bbt_accel.exporters.convert.formats import graph_on_disk
from bbt_accel.exporters.convert.half import TYPES, to_half
from bbt_accel.exporters.convert.int4 import to_int4
from bbt_accel.exporters.convert.int8 import to_int8
from bbt_accel.exporters.convert.int8_calibration import CalibratedStage, calibrate, frequent
from bbt_accel.exporters.convert.sensitivity import by_sensitivity, keep_more, make_switchable
from bbt_accel.exporters.trace import graph
from bbt_accel.exporters.trace.device_graphs import write_device_graphs
from bbt_accel.exporters.trace.sessions import limited_threads
from bbt_accel.io.files import new_folder, require_new
from bbt_accel.io.machine import installed
from bbt_accel.io.progress import Tell, silent

CALIBRATION_ROWS = (
    16  # rows, times the prompts of `calibration_prompts`, that activation ranges are read from
)
TOOLS = ("onnxruntime", "onnxruntime-gpu", "onnxscript", "torch")
"""Distributions that conversions use, besides those of the engine."""


def optimize_bundle(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "fp32",
    target: str = DEFAULT_ENGINE,
    calibration: Callable[[Bundle], Calibration] = Calibration.shipped,
    max_rmse: float = MAX_RMSE,
    compute_capability: str | None = None,
    threads: int | None = None,
    on_progress: Tell = silent,
) -> Bundle:
    """Write a new bundle for one engine, with a report of what was converted, its size and its
    fidelity.

    calibration: makes the rows that set int8 ranges and TensorRT's shape profile, and serve to
    measure fidelity, e.g. `search.calibration.calibrate_on("sst2")`; the shipped texts unless
    given. max_rmse: int8 keeps matmuls in fp32 until the relative logit RMSE is at most this.
    compute_capability: build TensorRT plans ahead of time for these (8.9, or 8.6,8.9) instead of
    this machine's GPU. threads: of the CPU; all cores unless given.
    on_progress: as in `export_bundle`.
    Raises UsageError for a combination that does not exist or an output that is the source,
    BundleError for a source that is optimized already, ExportError for NaN logits or a lost
    attention mask, PlanError when TensorRT rejects the graph, EngineError when it needs a GPU that
    is missing, MissingDependency for a library of the target.
    """
    source, output = Path(source), Path(output)
    check(source, output, precision, target, max_rmse)
    check_threads(threads)
    spec = targets()[target]
    converter: Converter = resolve_name(spec.converter)(spec)
    converter.prepare(compute_capability)
    bundle = Bundle.read(source)
    if bundle.info.target != "onnx":
        problem = f"{source} is optimized already ({bundle.info.precision}, {bundle.info.target})"
        raise BundleError(f"{problem}; optimize the bundle that export wrote")
    rows = calibration(bundle)
    refused = translated(BundleError, f"{source} cannot be optimized")
    with (
        new_folder(output) as folder,
        limited_threads(threads),
        without_links(bundle) as bundle,
        refused,
    ):
        batch, prompts = rows.batch(bundle.info), calibration_prompts(bundle)
        job = OptimizeJob(bundle, converter, precision, batch, prompts, max_rmse, on_progress)
        if (bundle.path / INITIAL_PROMPT).exists():
            shutil.copyfile(bundle.path / INITIAL_PROMPT, folder / INITIAL_PROMPT)
        report, logits = converter.convert(job, folder) or to_graphs(job, folder)
        used = (*spec.packages, *TOOLS)
        versions = {name: version for name in used if (version := installed(name))}
        changes = {"precision": precision, "target": target, "source": bundle.digest}
        info = bundle.info.model_copy(
            update=changes | {"versions": bundle.info.versions | versions}
        )
        made = Bundle(folder, write_info(folder, info))
        measured = measure(job, made, logits)
        report |= measured
        report |= converter.finish(made, rows, on_progress)
        report |= {"calibrated_on": rows.source, "bytes_before": bundle.size, "bytes": made.size}
        error = (info.max_error or 0) + measured["logit_error"]
        write_info(folder, info.model_copy(update={"optimization": report, "max_error": error}))
    return Bundle.read(output, verify=False)


@contextmanager
def without_links(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, or a temporary copy of one whose files are links, as in the hub's cache:
    converters follow none.
    """
    if not any(file.is_symlink() for file in bundle.path.rglob("*")):
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as folder:
        try:
            shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
        except OSError as error:
            why = f"{first_line(error):.200}"
            raise ExportError(
                f"cannot copy {bundle.path}, whose files are links ({why}); "
                "set TMPDIR to a folder with room for it"
            ) from None
        yield Bundle(Path(folder), bundle.info)


def check(source: Path, output: Path, precision: str, target: str, max_rmse: float) -> None:
    """Raises UsageError for arguments that are wrong whatever the bundle, BbtError for an output
    that exists.
    """
    if output.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"-o {output} is the bundle itself, or in its folder; choose one beside it"
        )
    require_new(output)
    known = targets()
    check_known("target", target, known)
    if precision not in known[target].optimized:
        raise UsageError(
            f"--target {target} supports {', '.join(known[target].optimized)}, not {precision}"
        )
    if not max_rmse >= 0:
        raise UsageError(f"max_rmse must be 0 or more, not {max_rmse}")


# Convert: what was done, and the new bundle's label logits where they are known


def to_graphs(job: OptimizeJob, folder: Path) -> Converted:
    """Every stage in the target's format and precision; the report is summed over the stages."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(job.bundle.path / name, folder / name)
    if "cuda" in job.converter.spec.backends:
        write_device_graphs(folder, job.bundle.info)
    if job.precision == "int8":
        return to_int8_graphs(job, folder)
    if job.precision in job.converter.fp32_graphs:
        return to_fp32_graphs(job, folder), None
    return to_low_precision_graphs(job, folder), None


def to_fp32_graphs(job: OptimizeJob, folder: Path) -> Report:
    """Every stage in fp32."""
    others = new_weights(job, folder)
    operators: Counter[str] = Counter()
    for done, stage in enumerate(job.bundle.info.stages):
        job.tell(f"converting {stage}", done, len(job.bundle.info.stages))
        operators.update(
            job.converter.write_fp32(job.bundle.path / f"{stage}.onnx", folder, stage, others)
        )
    return {job.converter.counts: dict(operators)}


def to_low_precision_graphs(job: OptimizeJob, folder: Path) -> Report:
    """Every stage in fp16, bf16 or int4."""
    bundle, others = job.bundle, new_weights(job, folder)
    half = job.precision in TYPES
    rows = job.batch.rows(slice(0, CALIBRATION_ROWS))
    stages = (
        stage_feeds(bundle, rows, job.prompts)
        if half
        else ((stage, []) for stage in bundle.info.stages)
    )
    operators: Counter[str] = Counter()
    kept, quantized = list[str](), 0
    for done, (stage, feeds) in enumerate(stages):
        job.tell(f"converting {stage}", done, len(bundle.info.stages))
        with graph_on_disk(bundle.path / f"{stage}.onnx", job.converter.fuse, folder) as (
            file,
            fused,
        ):
            model = onnx.load(str(file), load_external_data=False)
            if half:
                kept += [
                    f"{stage}: {name}"
                    for name in to_half(model, feeds, folder, TYPES[job.precision])
                ]
            else:
                quantized += len(to_int4(model, job.converter.matmul_nbits, folder))
            operators.update(fused)
            operators.update(job.converter.write(model, folder, stage, others))
    report: Report = {job.converter.counts: dict(operators)}
    return report | ({"kept_fp32": kept} if half else {"quantized": quantized})


def new_weights(job: OptimizeJob, folder: Path) -> graph.NewWeights:
    """The file of the weights that the checkpoint does not hold as the graphs take them."""
    return graph.NewWeights(folder / job.converter.weights)


def to_int8_graphs(job: OptimizeJob, folder: Path) -> tuple[Report, Float32]:
    """Every stage in int8; with the weights in fp32 that the limit on the logits' error asks for,
    if it does.
    """
    made = Bundle(
        folder,
        job.bundle.info.model_copy(update={"precision": "int8", "target": job.converter.name}),
    )
    ranked, kept = list[tuple[str, float]](), 0
    with ExitStack() as files:
        rows = job.batch.rows(slice(0, CALIBRATION_ROWS))
        stages = calibrate(
            files, job.bundle, job.converter.fuse, rows, job.prompts, folder, job.tell
        )
        weights = frequent(stages)
        while True:
            fallback = {weight for weight, _ in ranked[:kept]}
            report = write_int8(job, stages, weights.keys() - fallback, folder)
            logits = job.converter.label_logits(made, job.batch, job.prompts)
            found = relative_rmse(logits, job.reference)
            if not found > job.max_rmse:
                break
            if not ranked:
                job.tell("measuring the sensitivity of matmuls", 0, 1)
                ranked = by_sensitivity(make_switchable(stages, weights, folder), weights)
            if kept == len(ranked):
                break
            kept = keep_more(ranked, kept, (job.max_rmse / found) ** 2)
    uses = sorted(
        (stage.name, name)
        for stage in stages
        for name, use in stage.uses.items()
        if use.weight in fallback
    )
    return report | {"fp32_fallback": [f"{stage}: {name}" for stage, name in uses]}, logits


def write_int8(
    job: OptimizeJob, stages: list[CalibratedStage], weights: Collection[str], folder: Path
) -> Report:
    """Write every stage with these weights in int8. Returns what was done, summed over the
    stages.
    """
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
        operators.update(job.converter.write(model, folder, stage.name, others))
    report: Report = {job.converter.counts: dict(operators)}
    return report | {
        "kept_fp32": kept,
        "quantized": quantized,
        "fp32_share": in_fp32 / max(1, in_all),
    }


# Measure


def measure(job: OptimizeJob, made: Bundle, logits: Float32 | None) -> dict[str, float]:
    """Fidelity to the source's logits on the job's rows, and the effect of more padding.

    logits: of the new bundle, where they are known already.
    Raises ExportError for logits that are not finite, when padding changes them by more than
    `PADDING`, and in fp32 when they differ from the source's by more than `CONVERSION`.
    """
    with tempfile.TemporaryDirectory(prefix=".emulated.", dir=made.path) as folder:
        made, label_logits = job.converter.emulated(made, Path(folder)), job.converter.label_logits
        logits = label_logits(made, job.batch, job.prompts) if logits is None else logits
        if not np.isfinite(logits).all():
            problem = f"the {job.precision} bundle has NaN or infinite logits on real rows"
            raise ExportError(f"{problem}; choose another precision")
        shortest = np.argsort(lengths(job.batch), kind="stable")[
            :8
        ]  # which have room for padding, if any have
        rows = job.batch.rows(shortest)
        padded = rows.padded(padded_length(rows, made.info.max_length), made.info.special.pad)
        leak = scaled_error(label_logits(made, padded, job.prompts), logits[:, shortest])
    if job.precision == "fp32" and not (error := scaled_error(logits, job.reference)) <= CONVERSION:
        raise ExportError(
            f"the fp32 bundle's logits differ by {error:.1e} from those of its source; use that"
        )
    if not leak <= PADDING:  # NaN, too
        raise ExportError(f"padding changes the logits by {leak:.1%}: the attention mask was lost")
    counts = {"rows": len(job.batch), "candidates": len(job.prompts)}
    return {**fidelity(logits, job.reference), "padding_error": leak, **counts}


def padded_length(rows: Batch, limit: int) -> int:
    """16 columns more than the longest row has, if the backbone has so many; a context takes some
    of them.
    """
    context = 0 if rows.context_ids is None else len(rows.context_ids)
    return min(int(lengths(rows).max()) + 16, limit - context)
