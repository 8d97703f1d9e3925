"""What each engine is: one declaration, read by the registry, the command line, doctor, bench,
optimize and sweeps.

Nothing here imports an engine. Packages add engines of their own by an entry point in the group
`bbt_accel.engines` that names an `EngineSpec`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import AfterValidator

from bbt_accel.core.plugins import with_plugins
from bbt_accel.errors import EngineError, UsageError, check_known

DeviceKind = Literal["cpu", "cuda"]
"""A kind of device, for which engines have backends."""


def check_device(device: str) -> str:
    """cpu, cuda (the first GPU) or cuda:N unchanged. Raises UsageError for anything else."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(
            f"--device must be cpu, cuda or cuda:N (the N-th GPU, counted from 0), not {device!r}"
        )
    return device


def kind_of(device: str) -> DeviceKind:
    return "cpu" if device == "cpu" else "cuda"


def index_of(device: str) -> int:
    """The number of the GPU: cuda:1 → 1, cuda → 0."""
    return int(device.partition(":")[2] or 0)


Device = Annotated[str, AfterValidator(check_device)]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
GROUP = "bbt_accel.engines"
DEFAULT_ENGINE = "ort"
ORT_GRAPHS_SINCE = "1.31"
"""The first onnxruntime-gpu whose CUDA graphs copy nothing from host memory that is freed before
they are launched.
Concat, Split and ScatterND did: https://github.com/microsoft/onnxruntime/pull/32121."""


@dataclass(frozen=True)
class Backend:
    """An engine on one device.

    loader: `module:name` of the class (or function) that `load_engine` calls.
    packages: distributions that it needs; alternatives are separated by a bar.
    extra: the extra of bbt-accel that installs them.
    replaces: a distribution that must be uninstalled first.
    """

    loader: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    replaces: str = ""


@dataclass(frozen=True)
class EngineSpec:
    """An engine.

    backends: how it is loaded, by kind of device.
    reads: targets of the bundles that it loads (`onnx` is the bundle as exported).
    optimized: precisions that `optimize --target NAME` converts a bundle to, for this engine.
    converter: `module:name` of the class that writes those bundles, of
    `bbt_accel.exporters.convert.converters`.
    benched: precisions that `bench` measures by default.
    remote: computes on a server: needs a `--url`, and takes neither a device nor threads.
    internal: not offered on the command line, as the baselines of benchmarks.
    baseline: PyTorch as one would use it without bbt-accel; `bench` measures them first, in the
    order of `ENGINES`.
    counts_flops: PyTorch can count the operations of its forward.
    """

    name: str
    backends: dict[DeviceKind, Backend]
    reads: tuple[str, ...] = ("onnx",)
    optimized: tuple[Precision, ...] = ()
    converter: str = "bbt_accel.exporters.convert.converters:Converter"
    benched: tuple[Precision, ...] = ()
    remote: bool = False
    internal: bool = False
    baseline: bool = False
    counts_flops: bool = False

    @property
    def packages(self) -> list[str]:
        """Every distribution that a backend may need, alternatives too."""
        needs = (need for backend in self.backends.values() for need in backend.packages)
        return list(dict.fromkeys(one for need in needs for one in need.split("|")))

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision that the engine runs in."""
        exported: tuple[Precision, ...] = ("fp32",) if "onnx" in self.reads else ()
        return tuple(dict.fromkeys((*exported, *self.optimized)))

    def target(self, precision: str) -> str:
        """Target of the bundle that the engine reads at a precision: `onnx`, its own, or another
        engine's.

        Raises UsageError for a precision that it does not run in.
        """
        if precision == "fp32" and "onnx" in self.reads and "fp32" not in self.optimized:
            return "onnx"
        known = targets()
        for name in self.reads:
            if name in known and precision in known[name].optimized:
                return name
        raise UsageError(
            f"engine {self.name} runs in {', '.join(self.precisions)}, not in {precision}"
        )

    def device(self, wanted: str) -> str:
        """Where the engine runs: an engine without a CPU backend needs no `--device cuda`.

        Raises UsageError for an unknown device, EngineError for one that the engine does not run
        on.
        """
        device = "cuda" if check_device(wanted) == "cpu" and "cpu" not in self.backends else wanted
        if kind_of(device) not in self.backends:
            raise EngineError(
                f"engine {self.name} runs on the {'/'.join(self.backends).upper()}, not on {wanted}"
            )
        return device


TENSORRT = "tensorrt|tensorrt-cu13|tensorrt-cu12|tensorrt-rtx-cu13"
"""Packages that have TensorRT's Python API; `tensorrt` installs one of the next two."""


