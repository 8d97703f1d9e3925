"""A bundle as a model repository of Triton Inference Server: for each stage a model, its weights and config.pbtxt.

Layout: Triton's user guide, model repository; config.pbtxt is a ModelConfig of its model_config.proto.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx

from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.errors import BbtError, BundleError, UsageError
from bbt_accel.serving import DIGEST, backbone_name, stage_model

TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
BACKENDS = {"onnx": "onnxruntime", "ort": "onnxruntime", "trt": "tensorrt"}
"""Target of a bundle → the backend of Triton that runs it."""
SMALL = 1024
"""Bytes up to which a tensor stays inside the graph, as in the bundle."""


def write_repository(bundle: Bundle, folder: str | Path, name: str | None = None) -> list[str]:
    """Write the models of a bundle into a repository, new or with other models in it; returns their names.

    name: of the model, the bundle's folder unless given; stages of bbtv2 have theirs appended. Each model has the
    weights that its graph refers to, and no others. Raises BundleError for a bundle that no backend runs, UsageError
    for a name that Triton does not take, BbtError for models that are there already.
    """
    folder, name = Path(folder), name or bundle.path.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"a Triton model cannot be called {name!r}; name the bundle's folder with letters and digits")
    if bundle.info.target not in BACKENDS:
        raise BundleError(
            f"{bundle.path} was built for {bundle.info.target}, which Triton is not given here; "
            "export the bundle that it was optimized from"
        )
    if folder.resolve().is_relative_to(bundle.path.resolve()):
        raise UsageError(f"the repository {folder} would lie in the bundle itself; choose another folder")
    models = {stage: stage_model(name, stage) for stage in bundle.info.stages}
    for model in models.values():
        if (folder / model).exists():
            raise BbtError(f"{folder / model} exists already; remove it, or give the bundle's folder another name")
    for stage, model in models.items():
        with new_folder(folder / model) as target:
            write_model(bundle, stage, model, target)
    return list(models.values())


def write_model(bundle: Bundle, stage: str, name: str, target: Path) -> None:
    """config.pbtxt, and version 1 of the model: model.onnx with its weights, or a plan for each compute capability."""
    backend = BACKENDS[bundle.info.target]
    graph = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False)
    found = plans(bundle, stage) if backend == "tensorrt" else {}
    text = config(bundle, graph.graph, name, backend) + "".join(
        f'cc_model_filenames {{ key: "{capability}" value: "sm{capability}.plan" }}\n' for capability in found
    )
    (target / "config.pbtxt").write_text(text, encoding="utf-8")
    version = target / "1"
    if found:
        version.mkdir()
        for capability, plan in found.items():
            shutil.copyfile(plan, version / f"sm{capability}.plan")
        return
    # A model of more than one file is a folder of that name (Triton's user guide, "ONNX Models").
    files = version / "model.onnx"
    files.mkdir(parents=True)
    onnx.load_external_data_for_model(graph, str(bundle.path))
    onnx.save_model(
        graph, files / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=SMALL
    )
    for file in files.iterdir():
        file.chmod(0o644)  # onnx writes weights for the owner alone; Triton often runs as somebody else


def plans(bundle: Bundle, stage: str) -> dict[str, Path]:
    """Compute capability → plan of a stage. Raises BundleError when the bundle has none that Triton loads."""
    found: dict[str, Path] = {}
    for file in sorted(bundle.path.glob(f"plans/*/{stage}.json")):
        key = json.loads(file.read_text(encoding="utf-8"))["key"]
        if key["runtime"].split()[0] == "tensorrt":  # Triton's backend is TensorRT's own, not that for RTX
            found |= dict.fromkeys(key["capability"], file.with_suffix(".plan"))
    if not found:
        raise BundleError(
            f"{bundle.path} has no plan of {stage} that Triton loads; optimize it for trt on the GPU itself, with the "
            "package tensorrt (plans of TensorRT for RTX are for other programs)"
        )
    return found


def config(bundle: Bundle, graph: onnx.GraphProto, name: str, backend: str) -> str:
    """The text of config.pbtxt. Rows and candidates are axes of their own, so Triton is not to batch: size 0."""
    platform = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}[backend]
    info = bundle.info
    facts = {
        DIGEST: bundle.digest,
        "backbone": backbone_name(info.backbone),
        "method": info.method,
        "precision": info.precision,
    }
    lines = [f"name: {json.dumps(name)}", f'platform: "{platform}"', f'backend: "{backend}"', "max_batch_size: 0"]
    lines += tensors("input", graph.input) + tensors("output", graph.output)
    for key, value in facts.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}')
    return "\n".join(lines) + "\n"


def tensors(kind: str, values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in tensor.shape.dim)
        lines.append(f'{kind} {{ name: "{value.name}" data_type: {TYPES[tensor.elem_type]} dims: [ {dims} ] }}')
    return lines


def exported_bundle(path: str | Path, repository: Path | None) -> Bundle:
    """The bundle that `export` was given instead of a backbone. Raises UsageError when there is nothing to do."""
    if not (Path(path) / "bundle.json").is_file():
        raise UsageError(f"{path} is not a bundle; name the new one by -o")
    if repository is None:
        raise UsageError(f"{path} is a bundle already; --triton-repository writes it for Triton")
    return Bundle.read(path)
