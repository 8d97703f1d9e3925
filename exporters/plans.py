"""TensorRT plans: what they are built for, when they are stale, and how they are built and kept.

A bundle for TensorRT holds its graphs as ONNX and, for each GPU that it has met or was built for, a folder of plans:
`plans/GPU/STAGE.plan`, with STAGE.json beside it. Plans are a cache: they are not part of the bundle's sha256, a plan
whose key differs from the one that is wanted is built again, and the reason is told. Needs no onnx.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bbt_accel.bundle import PLANS, PROJECT, TALLY, Bundle, BundleInfo
from bbt_accel.errors import PlanError
from bbt_accel.exporters.trt_api import Api, new_logger, reason, start

log = logging.getLogger(__name__)
Range = tuple[int, int, int]
"""min, opt, max of one open axis: what a plan accepts, and what it is tuned for."""
OPTIONS: dict[str, str] = {"strongly_typed": "yes", "tf32": "no", "profiling": "detailed"}
"""How plans are built. fp32 products would be rounded to TF32 otherwise; types are those of the graph."""


class Sizes(BaseModel):
    """An optimization profile: the open axes of the graphs, each (min, opt, max)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    candidates: Range
    rows: Range
    tokens: Range
    labels: Range = (1, 2, 256)
    decoder: Range = (1, 2, 2)
    dim: Range = (1, 500, 1024)
    """Of the space that is searched."""

    def of_input(self, name: str, shape: tuple[int, ...], info: BundleInfo) -> list[list[int]]:
        """min, opt and max shape of an input; open axes (-1) are those of `graph.dynamic_axes` and of device.py."""
        state = (1, *self.candidates[1:])
        behind_prompt = info.family == "gpt2" and info.prompt_mode == "add"
        text = tuple(t - info.n_prompt_tokens for t in self.tokens) if behind_prompt else self.tokens
        axes: dict[str, dict[int, tuple[int, ...]]] = {
            "prompts": {0: self.candidates},
            "input_ids": {0: self.rows, 1: self.tokens},
            "attention_mask": {0: self.rows, 1: self.tokens},
            "readout": {0: self.rows},
            "label_token_ids": {0: self.labels},
            "decoder_input_ids": {0: self.rows, 1: self.decoder},
            "hidden": {0: state, 1: self.rows, 2: text},
            "prefix": {0: state},
            "z": {0: self.candidates, 1: self.dim},
            "matrix": {1: self.dim},
            "p0": {},
            "label_logits": {0: self.candidates, 1: self.rows, 2: self.labels},
            "targets": {0: self.rows, 1: self.labels},
            "classes": {0: self.labels},
        }
        return [[axes[name][i][k] if size < 0 else size for i, size in enumerate(shape)] for k in range(3)]


class Key(BaseModel):
    """Everything that a plan depends on. Built ahead of time, it has no GPU name and no driver."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graph: str
    """sha256 of the ONNX file and the weights that it refers to."""
    runtime: str
    """tensorrt or tensorrt_rtx, and its version."""
    gpu: str | None
    capability: tuple[str, ...]
    """Compute capability of the GPU; or those that were asked for."""
    driver: str | None
    profile: Sizes
    options: dict[str, str] = OPTIONS

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the folder in `plans`: the GPU's, or sm89 for a plan that was built ahead."""
        if self.gpu is None:
            return "-".join(f"sm{c.replace('.', '')}" for c in self.capability)
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    def differences(self, wanted: Key) -> list[str]:
        """What has to be the same and is not, in words; empty when a plan of this key serves for `wanted`.

        A plan that was built ahead runs on every GPU of its compute capabilities, whatever the driver.
        """
        names = ["graph", "runtime", "profile", "options"]
        ahead = self.gpu is None and wanted.gpu is not None
        if not (ahead and set(wanted.capability) <= set(self.capability)):
            names += ["capability"] if ahead else ["gpu", "capability", "driver"]
        told = []
        for name in sorted(names, key=list(Key.model_fields).index):
            before, now = getattr(self, name), getattr(wanted, name)
            if before != now:
                told.append(changed(name, before, now))
        return told


