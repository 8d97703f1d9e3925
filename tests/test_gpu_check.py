"""The GPU check without a GPU: its verdict, its report, and the whole script with the CPU as its
device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import torch
from conftest import Export
from tiny_bundles import tiny_bundle

from bbt_accel import load_engine
from bbt_accel.benchmarks import gpu_check, gpu_state, steps
from bbt_accel.benchmarks.bench_report import BenchReport, Measurement, TuningScores
from bbt_accel.benchmarks.ceilings import matrix_rates
from bbt_accel.benchmarks.gpu_check import GpuCheck
from bbt_accel.benchmarks.gpu_report import EngineCheck, GpuReport, TimedCheck, worst
from bbt_accel.benchmarks.gpu_state import GpuState
from bbt_accel.benchmarks.gpu_steps import validation_error
from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.benchmarks.options import bench_options
from bbt_accel.engines.staged import StagedBoundBatch
from bbt_accel.exporters.trace.validate import sample_rows
from bbt_accel.io import processes
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.progress import StepProgress


def tuned(seconds: float) -> TuningScores:
    return TuningScores(seeds=[42], budget=8000, scores=[0.5], mean=0.5, std=None, seconds=seconds)


def speed(
    task: str = "sst2",
    asked: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
    **changes: Any,
) -> BenchReport:
    """A benchmark that meets every target; `changes` are to the row of TensorRT in fp16."""
    options = {
        "backbone": "work/roberta-large",
        "task": task,
        "n_prompt_tokens": 50,
        "popsize": 20,
        "budget": 8000,
    }
    goal = {"ms_median": 3.0, "calls_per_second": 333.0, "speedup": 20.0, "tuned": tuned(28.0)}
    measured = {"fp16 PyTorch": 600e3, "copy, bytes": 2800.0} | (rates or {})
    rows = [
        Measurement(
            engine="eager",
            precision="fp32",
            baseline=True,
            ms_median=60,
            speedup=1,
            flops=3 * 10**12,
        ),
        Measurement(engine="torch", precision="fp16", ms_median=6, speedup=10, flops=15 * 10**11),
        Measurement(engine="trt", precision="fp16", **goal | changes),
    ]
    return BenchReport(
        command="c", options=bench_options(**options | (asked or {})), task=task, metric="accuracy",
        machine={**describe_machine(), "fp32_rate": 1, "fp32_rate_by": "x", "rates": measured, "unavailable": {}},
        n_rows=32, length=80, padding=0.1, n_test_rows=8, drift=None, fastest_baseline="eager fp32", rows=rows,
        notes=[],
    )  # fmt: skip


def report(**changes: Any) -> GpuReport:
    facts = {
        "command": "python -m x", "options": {"backbone": "roberta-large", "device": "cuda"},
        "rows": [EngineCheck(case="t5 bbt add", engine="trt fp16", error=1e-3)], "benchmarks": [speed()],
        "expected": [("t5 bbt add", "trt fp16")], "gpu": GpuState(name="NVIDIA H100 80GB HBM3", others=0),
        "timed": [timed(engine="torch fp16", launches=False), timed()],
    }  # fmt: skip
    return GpuReport(**{**facts, **changes})


def timed(**changes: Any) -> TimedCheck:
    """A bucket whose numbers are right, as a launched CUDA graph as well."""
    facts = {
        "case": "bbt, 20 × 16 × 80",
        "engine": "trt fp16",
        "error": 2e-3,
        "launches": True,
        "identical": True,
        "tokens": 2960,
    }
    return TimedCheck(
        **{**facts, "noise": {"enqueued": 2e-3, "captured": 2e-3, "launched": 2e-3}} | changes
    )


def timed_as(**changes: Any) -> dict[str, Any]:
    return {"timed": [timed(engine="torch fp16", launches=False), timed(**changes)]}


def goal(**changes: Any) -> dict[str, Any]:
    return {"benchmarks": [speed(**changes)]}


def baseline(engine: str, precision: str) -> dict[str, Any]:
    """A baseline that has failed, and nothing else."""
    measured = speed()
    failed = Measurement(
        engine=engine, precision=precision, baseline=True, status="failed", reason="out of memory"
    )
    return {"benchmarks": [measured.model_copy(update={"rows": [*measured.rows, failed]})]}


def failed_check(**changes: Any) -> dict[str, Any]:
    return {"rows": [EngineCheck(case="a", **{"engine": "ort fp32"} | changes)]}


def test_a_check_that_meets_every_target_has_passed() -> None:
    assert report().failures() == []
    assert "**PASSED**" in report().markdown()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (goal(tuned=tuned(31.0)), "not under 30 s"),
        (goal(tuned=None, ms_median=float("nan")), "not under 30 s"),
        (goal(speedup=11.9), "not 12"),
        (goal(calls_per_second=236.0), "59% of the fp16 rate, not 60%"),
        (goal(calls_per_second=None), "not 60%"),
        (
            goal(calls_per_second=240.0)
            | {
                "timed": [
                    timed(engine="torch fp16", launches=False, tokens=3040),
                    timed(tokens=2960),
                ]
            },
            "58% of the fp16 rate, not 60%",
        ),
        (goal(status="failed", reason="out of memory", ms_median=None), "out of memory"),
        (
            goal(status="differs", reason="64 of 64 test rows have NaN"),
            "64 of 64 test rows have NaN",
        ),
        ({"benchmarks": []}, "not measured"),
        (goal(graph_share=0.0), "0.0% of the timed calls were CUDA graphs"),
        ({"partial": ["the family bert"]}, "a partial check: the family bert was not asked for"),
        (baseline("eager-tf32", "fp32"), "bbt, eager-tf32 fp32: out of memory"),
        (baseline("eager", "fp16"), "bbt, eager fp16: out of memory"),
        (goal(asked={"budget": 100}), "this was budget 100"),
        ({"options": {"backbone": "demo", "device": "cuda"}}, "this was backbone demo"),
        (goal(asked={"n_prompt_tokens": 5, "popsize": 4}), "popsize 4, n_prompt_tokens 5"),
        (goal(task="demo"), "the shipped rows"),
        ({"errors": ["bbtv2: no GPU memory"]}, "bbtv2: no GPU memory"),
        ({"interrupted": True}, "the rest has not been checked"),
        ({"rows": [], "expected": []}, "no engine was validated"),
        ({"rows": []}, "trt fp16 on t5 bbt add: not checked"),
        (
            {"expected": [("t5 bbt add", "trt fp16"), ("t5 bbt add", "trt bf16")]},
            "trt bf16 on t5 bbt add: not checked",
        ),
        (failed_check(engine="trt fp16", error=0.03), "3.0e-02, more than 1e-02"),
        (failed_check(engine="trt bf16", error=0.09), "9.0e-02, more than 8e-02"),
        (failed_check(error=1e-3), "1.0e-03, more than 1e-04"),
        (failed_check(error=float("nan")), "nan, more than"),
        (goal(graph_share=0.5), "50.0% of the timed calls were CUDA graphs"),
        (
            {"timed": [timed(engine="torch fp16", launches=False)]},
            "bbt, trt fp16: timed, but not compared",
        ),
        (timed_as(error=0.02), "more than 1e-02"),
        (
            timed_as(noise={"enqueued": 1e-3, "captured": 1e-3}, identical=None),
            "never launched as a CUDA graph",
        ),
        (timed_as(identical=False), "launched and enqueued calls differ"),
        (
            {"gpu": GpuState(name="NVIDIA GeForce RTX 4090")},
            "on an H100; this was NVIDIA GeForce RTX 4090",
        ),
        (
            {"gpu": GpuState(name="NVIDIA GeForce RTX 9090")},
            "the peak of NVIDIA GeForce RTX 9090 is not known",
        ),
        ({"gpu": None}, "its ceilings cannot be checked"),
        ({"gpu": GpuState(name="NVIDIA H100 80GB HBM3", others=2)}, "2 other processes"),
        (goal(rates={"fp16 PyTorch": 300e3}), "30% of the peak of NVIDIA H100"),
        (goal(rates={"copy, bytes": 900.0}), "27% of the peak of NVIDIA H100"),
        (failed_check(reason="no provider"), "no provider"),
    ],
)
def test_whatever_is_missed_is_a_line_of_the_report(changes: dict[str, Any], says: str) -> None:
    found = report(**changes)
    assert any(says in line for line in found.failures())
    assert "**FAILED**" in found.markdown()
    assert says in found.markdown()


def test_one_number_that_is_not_finite_is_the_worst_wherever_it_stands() -> None:
    assert worst([0.1, float("nan")]) == float("inf")
    assert worst([float("nan"), 0.1]) == float("inf")
    assert worst([0.1, 0.2]) == 0.2
    assert worst([]) == float("inf"), "nothing was compared"


@pytest.mark.parametrize("per_call", [1000, 10**6], ids=["the population in parts", "whole"])
def test_the_overhead_of_a_call_is_found_by_the_calls_that_are_made(
    tiny: Export, monkeypatch: pytest.MonkeyPatch, per_call: int
) -> None:
    """An engine whose calls cost 700 tokens: the time is (calls · 700 + tokens) · slope."""
    bundle, popsize = tiny("roberta", "bbt", "add"), 7
    with (
        load_engine(bundle, "torch", threads=1) as engine,
        engine.bind(sample_rows(bundle, 12)) as bound,
    ):
        assert isinstance(bound, StagedBoundBatch)
        bound.engine.call_overhead, bound.engine.tokens_per_call = 1, per_call
        tokens = sum(len(bucket.rows) * bucket.length for bucket in bound.buckets)

        def ms_per_candidate(count: int) -> float:
            calls = sum(len([*bound.chunks(count, bucket)]) for bucket in bound.buckets)
            return (700 * calls + count * tokens) * 0.01 / count

        monkeypatch.setattr(steps, "generation", lambda bound, count: count)
        monkeypatch.setattr(
            steps, "milliseconds", lambda count, repeats: [ms_per_candidate(count)] * repeats
        )
        found = steps.call_overhead(bound, popsize, [ms_per_candidate(popsize)], 0)
        bound.engine.tokens_per_call = (
            1  # a call for each candidate: its overhead cannot be told from its tokens
        )
        assert steps.call_overhead(bound, popsize, [1.0], 0) is None
    assert found == pytest.approx(700)


def test_a_baseline_that_nothing_depends_on_may_fail() -> None:
    found = report(**baseline("compiled", "fp16"))
    assert found.failures() == []
    assert "- compiled fp16: failed: out of memory" in found.markdown()


def test_traces_of_another_loss_are_named(tmp_path: Path) -> None:
    for name in ("bert_hinge_cat", "bert_perf"):
        (tmp_path / f"{name}.npz").touch()
    given = argparse.Namespace(
        device="cpu", golden=tmp_path, report={"command": "c", "options": {}}
    )
    check = GpuCheck(given, tmp_path, StepProgress(False))
    check.replay_traces()
    assert (
        "traces of another loss than the cross entropy: bert_hinge_cat, bert_perf"
        in check.report.left_out
    )


def test_what_was_not_asked_for_makes_a_check_partial(tmp_path: Path) -> None:
    given = argparse.Namespace(
        device="cpu",
        families=[],
        methods=["bbt"],
        golden=tmp_path,
        report={"command": "c", "options": {}},
    )
    check = GpuCheck(given, tmp_path, StepProgress(False))
    check.measure = lambda method: None  # type: ignore[method-assign]
    found = check.run().partial
    assert {"the family bert", "the family gpt2", "the speed of bbtv2"} <= set(found)
    assert "the speed of bbt" not in found


@pytest.mark.parametrize(
    ("optimization", "says"),
    [
        ({"attention_fused": 24, "attention_not_fused": 1}, "24 times one kernel, 1 times several"),
        ({"attention_fused": 0, "attention_not_fused": 0}, "the builder does not say"),
        (None, None),
    ],
)
def test_the_report_says_where_attention_is_one_kernel(
    tmp_path: Path, optimization: dict[str, object] | None, says: str | None
) -> None:
    info = tiny_bundle(tmp_path).info.model_copy(update={"optimization": optimization})
    assert gpu_check.fused_attention(info) == says
    assert (
        f"- Attention of bbt, trt fp16: {says}"
        in report(attention=[f"bbt, trt fp16: {says}"]).markdown()
    )


def test_predictions_that_differ_are_said_and_are_no_failure() -> None:
    found = report(
        **goal(status="differs", reason="agreement 0.950 is less than 0.97", max_error=0.01)
    )
    assert found.failures() == []
    assert "- trt fp16: differs: agreement 0.950" in found.markdown()


def test_what_was_left_out_is_said_and_is_no_failure() -> None:
    found = report(left_out=["traces of the original program: there are none in golden"])
    assert found.failures() == []
    assert "- Not checked: traces of the original program" in found.markdown()


def test_a_gpu_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("""#!/bin/sh
case "$*" in
*compute-apps*) echo 101; echo 102 ;;
*"-i GPU-3"*) echo "NVIDIA H100 80GB HBM3, 580.1, 1755, 1980, 612.50, 700.00, [N/A]" ;;
esac
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu_state.read_gpu("GPU-3")
    assert found is not None
    assert (found.clock_mhz, found.power_limit_w, found.temperature) == (1755, 700, None)
    assert (
        str(found) == "NVIDIA H100 80GB HBM3, driver 580.1, 1755.0 of 1980.0 MHz, 612.5 of 700.0 W"
    )
    assert gpu_state.processes_on("GPU-3") == 2
    assert gpu_state.read_gpu("GPU-0") is None


