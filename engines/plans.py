"""TensorRT plans: what they depend on, when they are stale, how they are built and cached.

A bundle for TensorRT holds its graphs as ONNX and a folder of plans for each GPU that it was loaded
on or built for: `plans/GPU/STAGE.plan`, with STAGE.json beside it. Plans are a cache and not part
of the bundle's sha256. A plan is rebuilt at load when its key differs from the wanted one; a
message gives the reason. Needs no onnx.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.core.axes import AXES
from bbt_accel.core.bundle import PROJECT, STATISTICS, Bundle, BundleInfo
from bbt_accel.engines.plan_layers import Layers, read_layers
from bbt_accel.engines.trt_api import Api, new_logger, reason, start
from bbt_accel.errors import PlanError
from bbt_accel.io.files import write_atomically
from bbt_accel.io.manifests import PLANS

Range = tuple[
    int, int, int
]  # (min, opt, max) of a dynamic axis: what a plan accepts, and what it is tuned for
STEP = 8
"""Of the lengths of buckets, by `Batch.aligned`; that of a profile's longest row is rounded up,
too.
"""
OPTIONS: dict[str, str] = {"strongly_typed": "yes", "tf32": "no", "profiling": "detailed"}
"""Build options. Types are those of the graph; with TF32, fp32 matmuls would round their inputs."""
FLAGS = {
    "STRICT_NANS": ("strict_nans", "yes"),
    "REQUIRE_USER_ALLOCATION": ("user_allocation", "required"),
}
"""Builder flags, set where TensorRT has them → a build option and its value. Without the first 0 ·
NaN may be 0, and a NaN loss has to stay NaN. Without the second a plan of TensorRT for RTX may
allocate memory of its own while it runs; the release notes of 1.2 require it for stream capture,
from which CUDA graphs are made."""


class ShapeProfile(BaseModel):
    """A TensorRT optimization profile: the dynamic axes of the graphs, by their names in
    `axes.AXES`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    candidates: Range
    rows: Range
    tokens: Range
    labels: Range = (1, 2, 1024)
    decoder_tokens: Range = (1, 2, 2)
    context: Range = (1, 1, 1)
    dim: Range = Field(default=(1, 500, 1024), description="Of the search space.")

    def shapes(self, name: str, shape: tuple[int, ...], info: BundleInfo) -> list[list[int]]:
        """The min, opt and max shape of an input, whose dynamic axes are -1 in `shape`."""
        # A decoder's begin token is part of the context, and its prompt's states are apart from the
        # text's.
        tokens = [size - info.prompt_start * info.causal for size in self.tokens]
        text = (
            tokens
            if "prefix-cache" in info.without
            else [size - info.prefix_columns for size in self.tokens]
        )
        ranges: dict[str | None, Any] = dict(self)
        ranges |= {"tokens": tokens, "text": text, "state": (1, *self.candidates[1:])}
        return [
            [ranges[AXES[name][i]][k] if size < 0 else size for i, size in enumerate(shape)]
            for k in range(3)
        ]


class Key(BaseModel):
    """Everything that a plan depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    graph: str = Field(description="sha256 of the ONNX file and its weights.")
    runtime: str = Field(description="tensorrt or tensorrt_rtx, and its version.")
    gpu: str | None = Field(
        description="None for a plan that is built ahead of time, as for the driver."
    )
    capability: tuple[str, ...] = Field(description="Of the GPU, or those to build ahead for.")
    driver: str | None
    profile: ShapeProfile
    options: dict[str, str] = OPTIONS

    @property
    def folder(self) -> str:
        """Name of the folder in `plans`: the GPU's, or sm89 for a plan that was built ahead of
        time.
        """
        if self.gpu is None:
            return "-".join(f"sm{c.replace('.', '')}" for c in self.capability)
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    def differences(self, wanted: Key) -> list[str]:
        """What has changed, in words; empty when a plan of this key can be used for `wanted`.

        A plan that was built ahead of time runs on every GPU of its compute capabilities, with any
        driver.
        """
        ignored: set[str] = set()
        if self.gpu is None and wanted.gpu is not None:
            ignored = {"gpu", "driver"}
            if set(wanted.capability) <= set(self.capability):
                ignored.add("capability")
        pairs = [
            (name, before, getattr(wanted, name)) for name, before in self if name not in ignored
        ]
        return [describe_change(name, before, now) for name, before, now in pairs if before != now]


def describe_change(name: str, before: Any, now: Any) -> str:
    """One field of a key that differs, in words."""
    if name == "graph":
        return "the ONNX graph has changed"
    if name in ("profile", "options"):
        old, new = dict(before), dict(now)
        changes = [
            f"{key} {old.get(key)} → {new.get(key)}"
            for key in old | new
            if old.get(key) != new.get(key)
        ]
        what = "the profile has" if name == "profile" else "build options have"
        return f"{what} changed: {', '.join(changes)}"
    what = {"gpu": "GPU", "capability": "compute capability"}.get(name, name)
    was, now = (
        ", ".join(value) if isinstance(value, tuple) else value or "none" for value in (before, now)
    )
    return f"the {what} was {was} and is {now}"


class Tensor(BaseModel):
    """An input or output of a plan."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    profile: list[list[int]] | None = Field(
        default=None, description="Its min, opt and max shape; None for an output."
    )


