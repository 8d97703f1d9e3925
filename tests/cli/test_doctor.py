"""The diagnosis: which engines and precisions run on a machine, and what to install."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bbt_accel.cli.doctor import diagnose, misfits
from bbt_accel.engines import availability
from bbt_accel.engines.availability import CUDA, Availability, engine_states, recommend
from bbt_accel.errors import UsageError
from bbt_accel.io.machine import Machine, dependencies, describe_machine
from bbt_accel.predict.bundle_cache import choose

NOTHING = dict.fromkeys(availability.engine_packages())
TORCH = dict.fromkeys(("torch", "transformers"), "2")
CPU = {**TORCH, "onnxruntime": "1.32", "openvino": "2026.4"}


def test_the_diagnosis_is_json() -> None:
    diagnosis = json.loads(json.dumps(diagnose()))
    assert diagnosis["versions"]["python"]
    assert {"rich", "threadpoolctl", "numpy"} <= set(diagnosis["versions"])
    assert set(dependencies()) <= set(diagnosis["versions"])
    assert diagnosis["machine"]["cores"] >= 1
    assert any("have not been run on a GPU" in note for note in diagnosis["notes"])
    engines = {"torch (cpu)", "torch (cuda)", "ort (cpu)", "ort (cuda)", "openvino", "trt"}
    assert engines | {"remote"} <= set(diagnosis["engines"])
    assert {"engine", "precision", "reason"} <= set(diagnosis["recommended"])


def test_a_bare_installation_names_the_extra_of_each_engine() -> None:
    engines = engine_states(NOTHING, [], [])
    assert not any(state["runs"] for state in engines.values())
    extras = ("export", "export", "cpu", "gpu", "openvino", "trt", "remote")
    assert [state["install"] for state in engines.values()][: len(extras)] == [
        f'pip install "bbt-accel[{extra}]"' for extra in extras
    ]
    assert engines["trt"]["reason"].startswith(
        "tensorrt or tensorrt-rtx-cu13 and cuda-python not installed; no NVIDIA"
    )


def test_engines_of_a_machine_with_a_gpu() -> None:
    found = NOTHING | dict.fromkeys(("onnxruntime-gpu", "tensorrt-rtx-cu13", "cuda-python"), "1")
    engines = engine_states(found, ["NVIDIA X"], [CUDA])
    running = {name for name, state in engines.items() if state["runs"]}
    assert running == {"ort (cpu)", "ort (cuda)", "trt"}
    without_gpu = engine_states(found, [], [])["trt"]
    assert not without_gpu["runs"]
    assert without_gpu["reason"] == "no NVIDIA GPU found (nvidia-smi)"


SUITS = """
trt          | tensorrt-rtx-cu13 1.7 | 580.65, 9.0 | not support compute capability 9.0 | tensorrt
trt          | tensorrt-rtx-cu13 1.7 | 570.12, 8.9 | NVIDIA's driver 580 or later, not 570.12 |
trt          | tensorrt-rtx-cu13 1.7 | 580.65, 7.0 | needs compute capability 7.5, not 7.0 |
trt          | tensorrt-rtx-cu13 1.7 | 580.65, 8.9 | installed |
trt          | tensorrt 11.4 | 580.65, 9.0 | installed |
trt          | tensorrt 11.4 | 570.12, 9.0 | needs NVIDIA's driver 580 | "cuda-python<13"
trt          | tensorrt 10.13.2.6 | 570.12, 9.0 | needs NVIDIA's driver 580 | "cuda-python<13"
trt          | tensorrt 10.13.0.35, cuda-python 12.9 | 570.12, 9.0 | installed |
trt          | tensorrt-cu13 11.4 | 580.65, 9.0 | installed |
trt          | tensorrt-cu13 11.4 | 570.12, 9.0 | needs NVIDIA's driver 580 |
trt          | tensorrt-cu12 11.4, cuda-python 12.9 | 570.12, 9.0 | installed |
trt          | tensorrt 10.9, cuda-python 12.9 | 570.12, 9.0 | installed |
ort (cuda)   | onnxruntime-gpu 1.32.0 | 570.12, 9.0 | needs NVIDIA's driver 580 or later |
ort (cuda)   | onnxruntime-gpu 1.27.0 | 570.12, 9.0 | needs NVIDIA's driver 580 or later |
ort (cuda)   | onnxruntime-gpu 1.26.0 | 570.12, 9.0 | installed |
torch (cuda) | torch 2.9.0+cpu | 580.65, 9.0 | this PyTorch has no CUDA | torch
torch (cuda) | torch 2.9.0 | 580.65, 9.0 | installed |
torch (cuda) | torch 2.9.0 | 470.1 | installed |
torch (cuda) | torch 2.13.0 | 570.12, 9.0 | torch 2.13.0 needs NVIDIA's driver | "torch<2.11"
torch (cuda) | torch 2.13.0+cu126 | 570.12, 9.0 | installed |
torch (cuda) | torch 2.13.0 | 580.65, 9.0 | installed |
"""


@pytest.mark.parametrize("line", SUITS.strip().splitlines())
def test_a_package_that_does_not_suit_the_gpu_does_not_run(line: str) -> None:
    """Engine, packages, driver and compute capability; the reason, and what to install."""
    engine, packages, gpu, reason, install = (part.strip() for part in line.split("|"))
    installed = dict(package.split() for package in packages.split(", "))
    found = NOTHING | {"transformers": "5", "cuda-python": "13", **installed}
    state = engine_states(found, [f"NVIDIA X, 80 GiB, {gpu}"], [CUDA])[engine]
    assert reason in state["reason"]
    assert state["runs"] == (reason == "installed")
    assert (state["install"] or "").rpartition(" ")[2] == install


def test_an_onnxruntime_without_cuda_does_not_run_on_a_gpu() -> None:
    found = NOTHING | {"onnxruntime": "1.32", "onnxruntime-gpu": "1.32"}
    state = engine_states(found, ["X"], ["CPUExecutionProvider"])["ort (cuda)"]
    assert not state["runs"]
    assert (
        state["install"]
        == 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "bbt-accel[gpu]"'
    )


def test_the_cpu_package_is_uninstalled_before_the_gpu_package_is_installed() -> None:
    state = engine_states(NOTHING | {"onnxruntime": "1"}, ["X"], [])["ort (cuda)"]
    assert state["install"] == 'pip uninstall -y onnxruntime && pip install "bbt-accel[gpu]"'
    [warning] = misfits(NOTHING | {"onnxruntime": "1.32", "onnxruntime-gpu": "1.32"}, [], [])
    assert "overwrite each other" in warning
    [warning] = misfits(NOTHING, [], [])
    assert 'pip install "bbt-accel[cpu]"' in warning


def machine_with(
    found: dict[str, Any], gpus: Sequence[str], features: Sequence[str] = ("AVX-512 VNNI",)
) -> Availability:
    """What runs on a processor with these packages and GPUs."""
    facts: dict[str, Any] = {"system": "", "cpu": "", "cores": 1, "memory_gib": None}
    machine = Machine(**facts, features=list(features), gpus=list(gpus))
    states = engine_states(NOTHING | found, gpus, [CUDA])
    return Availability(states, recommend(machine, states))


def recommended(
    found: dict[str, Any], features: tuple[str, ...] = (), gpus: tuple[str, ...] = ()
) -> dict[str, str]:
    return machine_with(found, gpus, features).recommended


@pytest.mark.parametrize(
    ("features", "engine", "precision"),
    [
        (("AVX-512 VNNI",), "openvino", "int8"),
        (("AVX-512 VNNI", "bf16"), "openvino", "int8"),
        (("AVX-512 VNNI", "AMX", "bf16"), "openvino", "bf16"),
        (("bf16",), "openvino", "bf16"),
        (("AVX2",), "openvino", "fp32"),
    ],
)
def test_the_fastest_precision_follows_from_the_instruction_sets(
    features: tuple[str, ...], engine: str, precision: str
) -> None:
    found = recommended(CPU, features)
    assert (found["engine"], found["device"], found["precision"]) == (engine, "cpu", precision)
    assert ("--bf16 is slower but needs no calibration" in found["reason"]) == (
        features == ("AVX-512 VNNI", "bf16")
    )
    flag = "" if precision == "fp32" else f" --{precision}"
    assert found["command"] == f"bbt-accel optimize BUNDLE -o OPTIMIZED --target openvino{flag}"


@pytest.mark.parametrize(
    ("found", "features", "gpus", "wanted", "reason"),
    [
        ({"onnxruntime": "1.32"}, ("AVX-512 VNNI",), (), ("ort", "int8"), "openvino in int8"),
        (
            {"onnxruntime": "1.32"},
            ("AVX-512 VNNI", "AMX", "bf16"),
            (),
            ("ort", "int8"),
            "in bf16 is",
        ),
        ({"onnxruntime-gpu": "1.32"}, (), ("X",), ("ort", "fp16"), "trt in fp16"),
        ({"tensorrt": "10.12", "cuda-python": "13"}, (), ("X",), ("trt", "fp16"), None),
        (TORCH, (), (), ("openvino", "fp32"), "to run it"),
    ],
)
def test_a_faster_engine_that_is_not_installed_is_named(
    found: dict[str, Any],
    features: tuple[str, ...],
    gpus: tuple[str, ...],
    wanted: tuple[str, str],
    reason: str | None,
) -> None:
    best = recommended(found, features, gpus)
    assert (best["engine"], best["precision"]) == wanted
    assert ("pip install" in best["reason"]) == (reason is not None)
    assert (reason or "") in best["reason"]


def test_a_broken_onnxruntime_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    providers, [problem] = availability.onnxruntime_providers(NOTHING | {"onnxruntime": "1"})
    assert providers == []
    assert "cannot be imported" in problem


@pytest.mark.skipif(os.name == "nt", reason="needs a script as a program")
def test_gpus_are_those_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 80 GiB, 580.1, 9.0'\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert describe_machine()["gpus"] == ["NVIDIA X, 80 GiB, 580.1, 9.0"]


def test_packages_that_do_not_fit_each_other() -> None:
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    sound = NOTHING | {"onnxruntime-gpu": "1.32"}
    [problem] = misfits(sound | {"tensorrt": "11.4.0"}, listed, ["X"])
    assert "libnvinfer.so.10" in problem
    assert not [*misfits(sound | {"tensorrt": "10.12.0"}, listed, ["X"])]
    assert not [*misfits(sound | {"tensorrt": "11.4.0"}, ["CPUExecutionProvider"], ["X"])]
    [problem] = misfits(sound | {"tensorrt": "10.12", "tensorrt-rtx-cu13": "1.7"}, [], [])
    assert "--compute-capability" in problem
    [problem] = misfits(NOTHING | {"onnxruntime-gpu": "1.26.0"}, [], ["X"])
    assert "1.31" in problem
    assert not [*misfits(NOTHING | {"onnxruntime-gpu": "1.31.1"}, [], ["X"])]
    [problem] = misfits(NOTHING | {"onnxruntime": "1.32"}, [], ["X"])
    assert "bbt-accel[gpu]" in problem


@pytest.mark.parametrize(
    ("engine", "precision", "gpu", "wanted"),
    [
        ("auto", "auto", False, ("openvino", "cpu", "int8")),
        ("auto", "fp16", False, ("ort", "cpu", "fp16")),
        ("ort", "auto", False, ("ort", "cpu", "fp32")),
        ("torch", "bf16", False, ("torch", "cpu", "bf16")),
        ("auto", "auto", True, ("ort", "cuda", "fp16")),
        ("auto", "int8", True, ("openvino", "cpu", "int8")),
        ("ort", "fp16", True, ("ort", "cuda", "fp16")),
        ("ort", "int8", True, ("ort", "cpu", "int8")),
    ],
)
def test_a_fit_runs_on_the_fastest_engine_of_what_is_given(
    engine: str, precision: Any, gpu: bool, wanted: tuple[str, str, str]
) -> None:
    found = CPU | ({"onnxruntime": None, "onnxruntime-gpu": "1.32"} if gpu else {})
    here = machine_with(found, ["X"] if gpu else [])
    assert choose(engine, precision, here)[:3] == wanted


def test_a_fit_runs_a_named_engine_on_the_gpu_though_another_is_faster_there() -> None:
    trt = {"onnxruntime": None, "onnxruntime-gpu": "1.32", "tensorrt": "11.4", "cuda-python": "13"}
    here = machine_with(CPU | trt, ["X"])
    assert choose(here=here)[:3] == ("trt", "cuda", "fp16")
    assert choose("ort", here=here)[:3] == ("ort", "cuda", "fp16")
    assert choose("openvino", here=here)[:3] == ("openvino", "cpu", "fp32")


def test_a_precision_that_no_engine_here_runs_in_is_one_line() -> None:
    with pytest.raises(UsageError, match="no engine of this machine runs in int4; see bbt-accel"):
        choose("auto", "int4", machine_with({}, []))