def changed(name: str, before: Any, now: Any) -> str:
    """One part of a key that differs, in words."""
    what = {"graph": "the ONNX graph", "gpu": "the GPU", "capability": "the compute capability"}.get(
        name, f"the {name}"
    )
    if name == "graph":
        return f"{what} has changed"
    if name == "profile":
        axes = [axis for axis in Sizes.model_fields if getattr(before, axis) != getattr(now, axis)]
        return "the profile has changed: " + ", ".join(f"{a} {getattr(before, a)} → {getattr(now, a)}" for a in axes)
    if name == "options":
        names = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
        return "build options have changed: " + ", ".join(f"{n} {before.get(n)} → {now.get(n)}" for n in names)
    shown = [", ".join(value) if isinstance(value, tuple) else value or "none" for value in (before, now)]
    return f"{what} was {shown[0]} and is {shown[1]}"


class Tensor(BaseModel):
    """An input or output of a plan."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    profile: list[list[int]] | None = None
    """min, opt, max shape; None for an output."""


class Record(BaseModel):
    """STAGE.json: what a plan is."""

    key: Key
    sha256: str
    bytes: int
    layers: int
    """Of the network, before TensorRT fuses them."""
    inputs: list[Tensor]
    outputs: list[Tensor]


def graph_digest(bundle: Bundle, stage: str) -> str:
    """sha256 over a stage's ONNX file and the weights beside it, from the sums that the bundle keeps."""
    sums = bundle.info.sha256
    if f"{stage}.onnx" not in sums:
        raise PlanError(f"{bundle.path} lacks {stage}.onnx; optimize the exported bundle again")
    parts = [sums[f"{stage}.onnx"], *(sums[n] for n in sorted(sums) if n in ("weights.data", "model.safetensors"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def profile_of(bundle: Bundle) -> Sizes:
    """The profile that `optimize` chose. Raises PlanError for a bundle that was not made for TensorRT."""
    found = (bundle.info.optimization or {}).get("profile")
    if bundle.info.target != "trt" or found is None:
        raise PlanError(f"{bundle.path} was not made for TensorRT; make one with bbt-accel optimize --target trt")
    return Sizes.model_validate(found)


def keys(bundle: Bundle, api: Api, gpu: str | None, capability: tuple[str, ...], driver: str | None) -> dict[str, Key]:
    """The key of each stage, of the projection, and of the tally."""
    profile = profile_of(bundle)
    return {
        stage: Key(
            graph=graph_digest(bundle, stage), runtime=api.version, gpu=gpu, capability=capability, driver=driver,
            profile=profile,
        )
        for stage in (*bundle.info.stages, PROJECT, TALLY)
    }  # fmt: skip


def get_plan(bundle: Bundle, stage: str, key: Key, api: Api, tell: Callable[[str], None] = print) -> bytes:
    """The plan of a stage: the one that is kept, or a new one when none fits; then `tell` is told why."""
    kept, why = find_plan(bundle.path, stage, key)
    if kept is not None:
        return kept
    tell(f"building the TensorRT plan of {stage} for {key.gpu or ', '.join(key.capability)}: {why}")
    folder = bundle.path / PLANS / key.folder
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    plan, record = build(api, bundle, stage, key, folder / "timing.cache")
    try:
        replace(folder / f"{stage}.plan", plan)
        replace(folder / f"{stage}.json", (record.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        tell(f"the plan of {stage} is not kept ({error.strerror}: {folder})")
    return plan


def find_plan(bundle: Path, stage: str, key: Key) -> tuple[bytes | None, str]:
    """The plan that serves for `key`; or None and why there is none: the shortest list of differences."""
    whys = []
    for file in sorted((bundle / PLANS).glob(f"*/{stage}.json")):
        try:
            record = Record.model_validate_json(file.read_text(encoding="utf-8"))
            plan = file.with_suffix(".plan").read_bytes()
        except (OSError, UnicodeDecodeError, ValidationError):
            whys.append((99, f"{file.parent.name}/{stage}.plan cannot be read"))
            continue
        told = record.key.differences(key)
        if not told and hashlib.sha256(plan).hexdigest() == record.sha256:
            return plan, ""
        whys.append((len(told), "; ".join(told) or f"{file.parent.name}/{stage}.plan is damaged (sha256)"))
    return None, min(whys)[1] if whys else "there is none yet"


def replace(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, then give it its own."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def build(api: Api, bundle: Bundle, stage: str, key: Key, timing: Path | None = None) -> tuple[bytes, Record]:
    """Parse a stage's ONNX file and build its plan. Raises PlanError, naming the node or TensorRT's first error.

    timing: a file of kernel timings, read if it is there and written afterwards; builds after the first are faster.
    """
    trt, logger = api.module, new_logger(api)
    builder = start(api, "Builder", logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(api, network, bundle.path / f"{stage}.onnx", logger)
    config = builder.create_builder_config()
    configure(api, config, key)
    inputs = add_profile(builder, config, network, key.profile, bundle.info, stage)
    cache = timing_cache(config, timing)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"TensorRT cannot build {stage} ({reason(logger.errors)}){other_gpu(api, key)}")
    if cache is not None and timing is not None:
        with suppress(OSError):  # a bundle that cannot be written to
            replace(timing, bytes(cache.serialize()))
    content = bytes(plan)
    outputs = [tensor_of(network.get_output(i)) for i in range(network.num_outputs)]
    record = Record(
        key=key, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), layers=network.num_layers,
        inputs=inputs, outputs=outputs,
    )  # fmt: skip
    return content, record


def other_gpu(api: Api, key: Key) -> str:
    """A hint for GPUs that TensorRT for RTX does not name, those of data centres among them."""
    if key.gpu is None or not api.builds_ahead or set(key.capability) <= set(api.capabilities()):
        return ""
    return f"; {api.name} names no compute capability {', '.join(key.capability)}: pip install tensorrt"


def parse(api: Api, network: Any, file: Path, logger: Any) -> None:
    """Read an ONNX file into the network. Raises PlanError with the node that the parser refuses, and why."""
    parser = api.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(file)):
        return
    if not parser.num_errors:
        raise PlanError(f"TensorRT cannot read {file.name} ({reason(logger.errors)})")
    error = parser.get_error(0)
    node = f"{error.node_operator()} {error.node_name()}".strip()
    why = " ".join(str(error.desc()).split())
    raise PlanError(f"TensorRT cannot read {file.name}: {node or 'the file'} is refused ({why:.200})")


def configure(api: Api, config: Any, key: Key) -> None:
    trt = api.module
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if key.gpu is None:
        config.num_compute_capabilities = len(key.capability)
        for i, capability in enumerate(key.capability):
            if not config.set_compute_capability(api.capability(capability), i):
                raise PlanError(f"{api.version} refuses compute capability {capability}; build on the GPU itself")


def add_profile(builder: Any, config: Any, network: Any, sizes: Sizes, info: BundleInfo, stage: str) -> list[Tensor]:
    """One optimization profile over all inputs; returns them with their shapes."""
    profile = builder.create_optimization_profile()
    inputs = []
    for i in range(network.num_inputs):
        tensor = tensor_of(network.get_input(i))
        tensor.profile = sizes.of_input(tensor.name, tensor.shape, info)
        profile.set_shape(tensor.name, *tensor.profile)
        inputs.append(tensor)
    if config.add_optimization_profile(profile) < 0:
        raise PlanError(f"TensorRT refuses the profile of {stage}: {sizes}")
    return inputs


def tensor_of(tensor: Any) -> Tensor:
    dtype = str(tensor.dtype).rpartition(".")[2].lower()
    return Tensor(name=tensor.name, dtype=dtype, shape=tuple(int(size) for size in tensor.shape))


def timing_cache(config: Any, file: Path | None) -> Any:
    """The kernel timings of builds before, or none; None where this TensorRT keeps none."""
    if file is None or not hasattr(config, "create_timing_cache"):
        return None
    blobs: Iterator[bytes] = iter((file.read_bytes(), b"") if file.is_file() else (b"",))
    for blob in blobs:
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None