def build_options(api: Api) -> dict[str, str]:
    """The build options of a plan by this TensorRT."""
    return OPTIONS | {
        name: value for flag, (name, value) in FLAGS.items() if api.has("BuilderFlag", flag)
    }


class Record(BaseModel):
    """STAGE.json: the key and facts of a plan."""

    key: Key
    sha256: str
    bytes: int
    layers: int = Field(description="Of the network, before TensorRT fuses them.")
    inputs: list[Tensor]
    outputs: list[Tensor]
    kernels: Layers | None = Field(
        default=None, description="What TensorRT made of the network; None if it is silent."
    )


def graph_digest(bundle: Bundle, stage: str) -> str:
    """sha256 over a stage's ONNX file and its weights, from the checksums in bundle.json."""
    sums = bundle.info.sha256
    if f"{stage}.onnx" not in sums:
        raise PlanError(f"{bundle.path} lacks {stage}.onnx; optimize the exported bundle again")
    parts = [
        sums[name]
        for name in (f"{stage}.onnx", "model.safetensors", "weights.data")
        if name in sums
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def profile_of(bundle: Bundle) -> ShapeProfile:
    """The profile that `optimize` chose. Raises PlanError for a bundle that was not optimized for
    TensorRT.
    """
    found = (bundle.info.optimization or {}).get("profile")
    if bundle.info.target != "trt" or found is None:
        raise PlanError(
            f"{bundle.path} was not optimized for TensorRT; use bbt-accel optimize --target trt"
        )
    return ShapeProfile.model_validate(found)


def keys(
    bundle: Bundle, api: Api, gpu: str | None, capability: tuple[str, ...], driver: str | None
) -> dict[str, Key]:
    """The key of each stage, of the projection, and of the batch statistics."""
    shared: dict[str, Any] = {
        "runtime": api.version,
        "gpu": gpu,
        "capability": capability,
        "driver": driver,
    }
    shared["options"] = build_options(api)
    profile, stages = profile_of(bundle), (*bundle.info.stages, PROJECT, STATISTICS)
    return {
        stage: Key(graph=graph_digest(bundle, stage), profile=profile, **shared) for stage in stages
    }


def keep_plan(
    bundle: Bundle,
    stage: str,
    key: Key,
    plan: bytes,
    record: Record,
    announce: Callable[[str], None],
) -> None:
    """Cache a plan and its record in the bundle; `announce` gets a line where that is not
    possible.
    """
    folder = bundle.path / PLANS / key.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{stage}.plan", plan)
        write_atomically(
            folder / f"{stage}.json", (record.model_dump_json(indent=1) + "\n").encode()
        )
    except OSError as error:
        announce(f"cannot cache the plan of {stage} ({error.strerror}: {folder})")


def find_plan(bundle: Path, stage: str, key: Key) -> tuple[bytes | None, str]:
    """The cached plan that fits `key`; or None and the reason, which is the shortest list of
    differences.
    """
    reasons = []
    for file in sorted((bundle / PLANS).glob(f"*/{stage}.json")):
        try:
            record = Record.model_validate_json(file.read_text(encoding="utf-8"))
            plan = file.with_suffix(".plan").read_bytes()
        except (OSError, UnicodeDecodeError, ValidationError):
            reasons.append((99, f"{file.parent.name}/{stage}.plan cannot be read"))
            continue
        changes = record.key.differences(key)
        if not changes and hashlib.sha256(plan).hexdigest() == record.sha256:
            return plan, ""
        reasons.append(
            (
                len(changes),
                "; ".join(changes) or f"{file.parent.name}/{stage}.plan is damaged (sha256)",
            )
        )
    return None, min(reasons)[1] if reasons else "there is none yet"


def build(
    api: Api, bundle: Bundle, stage: str, key: Key, monitor: Any = None
) -> tuple[bytes, Record]:
    """Build a plan from a stage's ONNX file. Raises PlanError with the node or TensorRT's first
    error.

    monitor: TensorRT's progress monitor.
    """
    trt, logger = api.module, new_logger(api)
    builder = start(api, "Builder", logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(api, network, bundle.path / f"{stage}.onnx", logger)
    config = configure(api, builder, key)
    if monitor is not None:
        config.progress_monitor = monitor
    inputs = add_profile(builder, config, network, key, bundle.info, stage)
    timing = bundle.path / PLANS / key.folder / "timing.cache"
    cache = timing_cache(config, timing)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"TensorRT cannot build {stage} ({reason(logger.errors)})")
    if cache is not None and (timings := cache.serialize()) is not None:
        with suppress(OSError):  # a bundle that cannot be written to
            timing.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(timing, bytes(timings))
    content = bytes(plan)
    outputs = [tensor_of(network.get_output(i)) for i in range(network.num_outputs)]
    facts: dict[str, Any] = {"layers": network.num_layers, "inputs": inputs, "outputs": outputs}
    facts["kernels"] = read_layers(logger.layers, operators(network)) if logger.layers else None
    return content, Record(
        key=key, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), **facts
    )