@pytest.mark.parametrize(
    ("properties", "named"),
    [
        ({"uuid": "5a1f-07"}, "GPU-5a1f-07"),
        ({"pci_domain_id": 0, "pci_bus_id": 0x3B, "pci_device_id": 0}, "00000000:3b:00.0"),
        ({}, "1"),
    ],
)
def test_nvidia_smi_is_asked_for_the_gpu_that_this_process_computes_on(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", {1: SimpleNamespace(**properties)}.__getitem__
    )
    assert gpu_state.identity(1) == named


@pytest.mark.parametrize(
    ("name", "fp16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e3),
        ("NVIDIA H100 PCIe", 756e3),
        ("NVIDIA A100-SXM4-80GB", 312e3),
        ("NVIDIA A100 80GB PCIe", 312e3),
        ("NVIDIA L40S", 362e3),
        ("NVIDIA L4", 121e3),
        ("Tesla T4", 65e3),
        ("Tesla V100-SXM2-16GB", 125e3),
        ("NVIDIA GeForce RTX 4090", 165e3),
        *(
            (f"NVIDIA {name}", None)
            for name in ("L40", "T400", "A10G", "RTX A1000", "GH200 480GB", "TITAN X")
        ),
        *(
            (f"NVIDIA GeForce RTX {name}", None)
            for name in ("4090 D", "4090 Laptop GPU", "3090 Ti")
        ),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name(name: str, fp16: float | None) -> None:
    peak = gpu_state.peak_of(name)
    assert (peak and peak.fp16) == fp16


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"gpus": []})
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main(["-o", str(tmp_path / "report")])
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no NVIDIA GPU here (nvidia-smi finds none), and nothing was checked; see bbt-accel doctor"
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_check_leaves_a_report_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(step: Callable[..., Any], **arguments: Any) -> Any:
        if step is validation_error:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "call", ended)
    output = tmp_path / "report"
    assert gpu_check.main(["--device", "cpu", "--backbone", "demo", "-o", str(output)]) == 1
    found = GpuReport.model_validate_json((output / "report.json").read_text())
    assert found.interrupted
    assert [check.passed for check in found.rows] == [False]
    assert "- interrupted: the rest has not been checked" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_with_the_cpu_as_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inside(step: Callable[..., Any], **arguments: Any) -> Any:
        if step is matrix_rates:
            return {
                "fp32_rate": 1,
                "fp32_rate_by": "x",
                "rates": {"fp16 PyTorch": 700e3},
                "unavailable": {},
            }
        return json.loads(json.dumps(step(**json.loads(json.dumps(arguments, default=str)))))

    monkeypatch.setattr(processes, "call", inside)
    monkeypatch.setattr(gpu_check, "VARIANTS", (("bbtv2", "add"),))
    make_backbone("tiny-bert", tmp_path / "bert")
    words = f"--device cpu --backbone {tmp_path / 'bert'} --families gpt2 --methods bbt --popsize 4 --k-shot 1"
    words += f" --n-prompt-tokens 5 --calls 8 --repeats 1 --golden {tmp_path / 'none'}"
    output = tmp_path / "report"
    assert gpu_check.main([*words.split(), "-o", str(output)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"FAILED; the report is in {output}"
    assert {file.name for file in output.iterdir()} == {"report.html", "report.json", "report.md"}
    found = GpuReport.model_validate_json((output / "report.json").read_text())
    passed = {check.engine for check in found.rows if check.passed}
    assert {"torch fp32", "torch fp16", "ort fp32", "ort fp16"} <= passed
    (benchmark,) = found.benchmarks
    rows = {row.label: row for row in benchmark.rows}
    assert {"eager fp32", "torch fp16", "ort fp16", "trt fp16"} <= set(rows)
    assert rows["eager fp32"].speedup == 1
    assert rows["eager fp32"].tuned is None  # a whole search in eager takes too long
    assert rows["torch fp16"].flops < rows["eager fp32"].flops  # type: ignore[operator] # redundant work is avoided
    for name in ("torch fp16", "ort fp16"):
        assert rows[name].reason is None
        assert rows[name].ms_median is not None
        assert rows[name].tuned is not None
    assert "| ort fp16 |" in found.markdown()
    compared = {check.engine: check for check in found.timed}
    assert {"torch fp16", "ort fp16"} <= set(compared)
    assert all(check.passed for check in compared.values()), [check.result for check in found.timed]
