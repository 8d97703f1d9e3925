"""What this machine can run, and what to install for the rest. Needs nothing but the core dependencies."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import bbt_accel
from bbt_accel.errors import first_line

CORE = ("cma", "datasets", "matplotlib", "numpy", "pyarrow", "pydantic", "safetensors", "tokenizers", "typer")
OPTIONAL = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt-rtx-cu13",
    "tensorrt",
    "cuda-python",
    "ray",
    "tensorboard",
    "starlette",
    "uvicorn",
    "tritonclient",
    "geventhttpclient",
)
FEATURES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "AVX-512 VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_tile"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
}
GPU_NOTE = (
    "the GPU engines have not been run on a GPU by this version: "
    "check them with make gpu-check (python -m bbt_accel.benchmarks.gpu_check)"
)


class EngineState(TypedDict):
    runs: bool
    reason: str
    install: str | None
    """The command that brings what is missing; None when nothing is."""


class Machine(TypedDict):
    system: str
    cpu: str
    cores: int
    features: list[str]
    memory_gb: float | None
    gpus: list[str]


class Diagnosis(TypedDict):
    versions: dict[str, str | None]
    machine: Machine
    onnxruntime_providers: list[str]
    engines: dict[str, EngineState]
    warnings: list[str]
    notes: list[str]


def diagnose() -> Diagnosis:
    """Versions, machine and engines, as one JSON-ready object. Never raises for what is not installed."""
    found: dict[str, str | None] = {**dict.fromkeys(("python", "bbt-accel", *CORE, *OPTIONAL)), **installed_versions()}
    machine = describe_machine()
    providers, problem = onnxruntime_providers(found)
    return {
        "versions": found,
        "machine": machine,
        "onnxruntime_providers": providers,
        "engines": engines(found, machine["gpus"], providers),
        "warnings": warnings(found) + problem + mismatches(found, providers, machine["gpus"]),
        "notes": [
            "an ONNX Runtime provider that is listed need not work: without its libraries or its device a session "
            "falls back to the CPU; bbt-accel checks that when it loads an engine",
            GPU_NOTE,
        ],
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Of Python, bbt-accel, and whatever of its dependencies is installed."""
    ours = {"python": platform.python_version(), "bbt-accel": bbt_accel.__version__}
    return ours | {name: found for name in (*CORE, *OPTIONAL) if (found := installed(name)) is not None}


def describe_machine() -> Machine:
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "features": [name for name, wanted in FEATURES.items() if wanted & flags],
        "memory_gb": _memory(),
        "gpus": _gpus(),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def onnxruntime_providers(found: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """The providers that onnxruntime lists, and what is wrong if it cannot be loaded."""
    if not (found["onnxruntime"] or found["onnxruntime-gpu"]):
        return [], []
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers()), []
    except Exception as error:  # a broken installation fails in many ways
        return [], [f"onnxruntime cannot be loaded ({first_line(error)}); install it again"]


def warnings(found: Mapping[str, str | None]) -> list[str]:
    if found["onnxruntime"] and found["onnxruntime-gpu"]:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one of bbt-accel[cpu] or bbt-accel[gpu]"
        ]
    if not (found["onnxruntime"] or found["onnxruntime-gpu"]):
        return ['there is no ONNX Runtime: pip install "bbt-accel[cpu]", or "bbt-accel[gpu]" for an NVIDIA GPU']
    return []


def mismatches(found: Mapping[str, str | None], providers: list[str], gpus: list[str]) -> list[str]:
    """What is installed and does not go together."""
    told = []
    tensorrt = found["tensorrt"]
    if tensorrt and int(tensorrt.split(".")[0]) > 10 and "TensorrtExecutionProvider" in providers:
        told.append(
            f"ONNX Runtime's own TensorRT provider links TensorRT 10 (libnvinfer.so.10), not {tensorrt}; "
            "--engine trt, which does not use it, runs with either"
        )
    if tensorrt and found["tensorrt-rtx-cu13"]:
        told.append("tensorrt and tensorrt_rtx are both installed: tensorrt is used, but for --compute-capability")
    if (gpu := found["onnxruntime-gpu"]) and tuple(map(int, gpu.split(".")[:2])) < (1, 31):
        told.append(f"onnxruntime-gpu {gpu} runs parts of the graphs on the CPU; 1.31 and later have kernels for all")
    if gpus and found["onnxruntime"] and not found["onnxruntime-gpu"]:
        told.append('there is a GPU and an ONNX Runtime without CUDA: pip install "bbt-accel[gpu]" in its place')
    return told


def engines(found: Mapping[str, str | None], gpus: list[str], providers: list[str]) -> dict[str, EngineState]:
    """For each engine whether it can run here, why (not), and the command that brings what is missing."""
    runtime = found["onnxruntime"] or found["onnxruntime-gpu"]
    rtx, cuda = found["tensorrt-rtx-cu13"] or found["tensorrt"], found["cuda-python"]
    no_gpu = None if gpus else "no NVIDIA GPU found (nvidia-smi)"
    no_cuda = None if "CUDAExecutionProvider" in providers else "no onnxruntime-gpu"
    return {
        "torch": _state(_lacks(found, "torch", "transformers"), "export"),
        "ort (cpu)": _state(None if runtime else "onnxruntime is not installed", "cpu"),
        "ort (cuda)": _state(no_cuda, "gpu", no_gpu, first="pip uninstall -y onnxruntime && " if runtime else ""),
        "openvino": _state(_lacks(found, "openvino"), "openvino"),
        "trt": _state(None if rtx and cuda else "TensorRT or cuda-python is not installed", "trt", no_gpu),
        "remote": _state(_lacks(found, "tritonclient", "geventhttpclient"), "remote"),
    }


def _state(lacking: str | None, extra: str, no_gpu: str | None = None, first: str = "") -> EngineState:
    """lacking: what an installation would bring; no_gpu: what none would; first: what must go before it."""
    reasons = [reason for reason in (lacking, no_gpu) if reason]
    install = f'{first}pip install "bbt-accel[{extra}]"' if lacking else None
    return {"runs": not reasons, "reason": "; ".join(reasons) or "installed", "install": install}


def _lacks(found: Mapping[str, str | None], *packages: str) -> str | None:
    missing = [name for name in packages if not found[name]]
    return f"{' and '.join(missing)} not installed" if missing else None


def show(diagnosis: Diagnosis) -> None:
    """Print a diagnosis as tables."""
    from bbt_accel.display import print_facts, print_table

    print_facts("Machine", {**diagnosis["machine"], "gpus": diagnosis["machine"]["gpus"] or "none found"})
    print_facts("Versions", {name: found or "not installed" for name, found in diagnosis["versions"].items()})
    if diagnosis["onnxruntime_providers"]:
        print_facts("ONNX Runtime", {"listed providers": diagnosis["onnxruntime_providers"]})
    rows = [
        (name, "yes" if state["runs"] else "no", state["reason"], state["install"] or "")
        for name, state in diagnosis["engines"].items()
    ]
    print_table("Engines", ["engine", "can run here", "reason", "to install"], rows)
    for warning in diagnosis["warnings"]:
        print(f"warning: {warning}")
    for note in diagnosis["notes"]:
        print(f"note: {note}")