def operators(network: Any) -> dict[str, str]:
    """The type of each layer by its name, which is that of its ONNX node."""
    layers = map(network.get_layer, range(network.num_layers))
    return {layer.name: str(layer.type).rpartition(".")[2] for layer in layers}


def parse(api: Api, network: Any, file: Path, logger: Any) -> None:
    """Read an ONNX file into the network. Raises PlanError with the node that the parser rejects,
    and why.
    """
    parser = api.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(file)):
        return
    if not parser.num_errors:
        raise PlanError(f"TensorRT cannot read {file.name} ({reason(logger.errors)})")
    error = parser.get_error(0)
    node = f"{error.node_operator()} {error.node_name()}".strip() or "the file"
    why = " ".join(str(error.desc()).split())
    raise PlanError(f"TensorRT cannot read {file.name}: {node} is rejected ({why:.200})")


def configure(api: Api, builder: Any, key: Key) -> Any:
    """The builder's configuration for a plan of this key."""
    trt, config = api.module, builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    for flag in FLAGS:
        if api.has("BuilderFlag", flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if (
        api.builds_ahead
    ):  # also for this machine's GPU: without it a plan runs on Ampere, Ada and Blackwell alone
        if key.gpu:
            api.check_gpu(key.gpu, *key.capability)
        config.num_compute_capabilities = len(key.capability)
        for i, capability in enumerate(key.capability):
            if not config.set_compute_capability(api.capability(capability), i):
                raise PlanError(
                    f"{api.version} rejects compute capability {capability}; "
                    "build on the GPU itself"
                )
    return config


def add_profile(
    builder: Any, config: Any, network: Any, key: Key, info: BundleInfo, stage: str
) -> list[Tensor]:
    """Add one optimization profile over all inputs; returns the inputs with their shapes."""
    profile = builder.create_optimization_profile()
    inputs = [tensor_of(network.get_input(i)) for i in range(network.num_inputs)]
    for tensor in inputs:
        tensor.profile = key.profile.shapes(tensor.name, tensor.shape, info)
        profile.set_shape(tensor.name, *tensor.profile)
    if config.add_optimization_profile(profile) < 0:
        raise PlanError(f"TensorRT rejects the profile of {stage}: {key.profile}")
    return inputs


def tensor_of(tensor: Any) -> Tensor:
    dtype = str(tensor.dtype).rpartition(".")[2].lower()
    return Tensor(name=tensor.name, dtype=dtype, shape=tuple(int(size) for size in tensor.shape))


def timing_cache(config: Any, file: Path) -> Any:
    """The kernel timings of earlier builds, which make later ones faster; None where this TensorRT
    caches none.
    """
    if hasattr(config, "create_timing_cache"):
        for content in (file.read_bytes(), b"") if file.is_file() else (b"",):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
    return None
