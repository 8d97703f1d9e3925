from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import tiny_bundle
from typer.testing import CliRunner

from bbt_accel.benchmarks import worker
from bbt_accel.benchmarks.bench import run_bench
from bbt_accel.benchmarks.options import Options
from bbt_accel.benchmarks.report import Report
from bbt_accel.benchmarks.steps import STEPS
from bbt_accel.bundle import write_info
from bbt_accel.cli import app
from bbt_accel.errors import BbtError, DataError, EngineError, ExportError, MissingDependency, UsageError

SMALL: dict[str, Any] = {"backbone": "demo", "task": "demo", "rows": 4, "popsize": 2, "repeats": 1, "test_rows": 8}


class Inside:
    """The steps in this process, on a bundle without graphs; every engine computes what `dummy` does."""

    def __init__(self, method: str = "bbt") -> None:
        self.method = method
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.errors: dict[tuple[str, str], BbtError] = {}
        """By step, and the name of an engine or of an optimized bundle."""

    def __call__(self, step: str, **arguments: Any) -> Any:
        given = json.loads(json.dumps(arguments, default=str))
        self.calls.append((step, given))
        key = given.get("engine", {}).get("name") or Path(given.get("output", "")).name
        if (step, key) in self.errors:
            raise self.errors[step, key]
        if step == "rates":
            return {"fp32_rate": 100.0, "int8_rate": None, "int8_rate_by": "not measured (test)"}
        if step in ("export", "optimize"):
            return self.write(Path(given["output"]))
        flops = given.pop("flops", False)
        given["engine"] |= {"name": "dummy", "without": []}
        found = STEPS[step](**given, **({"flops": False} if step == "measure" else {}))
        return found | {"flops": 10**9} if flops else found

    def write(self, folder: Path) -> None:
        bundle = tiny_bundle(folder)
        write_info(folder, bundle.info.model_copy(update={"method": self.method, "stages": []}))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    fake = Inside()
    monkeypatch.setattr(worker, "call", fake)
    return fake


def test_report(inside: Inside, tmp_path: Path) -> None:
    report = run_bench(**SMALL, engines=["torch", "ort"], output=tmp_path / "out")
    assert [row.label for row in report.rows] == ["eager fp32", "torch fp32", "ort fp32", "ort fp16", "ort int8"]
    assert {row.status for row in report.rows} == {"passed"}
    for row in report.rows:
        assert row.ms_median is not None
        assert row.ms_p90 is not None
        assert 0 < row.ms_median <= row.ms_p90
        assert row.candidates_per_second == pytest.approx(1000 / row.ms_median)
        assert row.matrix_share == pytest.approx(row.candidates_per_second * 1e9 / 100e9)
        assert (row.max_error, row.agreement) == (0.0, 1.0)
        assert row.score == report.rows[0].score is not None
        assert row.bundle_mib is not None
        assert row.peak_mib is not None
        assert row.tuned is None
    assert report.rows[0].speedup == 1.0
    assert report.workload.rows == 4
    assert report.workload.test_rows == 8
    assert report.baseline.drift is not None


