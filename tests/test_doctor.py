from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bbt_accel import doctor

NOTHING = dict.fromkeys((*doctor.CORE, *doctor.OPTIONAL))


def test_diagnosis_is_json_and_says_what_was_not_tried() -> None:
    diagnosis = json.loads(json.dumps(doctor.diagnose()))
    assert diagnosis["versions"]["python"]
    assert diagnosis["machine"]["cores"] >= 1
    assert any("have not been run on a GPU" in note for note in diagnosis["notes"])
    assert set(diagnosis["engines"]) == {"torch", "ort (cpu)", "ort (cuda)", "openvino", "trt", "remote"}


def test_bare_installation_names_the_extra_of_each_engine() -> None:
    engines = doctor.engines(NOTHING, gpus=[], providers=[])
    assert not any(state["runs"] for state in engines.values())
    assert [state["install"] for state in engines.values()] == [
        f'pip install "bbt-accel[{extra}]"' for extra in ("export", "cpu", "gpu", "openvino", "trt", "remote")
    ]


def test_engines_of_a_machine_with_a_gpu() -> None:
    found = NOTHING | dict.fromkeys(("onnxruntime-gpu", "tensorrt-rtx-cu13", "cuda-python"), "1")
    engines = doctor.engines(found, gpus=["NVIDIA X"], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert {name for name, state in engines.items() if state["runs"]} == {"ort (cpu)", "ort (cuda)", "trt"}
    without_gpu = doctor.engines(found, gpus=[], providers=["CUDAExecutionProvider"])
    assert without_gpu["trt"] == {"runs": False, "reason": "no NVIDIA GPU found (nvidia-smi)", "install": None}


def test_the_cpu_package_goes_before_the_gpu_package_comes() -> None:
    state = doctor.engines(NOTHING | {"onnxruntime": "1"}, gpus=["X"], providers=["CPUExecutionProvider"])["ort (cuda)"]
    assert state["install"] == 'pip uninstall -y onnxruntime && pip install "bbt-accel[gpu]"'
    [warning] = doctor.warnings(NOTHING | {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    assert "overwrite each other" in warning
    [warning] = doctor.warnings(NOTHING)
    assert 'pip install "bbt-accel[cpu]"' in warning


def test_broken_onnxruntime_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    providers, [problem] = doctor.onnxruntime_providers(NOTHING | {"onnxruntime": "1"})
    assert providers == []
    assert "cannot be loaded" in problem


def test_gpus_are_what_nvidia_smi_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout="NVIDIA X, 80 GiB, 580.1\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert doctor.describe_machine()["gpus"] == ["NVIDIA X, 80 GiB, 580.1"]


def test_what_does_not_go_together_is_told() -> None:
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    [told] = doctor.mismatches(NOTHING | {"tensorrt": "11.4.0"}, listed, ["X"])
    assert "libnvinfer.so.10" in told
    assert doctor.mismatches(NOTHING | {"tensorrt": "10.12.0"}, listed, ["X"]) == []
    assert doctor.mismatches(NOTHING | {"tensorrt": "11.4.0"}, ["CPUExecutionProvider"], ["X"]) == []
    [told] = doctor.mismatches(NOTHING | {"tensorrt": "10.12", "tensorrt-rtx-cu13": "1.7"}, [], [])
    assert "--compute-capability" in told
    [told] = doctor.mismatches(NOTHING | {"onnxruntime-gpu": "1.26.0"}, [], ["X"])
    assert "1.31" in told
    assert doctor.mismatches(NOTHING | {"onnxruntime-gpu": "1.31.1"}, [], ["X"]) == []
    [told] = doctor.mismatches(NOTHING | {"onnxruntime": "1.32"}, [], ["X"])
    assert "bbt-accel[gpu]" in told
