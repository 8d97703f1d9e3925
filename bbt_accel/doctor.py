"""What this machine can run, what is fastest on it, and what to install for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, TypedDict

from bbt_accel.engine_specs import Backend, Device, Precision, engine_names, engine_spec
from bbt_accel.errors import first_line
from bbt_accel.machine import Machine, dependencies, describe_machine, installed, installed_versions

NOTES = (
    "a provider listed by ONNX Runtime may still not work: without its libraries or its device a session falls back to "
    "the CPU. bbt-accel checks this when it loads an engine",
    "this version's GPU engines have not been run on a GPU; check them with make gpu-check "
    "(python -m bbt_accel.benchmarks.gpu_check)",
)
Versions = Mapping[str, str | None]


class EngineState(TypedDict):
    runs: bool
    reason: str
    install: str | None
    """The command that installs what is missing; None if nothing is."""


class Recommendation(TypedDict):
    engine: str
    device: Device
    precision: Precision
    reason: str
    command: str
    """The command that makes the bundle."""


class Diagnosis(TypedDict):
    versions: dict[str, str | None]
    machine: Machine
    onnxruntime_providers: list[str]
    engines: dict[str, EngineState]
    recommended: Recommendation
    warnings: list[str]
    notes: list[str]


class Rule(NamedTuple):
    """An engine and a precision, and what makes them fast: one of the instruction sets in `needs`, or a GPU."""

    engine: str
    device: Device
    precision: Precision
    reason: str
    needs: frozenset[str] = frozenset()


GPU = frozenset({"GPU"})
INT8 = frozenset({"AVX-512 VNNI", "AMX"})
BF16 = frozenset({"bf16"})
TENSOR_CORES = "the GPU's tensor cores multiply fp16"
DOT_PRODUCTS = "the processor has 8-bit dot products (VNNI or AMX)"
FP32_ONLY = "the processor has no fast arithmetic below fp32"
RULES = (
    Rule("trt", "cuda", "fp16", TENSOR_CORES, GPU),
    Rule("ort", "cuda", "fp16", TENSOR_CORES, GPU),
    Rule("openvino", "cpu", "int8", DOT_PRODUCTS, INT8),
    Rule("ort", "cpu", "int8", DOT_PRODUCTS, INT8),
    Rule("openvino", "cpu", "bf16", "the processor multiplies bf16", BF16),
    Rule("openvino", "cpu", "fp32", FP32_ONLY),
    Rule("ort", "cpu", "fp32", FP32_ONLY),
)
"""From the fastest to the slowest."""


def diagnose() -> Diagnosis:
    """Versions, machine, engines and the fastest precision, ready for JSON. Never raises for missing packages."""
    found = versions()
    machine = describe_machine()
    providers, problems = onnxruntime_providers(found)
    states = engines(found, machine["gpus"])
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
    """Python, bbt-accel, its dependencies, and what the engines need; None for what is not installed."""
    backends = [backend for name in engine_names() for backend in engine_spec(name).backends.values()]
    packages = {one: installed(one) for backend in backends for need in backend.packages for one in need.split("|")}
    return {**dict.fromkeys(("python", "bbt-accel", *dependencies())), **packages, **installed_versions()}


def engines(found: Versions, gpus: Collection[str]) -> dict[str, EngineState]:
    """For each engine and device whether it can run here, why (not), and the command that installs what is missing."""
    return {
        label(name, device): _state(backend, device, found, gpus)
        for name in engine_names()
        for device, backend in engine_spec(name).backends.items()
    }


def label(name: str, device: Device) -> str:
    """The engine, and its device if it has several."""
    return f"{name} ({device})" if len(engine_spec(name).backends) > 1 else name


def _state(backend: Backend, device: Device, found: Versions, gpus: Collection[str]) -> EngineState:
    missing = [need for need in backend.packages if not any(found.get(one) for one in need.split("|"))]
    reasons = [f"{' and '.join(missing).replace('|', ' or ')} not installed"] if missing else []
    if device == "cuda" and not gpus:
        reasons.append("no NVIDIA GPU found (nvidia-smi)")
    uninstall = f"pip uninstall -y {backend.replaces} && " if found.get(backend.replaces) else ""
    wanted = f'"bbt-accel[{backend.extra}]"' if backend.extra else " ".join(need.split("|")[0] for need in missing)
    return {
        "runs": not reasons,
        "reason": "; ".join(reasons) or "installed",
        "install": f"{uninstall}pip install {wanted}" if missing else None,
    }


def recommend(machine: Machine, states: Mapping[str, EngineState]) -> Recommendation:
    """The fastest engine and precision that this machine can run; the reason names what would be faster."""
    features = {*machine["features"], *(GPU if machine["gpus"] else ())}
    rules = [rule for rule in RULES if not rule.needs or rule.needs & features]
    chosen = next((rule for rule in rules if states[label(rule.engine, rule.device)]["runs"]), rules[0])
    reason = chosen.reason
    if chosen.precision == "int8" and features & BF16:
        reason += "; --target openvino --bf16 is slower but needs no calibration"
    best = label(rules[0].engine, rules[0].device)
    if install := states[best]["install"]:
        faster = "to run it" if chosen is rules[0] else f"{best} in {rules[0].precision} is faster"
        reason += f"; {faster}: {install}"
    flag = "" if chosen.precision == "fp32" else f" --{chosen.precision}"
    return {
        "engine": chosen.engine,
        "device": chosen.device,
        "precision": chosen.precision,
        "reason": reason,
        "command": f"bbt-accel optimize BUNDLE -o OPTIMIZED --target {chosen.engine}{flag}",
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
    """What is wrong with the installation: packages that are missing, or do not fit each other or this machine."""
    cpu, gpu, tensorrt = found["onnxruntime"], found["onnxruntime-gpu"], found["tensorrt"]
    if cpu and gpu:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall -y onnxruntime "
            "onnxruntime-gpu, then pip install either bbt-accel[cpu] or bbt-accel[gpu]"
        )
    elif gpus and cpu:
        yield 'there is a GPU, but ONNX Runtime has no CUDA: replace it by pip install "bbt-accel[gpu]"'
    elif not (cpu or gpu):
        yield 'ONNX Runtime is not installed: pip install "bbt-accel[cpu]", or "bbt-accel[gpu]" for an NVIDIA GPU'
    if gpu and tuple(map(int, gpu.split(".")[:2])) < (1, 31):
        yield f"onnxruntime-gpu {gpu} runs parts of the graphs on the CPU; 1.31 and later do not"
    if tensorrt and int(tensorrt.split(".")[0]) > 10 and "TensorrtExecutionProvider" in providers:
        yield (
            f"ONNX Runtime's TensorRT provider links TensorRT 10 (libnvinfer.so.10), not {tensorrt}; "
            "--engine trt does not use that provider and runs with either"
        )
    if tensorrt and found["tensorrt-rtx-cu13"]:
        yield "tensorrt and tensorrt-rtx-cu13 are both installed: tensorrt is used, except for --compute-capability"
