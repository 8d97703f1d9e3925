"""The report of `bbt-accel doctor`: versions, machine, engines, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from bbt_accel.core.engine_specs import ORT_GRAPHS_SINCE
from bbt_accel.engines.availability import (
    Versions,
    engine_packages,
    engine_states,
    onnxruntime_providers,
    recommend,
)
from bbt_accel.io.machine import dependencies, describe_machine, installed_versions, release

NOTES = (
    "a provider listed by ONNX Runtime may still not work: without its libraries or its device a "
    "session falls back to the CPU. bbt-accel checks this when it loads an engine",
    "this version's GPU engines have not been run on a GPU; check them with make gpu-check in a "
    "checkout",
)


def diagnose() -> dict[str, Any]:
    """Versions, machine, engines and the fastest precision, ready for JSON. Never raises for
    missing packages.
    """
    packages, machine = engine_packages(), describe_machine()
    providers, problems = onnxruntime_providers(packages)
    states = engine_states(packages, machine["gpus"], providers)
    ours = dict.fromkeys(("python", "bbt-accel", *dependencies()))
    return {
        "versions": {**ours, **packages, **installed_versions()},
        "machine": machine,
        "onnxruntime_providers": providers,
        "engines": states,
        "recommended": recommend(machine, states),
        "warnings": [*problems, *misfits(packages, providers, machine["gpus"])],
        "notes": list(NOTES),
    }


def misfits(found: Versions, providers: Collection[str], gpus: Collection[str]) -> Iterator[str]:
    """Packages that are missing, or do not fit each other or this machine."""
    cpu, gpu, tensorrt = found["onnxruntime"], found["onnxruntime-gpu"], found["tensorrt"]
    if cpu and gpu:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install either bbt-accel[cpu] "
            "or bbt-accel[gpu]"
        )
    elif gpus and cpu:
        replace = 'pip uninstall -y onnxruntime && pip install "bbt-accel[gpu]"'
        yield f"there is a GPU, but ONNX Runtime has no CUDA; replace it: {replace}"
    elif not (cpu or gpu):
        yield (
            'ONNX Runtime is not installed: pip install "bbt-accel[cpu]", or "bbt-accel[gpu]" '
            "for an NVIDIA GPU"
        )
    if gpu and release(gpu) < release(ORT_GRAPHS_SINCE):
        yield (
            f"onnxruntime-gpu {gpu} has no CUDA graphs here, and runs parts on the CPU; "
            f"update to {ORT_GRAPHS_SINCE} or later"
        )
    if tensorrt and release(tensorrt) >= (11,) and "TensorrtExecutionProvider" in providers:
        yield (
            "ONNX Runtime's TensorRT provider links TensorRT 10 (libnvinfer.so.10), not "
            f"{tensorrt}; --engine trt does not use that provider and runs with either"
        )
    if tensorrt and found["tensorrt-rtx-cu13"]:
        yield (
            "tensorrt and tensorrt-rtx-cu13 are both installed: tensorrt is used, except for "
            "--compute-capability"
        )
