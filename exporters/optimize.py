"""From an exported bundle to a faster one: fused operators, fp16, int8, TensorRT plans, for one engine."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle, BundleInfo, new_folder, write_info
from bbt_accel.errors import BundleError, ExportError, UsageError
from bbt_accel.exporters import graph
from bbt_accel.exporters.calibration import calibration_rows, random_prompts, stage_feeds
from bbt_accel.exporters.device import write_device_graphs
from bbt_accel.exporters.half import TYPES, to_half
from bbt_accel.exporters.int8 import to_int8
from bbt_accel.exporters.openvino import save_openvino
from bbt_accel.exporters.precision import choose_fp32, logit_noise
from bbt_accel.exporters.prepare import prepare
from bbt_accel.exporters.sessions import Feeds, run_stages
from bbt_accel.exporters.tensorrt import OPERATORS, build_plans, machine, rounded, sizes_of
from bbt_accel.exporters.trt_api import find_api
from bbt_accel.exporters.validate import scaled_error

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Target = Literal["ort", "openvino", "trt"]
CALIBRATION_ROWS = 16
"""Rows, times the prompts of `random_prompts`, that ranges are read from."""
MAX_NOISE = 0.05
"""Error of int8's label logits, relative to their spread, above which products are kept in fp32."""
LEAK = 0.05
"""A row's logits may change by this share of the largest logit when padding is added; more means a lost mask."""