def test_files(inside: Inside, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run_bench(**SMALL, engines=["ort"], output=output)
    assert sorted(file.name for file in output.iterdir()) == ["report.json", "report.md", "report.png"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert Report.model_validate_json((output / "report.json").read_text()) == report
    text = (output / "report.md").read_text()
    for row in report.rows:
        assert text.count(f"| {row.label} |") == 2
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BbtError, match="exists already"):
        run_bench(**SMALL, engines=["ort"], output=output)


def test_failures_are_rows(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {
        ("optimize", "openvino-int8"): MissingDependency('pip install "bbt-accel[openvino]"'),
        ("compare", "torch"): EngineError("out of memory"),
    }
    report = run_bench(
        **SMALL, engines=["torch", "openvino", "trt"], precisions=["fp32", "int8"], output=tmp_path / "out"
    )
    found = {row.label: (row.status, row.reason, row.speedup is not None) for row in report.rows}
    assert found == {
        "eager fp32": ("passed", None, True),
        "torch fp32": ("failed", "out of memory", True),
        "torch int8": ("failed", "torch takes fp32", False),
        "openvino fp32": ("passed", None, True),
        "openvino int8": ("not installed", 'pip install "bbt-accel[openvino]"', False),
        "trt fp32": ("failed", "trt runs on a GPU: add --device cuda, so that eager runs there too", False),
        "trt int8": ("failed", "trt takes fp32, fp16, bf16", False),
    }
    text = (tmp_path / "out" / "report.md").read_text()
    for label in found:
        assert f"| {label} |" in text
    assert "add --device cuda" in text


def test_eager_must_run(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {("measure", "eager"): EngineError("out of memory")}
    with pytest.raises(EngineError, match="the eager baseline failed: out of memory"):
        run_bench(**SMALL, engines=["ort"], output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_everywhere_is_an_error(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {("export", "exported"): ExportError("no LM head")}
    with pytest.raises(ExportError, match="no LM head"):
        run_bench(**SMALL, output=tmp_path / "out")
    with pytest.raises(DataError, match="--rows 100000"):
        run_bench(**SMALL | {"rows": 100000}, output=tmp_path / "out")


def test_tune(inside: Inside, tmp_path: Path) -> None:
    report = run_bench(
        **SMALL | {"popsize": 4},
        k_shot=2,
        engines=["ort"],
        precisions=["fp32"],
        tune=True,
        seeds=2,
        budget=8,
        output=tmp_path / "out",
    )
    assert report.workload.prompt == "tuned"
    for row in report.rows:
        assert row.tuned is not None
        assert (row.tuned.seeds, row.tuned.budget, len(row.tuned.scores)) == ([42, 43], 8, 2)
        assert row.tuned.mean == pytest.approx(np.mean(row.tuned.scores))
        assert row.tuned.std == pytest.approx(np.std(row.tuned.scores, ddof=1))
    assert report.rows[0].score == report.rows[0].tuned.scores[0]  # type: ignore[union-attr] # the shared prompt
    assert "tuned accuracy" in (tmp_path / "out" / "report.md").read_text()


def test_a_budget_that_cannot_be(inside: Inside, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget 1 is too small"):
        run_bench(**SMALL | {"popsize": 4}, k_shot=2, tune=True, budget=1, output=tmp_path / "out")


def test_savings(inside: Inside, tmp_path: Path) -> None:
    report = run_bench(**SMALL, engines=["ort"], precisions=["fp32"], savings=True, output=tmp_path / "out")
    off = [row.without for row in report.rows]
    assert off.count([]) == 2  # eager, and the row with all savings
    assert {"buckets", "population", "label-head", "last-block", "shared-first"} <= {
        name for names in off for name in names
    }
    assert max(off, key=len) == off[-1]
    assert "## What each saving brings" in (tmp_path / "out" / "report.md").read_text()


def test_savings_of_other_families_and_methods_are_not_measured(inside: Inside, tmp_path: Path) -> None:
    report = run_bench(**SMALL, engines=["ort"], precisions=["fp32"], savings=True, output=tmp_path / "out")
    off = [tuple(row.without) for row in report.rows[1:]]
    assert not {"prefix-cache", "short-decoder", "layer-cache"} & {name for names in off for name in names}
    assert len(set(off)) == len(off)


def test_what_graphs_leave_out_is_exported_anew_when_it_is_switched_off(inside: Inside, tmp_path: Path) -> None:
    run_bench(**SMALL, engines=["ort"], precisions=["fp32"], savings=True, output=tmp_path / "out")
    exported = [given["without"] for step, given in inside.calls if step == "export"]
    each = [["label-head"], ["last-block"], ["shared-first"]]
    assert exported == [[], *each, ["label-head", "last-block", "shared-first"]]
    assert sum(step == "optimize" for step, _ in inside.calls) == 5


def test_bbtv2(inside: Inside, tmp_path: Path) -> None:
    inside.method = "bbtv2"
    report = run_bench(**SMALL, engines=["ort"], precisions=["fp32"], method="bbtv2", output=tmp_path / "out")
    assert report.method == "bbtv2"
    assert {row.status for row in report.rows} == {"passed"}


def test_command_line_repeats_the_options() -> None:
    options = Options(
        backbone="a b", task="demo", engines=("ort", "trt"), tune=True, popsize=4, threads=2, data=Path("rows")
    )
    assert shlex.split(options.command_line(Path("out"))) == [
        *["bbt-accel", "bench", "--backbone", "a b", "--task", "demo", "--data", "rows", "--popsize", "4", "--tune"],
        *["--threads", "2", "--engines", "ort,trt", "-o", "out"],
    ]


@pytest.mark.parametrize("name", ["rows", "popsize", "repeats", "seeds", "threads", "k_shot", "test_rows", "budget"])
def test_numbers_have_a_least(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        run_bench(**SMALL | {name: 0}, output=tmp_path / "out")


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    words = "--rows 4 --popsize 2 --repeats 1 --test-rows 8 --threads 1 --engines torch,dummy,trt --precisions fp32"
    words += f" --backbone demo --task demo -o {tmp_path / 'out'} --json"
    result = CliRunner().invoke(app, ["bench", *words.split()], catch_exceptions=False)
    report = Report.model_validate_json(result.stdout)
    eager, torch, dummy, trt = report.rows
    assert (eager.status, torch.status, dummy.status) == ("passed", "passed", "differs")
    assert trt.status in ("failed", "not installed")
    assert torch.max_error is not None
    assert torch.max_error < 1e-4
    assert eager.peak_mib is not None
    assert dummy.peak_mib is not None
    assert dummy.peak_mib < eager.peak_mib  # a process of its own, without torch
    assert report.workload.naive_flops > 10**9
    assert report.machine.fp32_rate > 1
