"""Which engines run on this machine, in which precision the fastest, and what to install."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from bbt_accel.core.engine_specs import (
    Backend,
    DeviceKind,
    Precision,
    engine_names,
    engine_spec,
)
from bbt_accel.errors import first_line
from bbt_accel.io.machine import Machine, describe_machine, installed, release

CUDA = "CUDAExecutionProvider"
CUDA_13 = {
    "torch": (2, 11),
    "onnxruntime-gpu": (1, 27),
    "cuda-python": (13,),
    "tensorrt": (10, 13, 2),
    "tensorrt-cu13": (0,),
    "tensorrt-rtx-cu13": (0,),
}
"""Packages → the versions from which they are built for CUDA 13, which needs driver 580 and compute
capability 7.5."""
DATA_CENTRE = ("9.0", "10.0", "10.3")
"""Compute capabilities that TensorRT for RTX leaves out: H100, H200, B200, B300."""
Versions = Mapping[str, str | None]
"""Distribution → its version; None where it is not installed."""


class EngineState(TypedDict):
    runs: bool
    reason: str
    install: str | None  # the command that installs what is missing; None if nothing is


class Rule(NamedTuple):
    """A precision, the engines that are fast in it, why, and of what the machine needs one."""

    engines: tuple[str, ...]
    device: DeviceKind
    precision: Precision
    reason: str
    needs: tuple[str, ...] = ()


RULES = (  # from the fastest to the slowest, and so are their engines
    Rule(("trt", "ort"), "cuda", "fp16", "the GPU's tensor cores multiply fp16", ("GPU",)),
    # Where AMX multiplies bf16, what int8 keeps in fp32 costs more than its matmuls save
    # (benchmarks/README.md).
    Rule(("openvino",), "cpu", "bf16", "the processor multiplies tiles of bf16 (AMX)", ("AMX",)),
    Rule(
        ("openvino", "ort"),
        "cpu",
        "int8",
        "the processor has 8-bit dot products (VNNI or AMX)",
        ("AVX-512 VNNI", "AMX"),
    ),
    Rule(("openvino",), "cpu", "bf16", "the processor multiplies bf16", ("bf16",)),
    Rule(("openvino", "ort"), "cpu", "fp32", "the processor has no fast arithmetic below fp32"),
)


class Availability(NamedTuple):
    """engines: whether each engine and device runs here. recommended: engine, device, precision,
    reason, and the command that makes the bundle."""

    engines: dict[str, EngineState]
    recommended: dict[str, Any]


def availability() -> Availability:
    """What this machine can run, and what is fastest on it. Never raises for missing packages."""
    found, machine = engine_packages(), describe_machine()
    states = engine_states(found, machine["gpus"], onnxruntime_providers(found)[0])
    return Availability(states, recommend(machine, states))


def engine_packages() -> Versions:
    """The versions of what engines need."""
    names = [package for name in engine_names() for package in engine_spec(name).packages]
    return {name: installed(name) for name in names}


def onnxruntime_providers(found: Versions) -> tuple[list[str], list[str]]:
    """The providers that onnxruntime lists, and the problem if it cannot be imported."""
    if not (found["onnxruntime"] or found["onnxruntime-gpu"]):
        return [], []
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers()), []
    except Exception as error:  # a broken installation fails in many ways
        return [], [f"onnxruntime cannot be imported ({first_line(error)}); reinstall it"]


def engine_states(
    found: Versions, gpus: Sequence[str], providers: Collection[str]
) -> dict[str, EngineState]:
    """For each engine and device whether it can run here, why (not), and what to install.

    gpus: as `describe_machine` has them. providers: of ONNX Runtime.
    """
    return {
        label(name, device): _state(backend, device, found, gpus, providers)
        for name in engine_names()
        for device, backend in engine_spec(name).backends.items()
    }


def label(name: str, device: DeviceKind) -> str:
    """The engine, and its device if it has several."""
    return f"{name} ({device})" if len(engine_spec(name).backends) > 1 else name


def _state(
    backend: Backend,
    device: DeviceKind,
    found: Versions,
    gpus: Sequence[str],
    providers: Collection[str],
) -> EngineState:
    choices = [need.split("|") for need in backend.packages]
    used = [next(filter(found.get, names), None) for names in choices]
    missing = [names for names, package in zip(choices, used, strict=True) if package is None]
    reasons, install = [], None
    if missing:
        # what lies between the first and the last alternative is of one kind
        named = [" or ".join(dict.fromkeys((names[0], names[-1]))) for names in missing]
        reasons.append(f"{' and '.join(named)} not installed")
        replaced = found.get(backend.replaces)
        install = f"pip uninstall -y {backend.replaces} && " if replaced else ""
        extra = f'"bbt-accel[{backend.extra}]"'
        wanted = extra if backend.extra else " ".join(names[0] for names in missing)
        install += f"pip install {wanted}"
    if device == "cuda" and not gpus:
        reasons.append("no NVIDIA GPU found (nvidia-smi)")
    elif device == "cuda":
        for package in filter(None, used):
            for why, command in _misfits_of_gpu(package, found, providers, gpus[0]):
                reasons.append(why)
                install = install or command
    return {"runs": not reasons, "reason": "; ".join(reasons) or "installed", "install": install}


def _misfits_of_gpu(
    package: str, found: Versions, providers: Collection[str], gpu: str
) -> Iterator[tuple[str, str | None]]:
    """Why an installed package does not compute on a GPU, and the command that helps, if any."""
    _, _, driver, capability, *_ = [*gpu.split(", "), None, None, None, None]
    version = found[package] or ""
    if package == "torch" and version.endswith("+cpu"):
        yield "this PyTorch has no CUDA", "pip uninstall -y torch && pip install torch"
    if package == "onnxruntime-gpu" and CUDA not in providers:
        both = "pip uninstall -y onnxruntime onnxruntime-gpu"
        yield f"this ONNX Runtime has no {CUDA}", f'{both} && pip install "bbt-accel[gpu]"'
    if package in CUDA_13 and release(version) >= CUDA_13[package] and "+cu12" not in version:
        if driver and release(driver) < (580,):
            older = ["torch"] if package == "torch" else []
            if found.get("tensorrt") and package in ("tensorrt", "cuda-python"):
                older = ["tensorrt", "torch", "cuda-python"]
            limits = " ".join(f'"{name}<{".".join(map(str, CUDA_13[name]))}"' for name in older)
            reason = f"{package} {version} needs NVIDIA's driver 580 or later, not {driver}"
            yield reason, f"pip install {limits}" if older else None
        if capability and release(capability) < (7, 5) and package != "cuda-python":
            yield f"{package} needs compute capability 7.5, not {capability}", None
    if package == "tensorrt-rtx-cu13" and capability in DATA_CENTRE:
        reason = f"TensorRT for RTX does not support compute capability {capability}"
        yield reason, "pip install tensorrt"


def recommend(machine: Machine, states: Mapping[str, EngineState]) -> dict[str, Any]:
    """The fastest engine and precision that this machine can run; the reason names what would be
    faster.
    """
    features = {*machine["features"], *(["GPU"] if machine["gpus"] else [])}
    fit = [rule for rule in RULES if not rule.needs or features.intersection(rule.needs)]
    options = [(rule, name) for rule in fit for name in rule.engines]
    runs = (o for o in options if states[label(o[1], o[0].device)]["runs"])
    chosen, engine = next(runs, options[0])
    reason = chosen.reason
    if chosen.precision == "int8" and "bf16" in features and "AMX" not in features:
        reason += "; --target openvino --bf16 is slower but needs no calibration"
    fastest, name = options[0]
    best = label(name, fastest.device)
    if install := states[best]["install"]:
        is_best = (chosen, engine) == options[0]
        faster = "to run it" if is_best else f"{best} in {fastest.precision} is faster"
        reason += f"; {faster}: {install}"
    flag = "" if chosen.precision == "fp32" else f" --{chosen.precision}"
    return {
        "engine": engine,
        "device": chosen.device,
        "precision": chosen.precision,
        "reason": reason,
        "command": f"bbt-accel optimize BUNDLE -o OPTIMIZED --target {engine}{flag}",
    }