def optimize_bundle(
    source: str | Path,
    output: str | Path,
    *,
    precision: Precision = "fp32",
    target: Target = "ort",
    calibrate: str | None = None,
    data: Path | None = None,
    max_noise: float = MAX_NOISE,
    compute_capability: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Write a new bundle for one engine and report what was fused, how large it is and what it costs in accuracy.

    calibrate: the task whose few-shot train rows set int8 ranges and are compared on, and whose rows and population set
    TensorRT's profiles; the shipped texts unless given. compute_capability: build TensorRT plans ahead of time for
    these (8.9, or 8.6,8.9), not for this machine's GPU. max_noise: int8 keeps products in fp32 until the logits' error
    is at most this share of their spread. progress: called with what is done, and how many of how many
    steps.
    Raises UsageError for a combination that does not exist or an output that is the source, BundleError for a source
    that is optimized already, ExportError when the result has NaN logits or has lost its attention mask, PlanError when
    TensorRT refuses the graph, EngineError when it needs a GPU that is not there.
    """
    source, output = Path(source), Path(output)
    if output.resolve() == source.resolve():
        raise UsageError(f"-o {output} is the bundle itself; optimize writes a new one")
    if output.exists():
        raise UsageError(f"{output} exists already; choose another -o or remove it")
    check_combination(precision, target)
    if not max_noise >= 0:
        raise UsageError(f"--max-noise must be 0 or more, not {max_noise}")
    tell = progress or (lambda what, done, of: None)
    capabilities = check_capabilities(compute_capability, target)
    bundle = Bundle.read(source)
    if bundle.info.target != "onnx":
        raise BundleError(f"{source} is optimized already ({bundle.info.precision}, {bundle.info.target})")
    batch = calibration_rows(bundle, calibrate, data)
    prompts = random_prompts(bundle)
    with new_folder(output) as folder:
        # The checkpoint's own tensors serve fused graphs in fp32 alone; all others keep theirs elsewhere.
        weights = ["model.safetensors"] if (precision, target) == ("fp32", "ort") else []
        for name in ("config.json", "tokenizer.json", *weights):
            shutil.copyfile(source / name, folder / name)
        if target != "openvino":  # which runs on the CPU
            write_device_graphs(folder, bundle.info)
        report = lower(bundle, folder, target, precision, batch, prompts, max_noise)
        if target == "trt":
            report["profile"] = sizes_of(bundle, calibrate, data).model_dump()
        info = bundle.info.model_copy(
            update={
                "precision": precision,
                "target": target,
                "source": bundle.digest,
                "versions": bundle.info.versions | tool_versions(),
            }
        )
        info = write_info(folder, info)
        made = Bundle(folder, info)
        report |= compare(bundle, made, batch, prompts)
        if target == "trt":
            made = Bundle(folder, write_info(folder, info.model_copy(update={"optimization": report})))
            report |= build_plans(made, capabilities, tell)
        report |= {"calibrated_on": calibrate or "shipped texts", "bytes_before": bundle.size, "bytes": made.size}
        write_info(folder, info.model_copy(update={"optimization": report}))
    return Bundle.read(output, verify=False)


ALLOWED: dict[str, tuple[str, ...]] = {
    "ort": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "int8"),
    "trt": ("fp32", "fp16", "bf16"),
}


def check_combination(precision: str, target: str) -> None:
    if precision not in ALLOWED[target]:
        raise UsageError(f"--target {target} takes {', '.join(ALLOWED[target])}, not {precision}")


def check_capabilities(text: str | None, target: str) -> tuple[str, ...]:
    """`8.6,8.9` as a tuple; empty for the GPU of this machine, which has to be there. The rest takes minutes."""
    if text is None:
        if target == "trt":
            find_api()
            machine()
        return ()
    if target != "trt":
        raise UsageError(f"--compute-capability is for --target trt, not {target}")
    api = find_api(ahead=True)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        api.capability(name)
    return names


def lower(
    bundle: Bundle, folder: Path, target: Target, precision: Precision, batch: Batch, prompts: Float32, max_noise: float
) -> dict[str, object]:
    """Write every stage for its engine and in its precision. Returns what was done, summed over the stages."""
    file = folder / "model.safetensors"
    checkpoint = graph.SharedWeights(file) if file.is_file() else None
    others = graph.NewWeights(folder / "weights.data")
    counted: Counter[str] = Counter()
    few = batch.rows(slice(0, CALIBRATION_ROWS))
    noisy = choose_fp32(bundle, target, few, prompts, max_noise, folder) if precision == "int8" else set()
    kept: list[str] = []
    quantized = 0
    seen: Iterable[tuple[str, list[Feeds]]] = ((stage, []) for stage in bundle.info.stages)
    if precision != "fp32":
        seen = stage_feeds(bundle, few, prompts, rows=4)
    for stage, feeds in seen:
        model, counts = prepare(bundle.path / f"{stage}.onnx", target)
        counted.update(counts)
        if precision in TYPES:
            model, names = to_half(model, feeds, folder, TYPES[precision])
            kept += [f"{stage}: {name}" for name in names]
        elif precision == "int8":
            made = to_int8(model, feeds, folder, keep={name for where, name in noisy if where == stage})
            model, quantized = made.model, quantized + len(made.products)
            kept += [f"{stage}: {name}" for name in made.kept]
        if target == "openvino":
            counted.update(save_openvino(model, folder, stage))
            continue
        if target == "trt":
            counted.update(node.op_type for node in model.graph.node if node.op_type in OPERATORS)
        graph.save_stage(model, folder, stage, checkpoint, others)
    report: dict[str, object] = {"fused" if target == "ort" else "operators": dict(counted)}
    if precision == "int8":
        report |= {"quantized": quantized, "noisy": [f"{stage}: {name}" for stage, name in sorted(noisy)]}
    if precision != "fp32":
        report["kept_fp32"] = kept
    return report


def compare(bundle: Bundle, optimized: Bundle, batch: Batch, prompts: Float32) -> dict[str, object]:
    """Logit error and agreement of predictions on real rows against the source, and whether padding changes a row."""
    if optimized.info.precision == "bf16":
        with tempfile.TemporaryDirectory(prefix=".rounded.", dir=optimized.path.parent) as folder:
            return compare_runs(bundle, rounded(optimized, Path(folder)), batch, prompts)
    return compare_runs(bundle, optimized, batch, prompts)


def compare_runs(bundle: Bundle, optimized: Bundle, batch: Batch, prompts: Float32) -> dict[str, object]:
    wanted, found = run_stages(bundle, batch, prompts), run_stages(optimized, batch, prompts)
    if not np.isfinite(found).all():
        raise ExportError(f"the {optimized.info.precision} graphs give NaN or infinite logits on real rows")
    few = batch.rows(slice(0, 8))
    leak = scaled_error(run_stages(optimized, pad_columns(optimized.info, few, 16), prompts), found[:, :8])
    if leak > LEAK:
        raise ExportError(f"padding changes the logits by {leak:.1%}: the attention mask was lost")
    return {
        "logit_error": scaled_error(found, wanted),
        "logit_noise": logit_noise(found, wanted),
        "agreement": float((wanted.argmax(-1) == found.argmax(-1)).mean()),
        "padding_error": leak,
        "rows": len(batch),
        "candidates": len(prompts),
    }


def pad_columns(info: BundleInfo, batch: Batch, columns: int) -> Batch:
    """The same rows with more padding on the right."""
    ids = np.pad(batch.input_ids, ((0, 0), (0, columns)), constant_values=info.special.pad)
    mask = np.pad(batch.attention_mask, ((0, 0), (0, columns)))
    return Batch(ids, mask, batch.readout, batch.targets, batch.label_token_ids, batch.decoder_input_ids)


def tool_versions() -> dict[str, str]:
    """Versions of what may have had a hand in it."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    names = ("onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx_cu13")
    return {name: found[name] for name in names if name in found}