def _pytorch(loader: str) -> dict[DeviceKind, Backend]:
    """The backends of a class that runs PyTorch."""
    backend = Backend(f"bbt_accel.engines.{loader}", ("torch", "transformers"), "export")
    return {"cpu": backend, "cuda": backend}


def _baseline(
    name: str,
    loader: str,
    benched: tuple[Precision, ...] = ("fp32", "fp16", "bf16"),
    only: DeviceKind | None = None,
    counts_flops: bool = True,
) -> EngineSpec:
    """A baseline, which reads a checkpoint. only: the kind of device that it is for."""
    backends = {kind: backend for kind, backend in _pytorch(loader).items() if only in (None, kind)}
    return EngineSpec(
        name,
        backends,
        reads=("onnx", "torch"),
        benched=benched,
        internal=True,
        baseline=True,
        counts_flops=counts_flops,
    )


ENGINES = (
    EngineSpec(
        "torch",
        _pytorch("pytorch:TorchEngine"),
        reads=("onnx", "torch"),
        optimized=("bf16", "fp16"),
        converter="bbt_accel.exporters.convert.converters:TorchConverter",
        benched=("fp32", "bf16"),
        counts_flops=True,
    ),
    EngineSpec(
        "ort",
        {
            "cpu": Backend(
                "bbt_accel.engines.ort:OrtEngine", ("onnxruntime|onnxruntime-gpu",), "cpu"
            ),
            "cuda": Backend(
                "bbt_accel.engines.ort_cuda:OrtCudaEngine",
                ("onnxruntime-gpu",),
                "gpu",
                "onnxruntime",
            ),
        },
        reads=("onnx", "ort"),
        optimized=("fp32", "fp16", "int8", "int4"),
        converter="bbt_accel.exporters.convert.converters:OrtConverter",
        benched=("fp32", "int8"),
    ),
    EngineSpec(
        "openvino",
        {"cpu": Backend("bbt_accel.engines.openvino:OpenVinoEngine", ("openvino",), "openvino")},
        reads=("onnx", "openvino"),
        optimized=("fp32", "bf16", "int8", "int4"),
        converter="bbt_accel.exporters.convert.converters:OpenVinoConverter",
        benched=("fp32", "bf16", "int8"),
    ),
    EngineSpec(
        "trt",
        {"cuda": Backend("bbt_accel.engines.trt:TrtEngine", (TENSORRT, "cuda-python"), "trt")},
        reads=("trt",),
        optimized=("fp32", "fp16", "bf16"),
        converter="bbt_accel.exporters.convert.converters:TrtConverter",
        benched=("fp16",),
    ),
    EngineSpec(
        "remote",
        {
            "cpu": Backend(
                "bbt_accel.engines.remote:connect", ("tritonclient", "geventhttpclient"), "remote"
            )
        },
        reads=("onnx", "torch", "ort", "openvino", "trt"),
        remote=True,
    ),
    _baseline("eager", "baselines:EagerEngine"),
    _baseline("eager-tf32", "baselines:EagerTf32Engine", benched=("fp32",), only="cuda"),
    _baseline("eager-readout", "baselines:EagerReadoutEngine"),
    _baseline("compiled", "baselines:CompiledEngine", counts_flops=False),
)


@cache
def engine_specs() -> dict[str, EngineSpec]:
    """Every engine by name: the built-in ones, then those of installed packages."""
    return with_plugins(ENGINES, GROUP, EngineSpec, "name")


def engine_names() -> list[str]:
    """What `--engine` takes."""
    return [name for name, spec in engine_specs().items() if not spec.internal]


def engine_spec(name: str) -> EngineSpec:
    """Raises UsageError for an unknown name."""
    if name not in engine_specs():
        check_known("engine", name, engine_names())
    return engine_specs()[name]


def local_engine(name: str, user: str) -> EngineSpec:
    """Raises UsageError for an unknown name, and for an engine that needs a `--url`, which the
    command `user` lacks.
    """
    spec = engine_spec(name)
    if spec.remote:
        raise UsageError(f"{user} has no --url for the engine {name}; use tune and evaluate")
    return spec


def targets() -> dict[str, EngineSpec]:
    """What `optimize --target` takes: engines that bundles are converted for."""
    return {name: spec for name, spec in engine_specs().items() if spec.optimized}
