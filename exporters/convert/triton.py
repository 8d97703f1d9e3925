"""A bundle as a Triton Inference Server model repository: a model with weights and config.pbtxt for
each stage.

Layout: Triton's user guide, model repository; config.pbtxt is a ModelConfig of its
model_config.proto.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.inference_protocol import bundle_facts, stage_model
from bbt_accel.errors import BbtError, BundleError, UsageError, translated
from bbt_accel.exporters.trace.graph import SMALL, from_proto
from bbt_accel.io.files import new_folder
from bbt_accel.io.manifests import PLANS

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
"""Of a stage's inputs and outputs, which stay fp32 in every precision."""
BACKENDS = {
    "onnx": "onnxruntime",
    "ort": "onnxruntime",
    "trt": "tensorrt",
}  # a bundle's target → its backend


def write_repository(bundle: Bundle, folder: str | Path, name: str | None = None) -> list[str]:
    """Write the models of a bundle into a new or existing repository; returns their names.

    name: of the model, by default the bundle's folder; the stage is appended where there are
    several. Each model holds only the weights that its graph uses. Raises BundleError for a bundle
    that no backend runs, UsageError for an invalid name, BbtError for models that exist already.
    """
    folder, name = Path(folder), name or bundle.path.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(
            f"{name!r} is not a valid Triton model name; give one of letters and digits with --name"
        )
    if bundle.info.target not in BACKENDS:
        made = f"{bundle.path} is optimized for {bundle.info.target}"
        raise BundleError(f"{made}; Triton takes bundles as exported or optimized for ort or trt")
    if folder.resolve().is_relative_to(bundle.path.resolve()):
        raise UsageError(
            f"the repository {folder} is inside the bundle itself; choose another folder"
        )
    models = {stage: stage_model(name, stage) for stage in bundle.info.stages}
    there = [folder / model for model in models.values() if (folder / model).exists()]
    others = (
        there
        if len(there) == len(models)
        else [model for model in there if not made_of(bundle, model)]
    )
    if others:
        raise BbtError(f"{others[0]} exists already; remove it, or give another --name")
    # Some, of this bundle: a call that was killed between two models is continued.
    for stage, model in (
        (stage, model) for stage, model in models.items() if folder / model not in there
    ):
        damaged = translated(BundleError, f"{bundle.path} cannot be written for Triton")
        with new_folder(folder / model) as target, damaged:
            write_model(bundle, stage, model, target)
    return list(models.values())


def made_of(bundle: Bundle, model: Path) -> bool:
    """Whether a model of a repository is one of this bundle's stages."""
    file = model / "config.pbtxt"
    return file.is_file() and bundle.digest in file.read_text(encoding="utf-8", errors="replace")


def write_model(bundle: Bundle, stage: str, name: str, target: Path) -> None:
    """Write config.pbtxt and version 1: model.onnx with its weights, or a plan per compute
    capability.
    """
    backend = BACKENDS[bundle.info.target]
    graph = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False)
    found = plans(bundle, stage) if backend == "tensorrt" else {}
    lines = config(graph.graph, name, backend, bundle_facts(bundle))
    lines += [f'cc_model_filenames {{ key: "{cc}" value: "sm{cc}.plan" }}' for cc in found]
    (target / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "1").mkdir()
    for capability, plan in found.items():
        shutil.copyfile(plan, target / "1" / f"sm{capability}.plan")
    if found:
        return
    # A model of more than one file is a folder of that name (Triton's user guide, "ONNX Models").
    files = target / "1" / "model.onnx"
    files.mkdir()
    model = from_proto(graph, bundle.path)
    ir.save(model, files / "model.onnx", external_data="weights.data", size_threshold_bytes=SMALL)


def plans(bundle: Bundle, stage: str) -> dict[str, Path]:
    """Compute capability → plan of a stage. Raises BundleError when the bundle has none that Triton
    can load.
    """
    found: dict[str, Path] = {}
    for file in sorted(bundle.path.glob(f"{PLANS}/*/{stage}.json")):
        key = json.loads(file.read_text(encoding="utf-8"))["key"]
        if (
            key["runtime"].split()[0] == "tensorrt"
        ):  # Triton's backend is TensorRT's own, not that for RTX
            found |= dict.fromkeys(key["capability"], file.with_suffix(".plan"))
    if not found:
        why = f"{bundle.path} has no plan of {stage} that Triton can load; optimize it for trt on the GPU itself"
        raise BundleError(
            f"{why}, with the package tensorrt (Triton cannot load plans of TensorRT for RTX)"
        )
    return found


def config(
    graph: onnx.GraphProto,
    name: str,
    backend: str,
    parameters: Mapping[str, str],
    batch: int = 0,
    label_file: str | None = None,
) -> list[str]:
    """The lines of config.pbtxt.

    batch: rows that Triton may put into one call, those of several requests too; the first axis of
    every tensor is theirs. 0 for a black box, whose rows and candidates are separate axes.
    label_file: a name of each class a line, for Triton's classification extension.
    """
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[backend]
    lines = [f"name: {json.dumps(name)}", f'platform: "{platform}"', f'backend: "{backend}"']
    lines += [f"max_batch_size: {batch}", *(["dynamic_batching { }"] if batch else [])]
    labels = f' label_filename: "{label_file}"' if label_file else ""
    lines += [
        *tensors("input", graph.input, batch),
        *tensors("output", graph.output, batch, labels),
    ]
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}')
    return lines


def tensors(
    kind: str, values: Iterable[onnx.ValueInfoProto], batch: int, more: str = ""
) -> Iterator[str]:
    for value in values:
        tensor = value.type.tensor_type
        sizes = (
            tensor.shape.dim[1:] if batch else tensor.shape.dim
        )  # Triton adds the axis of a batch itself
        dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in sizes)
        yield f'{kind} {{ name: "{value.name}" data_type: {TYPES[tensor.elem_type]} dims: [ {dims} ]{more} }}'
