"""What this machine can run, what is fastest on it, and what to install for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from bbt_accel.core.engine_specs import (
    ORT_GRAPHS_SINCE,
    Backend,
    DeviceKind,
    Precision,
    engine_names,
    engine_spec,
)
from bbt_accel.errors import first_line
from bbt_accel.io.machine import (
    Machine,
    dependencies,
    describe_machine,
    installed,
    installed_versions,
    release,
)

NOTES = (
    "a provider listed by ONNX Runtime may still not work: without its libraries or its device a session falls back to "
    "the CPU. bbt-accel checks this when it loads an engine",
    "this version's GPU engines have not been run on a GPU; check them with make gpu-check "
    "(python -m bbt_accel.benchmarks.gpu_check)",
)
INT8_FEATURES = frozenset({"AVX-512 VNNI", "AMX"})
CUDA = "CUDAExecutionProvider"
CUDA_13 = {
    "torch": (2, 11), "onnxruntime-gpu": (1, 27), "cuda-python": (13,),
    "tensorrt": (10, 13, 2), "tensorrt-cu13": (0,), "tensorrt-rtx-cu13": (0,),
}  # fmt: skip
"""Packages → the versions from which they are built for CUDA 13, which needs driver 580 and compute
capability 7.5.
"""
DATA_CENTRE = ("9.0", "10.0", "10.3")
"""Compute capabilities that TensorRT for RTX leaves out: H100, H200, B200, B300."""
Versions = Mapping[str, str | None]
Recommendation = dict[
    str, str
]  # engine, device, precision, reason, and the command that makes the bundle


class EngineState(TypedDict):
    runs: bool
    reason: str
    install: str | None  # the command that installs what is missing; None if nothing is


class Rule(NamedTuple):
    """A precision, the engines that are fast in it, and why: one of the features in `needs`, if
    any.
    """

    engines: tuple[str, ...]
    device: DeviceKind
    precision: Precision
    reason: str
    needs: frozenset[str] = frozenset()


RULES = (  # from the fastest to the slowest, and so are their engines
    Rule(
        ("trt", "ort"), "cuda", "fp16", "the GPU's tensor cores multiply fp16", frozenset({"GPU"})
    ),
    # Where AMX multiplies bf16, what int8 keeps in fp32 costs more than its matmuls save
    # (benchmarks/README.md).
    Rule(
        ("openvino",),
        "cpu",
        "bf16",
        "the processor multiplies tiles of bf16 (AMX)",
        frozenset({"AMX"}),
    ),
    Rule(
        ("openvino", "ort"),
        "cpu",
        "int8",
        "the processor has 8-bit dot products (VNNI or AMX)",
        INT8_FEATURES,
    ),
    Rule(("openvino",), "cpu", "bf16", "the processor multiplies bf16", frozenset({"bf16"})),
    Rule(("openvino", "ort"), "cpu", "fp32", "the processor has no fast arithmetic below fp32"),
)


def diagnose() -> dict[str, Any]:
    """Versions, machine, engines and the fastest precision, ready for JSON. Never raises for
    missing packages.
    """
    found = versions()
    machine = describe_machine()
    providers, problems = onnxruntime_providers(found)
    states = engines(found, machine["gpus"], providers)
    return {
        "versions": found,
        "machine": machine,
        "onnxruntime_providers": providers,
        "engines": states,
        "recommended": recommend(machine, states),
        "warnings": [*problems, *misfits(found, providers, machine["gpus"])],
        "notes": list(NOTES),
    }


def versions() -> dict[str, str | None]:
    """Python, bbt-accel, its dependencies, and what the engines need; None for what is not
    installed.
    """
    packages = {
        one: installed(one) for name in engine_names() for one in engine_spec(name).packages
    }
    return {
        **dict.fromkeys(("python", "bbt-accel", *dependencies())),
        **packages,
        **installed_versions(),
    }


def engines(
    found: Versions, gpus: Sequence[str], providers: Collection[str]
) -> dict[str, EngineState]:
    """For each engine and device whether it can run here, why (not), and the command that installs
    what is missing.

    providers: of ONNX Runtime.
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
    used = {
        need: next((one for one in need.split("|") if found.get(one)), None)
        for need in backend.packages
    }
    missing = [need for need, package in used.items() if package is None]
    choices = [need.split("|") for need in missing]
    named = [
        " or ".join(dict.fromkeys((names[0], names[-1]))) for names in choices
    ]  # what lies between is of one kind
    reasons = [f"{' and '.join(named)} not installed"] if missing else []
    uninstall = f"pip uninstall -y {backend.replaces} && " if found.get(backend.replaces) else ""
    wanted = (
        f'"bbt-accel[{backend.extra}]"'
        if backend.extra
        else " ".join(names[0] for names in choices)
    )
    install = f"{uninstall}pip install {wanted}" if missing else None
    if device == "cuda" and not gpus:
        reasons.append("no NVIDIA GPU found (nvidia-smi)")
    elif device == "cuda":
        for package in filter(None, used.values()):
            for why, command in unfit(package, found, providers, gpus[0]):
                reasons.append(why)
                install = install or command
    return {"runs": not reasons, "reason": "; ".join(reasons) or "installed", "install": install}


