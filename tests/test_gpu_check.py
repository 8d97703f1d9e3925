"""The GPU check without a GPU: its verdict, its report, and the whole script with the CPU as its device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from bbt_accel.benchmarks import gpu_check, worker
from bbt_accel.benchmarks.gpu_report import Check, GpuReport, Speed
from bbt_accel.benchmarks.steps import STEPS


def report(**changes: Any) -> GpuReport:
    speeds = [
        Speed(method="bbt", engine="eager fp32", ms=60, search_seconds=480, speedup=1, share=0.1),
        Speed(method="bbt", engine="trt fp16", ms=3, search_seconds=24, measured_search=28, speedup=20, share=0.7),
    ]
    facts = {
        "created": "now", "command": "python -m x", "device": "cuda", "gpus": ["NVIDIA X"], "backbone": "roberta-large",
        "rows": 32, "popsize": 20, "n_prompt_tokens": 50, "calls": 8000, "data": "sst2", "interrupted": False,
        "matrix_tflops": 700.0, "bandwidth_gbs": 3000.0,
        "checks": [Check(case="t5 bbt add", engine="trt fp16", error=1e-3)], "speeds": speeds,
        "versions": {"torch": "2"},
    }  # fmt: skip
    return GpuReport(**{**facts, **changes})


def goal(**changes: Any) -> list[Speed]:
    first, last = report().speeds
    return [first, last.model_copy(update=changes)]


def test_a_check_that_meets_every_target_has_passed() -> None:
    assert report().failures() == []
    assert "**PASSED**" in report().markdown()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speeds": goal(measured_search=31.0)}, "not under 30 s"),
        ({"speeds": goal(measured_search=None, search_seconds=float("nan"))}, "not under 30 s"),
        ({"speeds": goal(speedup=11.9)}, "not 12"),
        ({"speeds": goal(share=0.59)}, "not 60%"),
        ({"speeds": goal(share=None)}, "not 60%"),
        ({"speeds": goal(reason="out of memory", ms=None)}, "out of memory"),
        ({"speeds": []}, "not measured"),
        ({"speeds": goal(versions={"cuda graphs": "off"})}, "not CUDA graphs"),
        ({"calls": 100}, "this was calls 100"),
        ({"backbone": "demo"}, "this was backbone demo"),
        ({"n_prompt_tokens": 5, "popsize": 4}, "popsize 4, n_prompt_tokens 5"),
        ({"data": "demo"}, "the shipped rows"),
        ({"interrupted": True}, "the rest has not been checked"),
        ({"checks": []}, "no engine was held"),
        ({"checks": [Check(case="a", engine="trt fp16", error=0.03)]}, "error 3.0e-02"),
        ({"checks": [Check(case="a", engine="ort fp32", error=1e-3)]}, "error 1.0e-03"),
        ({"checks": [Check(case="a", engine="ort fp32", error=float("nan"))]}, "error nan"),
        ({"checks": [Check(case="a", engine="ort fp32", reason="no provider")]}, "no provider"),
    ],
)
def test_whatever_is_missed_is_a_line_of_the_report(changes: dict[str, Any], says: str) -> None:
    found = report(**changes)
    assert any(says in line for line in found.failures())
    assert "**FAILED**" in found.markdown()
    assert says in found.markdown()


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"gpus": []})
    assert gpu_check.main(["-o", str(tmp_path / "report")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no NVIDIA GPU here (nvidia-smi finds none): nothing was checked"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_check_leaves_a_report_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(step: str, **arguments: Any) -> Any:
        if step == "ceilings":
            return {"matrix_tflops": 700.0, "bandwidth_gbs": 3000.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "call", ended)
    output = tmp_path / "report"
    assert gpu_check.main(["--device", "cpu", "--backbone", "demo", "-o", str(output)]) == 1
    found = GpuReport.model_validate_json((output / "report.json").read_text())
    assert (found.interrupted, found.matrix_tflops) == (True, 700.0)
    assert "- interrupted: the rest has not been checked" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_with_the_cpu_as_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inside(step: str, **arguments: Any) -> Any:
        return STEPS[step](**json.loads(json.dumps(arguments, default=str)))

    monkeypatch.setattr(worker, "call", inside)
    monkeypatch.setattr(gpu_check, "VARIANTS", (("bbtv2", "add"),))
    STEPS["tiny"](model_type="bert", output=str(tmp_path / "bert"))
    words = f"--device cpu --backbone {tmp_path / 'bert'} --families gpt2 --methods bbt --popsize 4 --k-shot 1"
    output = tmp_path / "report"
    none = str(tmp_path / "none")
    code = gpu_check.main(
        [
            *words.split(),
            "--n-prompt-tokens",
            "5",
            "--calls",
            "8",
            "--repeats",
            "1",
            "--golden",
            none,
            "--data",
            none,
            "-o",
            str(output),
        ]
    )
    assert code == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"FAILED; the report is in {output}"
    assert {file.name for file in output.iterdir()} == {"report.json", "report.md"}
    found = GpuReport.model_validate_json((output / "report.json").read_text())
    passed = {check.engine for check in found.checks if check.passed}
    assert {"torch fp32", "ort fp32", "ort fp16"} <= passed
    assert [speed.engine for speed in found.speeds] == ["eager fp32", "eager fp16", "ort fp16", "trt fp16"]
    eager, half, ort, _ = found.speeds
    for speed in (eager, half, ort):
        assert speed.reason is None
        assert speed.ms is not None
        assert speed.share is not None
    assert eager.speedup == 1
    assert eager.share == eager.naive_share
    assert ort.naive_share is not None
    assert ort.share is not None
    assert ort.share < ort.naive_share  # work is left out
    assert ort.measured_search is not None