def unfit(
    package: str, found: Versions, providers: Collection[str], gpu: str
) -> Iterator[tuple[str, str | None]]:
    """Why an installed package does not compute on a GPU, and the command that helps, if there is
    one.

    gpu: as `describe_machine` has it.
    """
    version, (driver, capability) = found[package] or "", facts_of(gpu)
    if package == "torch" and version.endswith("+cpu"):
        yield "this PyTorch has no CUDA", "pip uninstall -y torch && pip install torch"
    if package == "onnxruntime-gpu" and CUDA not in providers:
        both = "pip uninstall -y onnxruntime onnxruntime-gpu"
        yield f"this ONNX Runtime has no {CUDA}", f'{both} && pip install "bbt-accel[gpu]"'
    if package in CUDA_13 and release(version) >= CUDA_13[package] and "+cu12" not in version:
        if driver and release(driver) < (580,):
            trt = package in ("tensorrt", "cuda-python") and found.get("tensorrt")
            older = (
                ("tensorrt", "torch", "cuda-python")
                if trt
                else ("torch",)
                if package == "torch"
                else ()
            )
            limits = " ".join(f'"{name}<{".".join(map(str, CUDA_13[name]))}"' for name in older)
            yield (
                f"{package} {version} needs NVIDIA's driver 580 or later, not {driver}",
                limits and f"pip install {limits}",
            )
        if capability and release(capability) < (7, 5) and package != "cuda-python":
            yield f"{package} needs compute capability 7.5, not {capability}", None
    if package == "tensorrt-rtx-cu13" and capability in DATA_CENTRE:
        yield (
            f"TensorRT for RTX does not support compute capability {capability}",
            "pip install tensorrt",
        )


def facts_of(gpu: str) -> tuple[str | None, str | None]:
    """Driver and compute capability of a GPU as `describe_machine` has it."""
    _, _, driver, capability, *_ = [*gpu.split(", "), None, None, None, None]
    return driver, capability


def recommend(machine: Machine, states: Mapping[str, EngineState]) -> Recommendation:
    """The fastest engine and precision that this machine can run; the reason names what would be
    faster.
    """
    features = {*machine["features"], *(["GPU"] if machine["gpus"] else [])}
    options = [(r, name) for r in RULES if not r.needs or r.needs & features for name in r.engines]
    chosen, engine = next(
        (o for o in options if states[label(o[1], o[0].device)]["runs"]), options[0]
    )
    reason = chosen.reason
    if chosen.precision == "int8" and "bf16" in features and "AMX" not in features:
        reason += "; --target openvino --bf16 is slower but needs no calibration"
    fastest, name = options[0]
    best = label(name, fastest.device)
    if install := states[best]["install"]:
        faster = (
            "to run it"
            if (chosen, engine) == options[0]
            else f"{best} in {fastest.precision} is faster"
        )
        reason += f"; {faster}: {install}"
    flag = "" if chosen.precision == "fp32" else f" --{chosen.precision}"
    return {
        "engine": engine,
        "device": chosen.device,
        "precision": chosen.precision,
        "reason": reason,
        "command": f"bbt-accel optimize BUNDLE -o OPTIMIZED --target {engine}{flag}",
    }


def onnxruntime_providers(found: Versions) -> tuple[list[str], list[str]]:
    """The providers that onnxruntime lists, and the problem if it cannot be imported."""
    if not (found["onnxruntime"] or found["onnxruntime-gpu"]):
        return [], []
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers()), []
    except Exception as error:  # a broken installation fails in many ways
        return [], [f"onnxruntime cannot be imported ({first_line(error)}); reinstall it"]


def misfits(found: Versions, providers: Collection[str], gpus: Collection[str]) -> Iterator[str]:
    """What is wrong with the installation: packages that are missing, or do not fit each other or
    this machine.
    """
    cpu, gpu, tensorrt = found["onnxruntime"], found["onnxruntime-gpu"], found["tensorrt"]
    if cpu and gpu:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall -y onnxruntime "
            "onnxruntime-gpu, then pip install either bbt-accel[cpu] or bbt-accel[gpu]"
        )
    elif gpus and cpu:
        replace = 'pip uninstall -y onnxruntime && pip install "bbt-accel[gpu]"'
        yield f"there is a GPU, but ONNX Runtime has no CUDA; replace it: {replace}"
    elif not (cpu or gpu):
        yield 'ONNX Runtime is not installed: pip install "bbt-accel[cpu]", or "bbt-accel[gpu]" for an NVIDIA GPU'
    if gpu and release(gpu) < release(ORT_GRAPHS_SINCE):
        what = f"onnxruntime-gpu {gpu} has no CUDA graphs here, and runs parts on the CPU"
        yield f"{what}; update to {ORT_GRAPHS_SINCE} or later"
    if tensorrt and release(tensorrt) >= (11,) and "TensorrtExecutionProvider" in providers:
        yield (
            f"ONNX Runtime's TensorRT provider links TensorRT 10 (libnvinfer.so.10), not {tensorrt}; "
            "--engine trt does not use that provider and runs with either"
        )
    if tensorrt and found["tensorrt-rtx-cu13"]:
        yield "tensorrt and tensorrt-rtx-cu13 are both installed: tensorrt is used, except for --compute-capability"
