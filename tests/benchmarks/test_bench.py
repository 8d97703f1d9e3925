"""bench: which rows a report has, what each says, and what becomes of failures, with steps in this
process.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import blank_plot
from tiny_bundles import tiny_bundle
from typer.testing import CliRunner

from bbt_accel.benchmarks import bench as module
from bbt_accel.benchmarks import steps
from bbt_accel.benchmarks.bench import run_bench
from bbt_accel.benchmarks.bench_report import BenchReport
from bbt_accel.benchmarks.ceilings import matrix_rates
from bbt_accel.benchmarks.options import BenchOptions, bench_options
from bbt_accel.cli.commands import app
from bbt_accel.core.bundle import write_info
from bbt_accel.core.demo import DATA
from bbt_accel.errors import (
    BbtError,
    DataError,
    EngineError,
    ExportError,
    MissingDependency,
    UsageError,
)
from bbt_accel.io import processes
from bbt_accel.tasks.task import load_task, to_toml

SMALL: dict[str, Any] = {
    "backbone": "demo",
    "task": "demo",
    "rows": 4,
    "popsize": 2,
    "repeats": 1,
    "test_rows": 8,
}
BASELINES = ["eager fp32", "eager-readout fp32"]
DRAW = BenchReport.draw
Ablated = tuple[BenchReport, str, "Inside"]


class Inside:
    """The steps in this process, on a bundle without graphs; every engine computes what `dummy`
    does.
    """

    def __init__(self, method: str = "bbt") -> None:
        self.method = method
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.errors: dict[tuple[str, str], BbtError] = {}
        """By step, and the name of an engine or of an optimized bundle."""

    def __call__(self, step: Callable[..., Any], **arguments: Any) -> Any:
        given = json.loads(json.dumps(arguments, default=str))
        self.calls.append((step.__name__, given))
        key = given.get("engine", {}).get("name") or Path(given.get("output", "")).name
        if (step.__name__, key) in self.errors:
            raise self.errors[step.__name__, key]
        if step is matrix_rates:
            return {
                "fp32_rate": 100.0,
                "fp32_rate_by": "x",
                "rates": {"fp32 x": 100.0},
                "unavailable": {"y": "missing"},
            }
        if step in (steps.export, steps.optimize):
            return self.write(Path(given["output"]))
        flops = given.get("flops", False)
        found = step(
            **given
            | {"engine": given["engine"] | {"name": "dummy", "without": []}}
            | ({"flops": False} if flops else {})
        )
        return found | {"flops": 10**9} if flops else found

    def write(self, folder: Path) -> None:
        bundle = tiny_bundle(folder)
        write_info(folder, bundle.info.model_copy(update={"method": self.method, "stages": []}))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BenchReport, "draw", lambda self, file: blank_plot(file))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with their plots."""
    monkeypatch.setattr(BenchReport, "draw", DRAW)


def bench(output: Path, **changes: Any) -> BenchReport:
    return run_bench(bench_options(**SMALL | changes), output)


def engine_rows(report: BenchReport) -> list[str]:
    return [row.label for row in report.rows if not row.baseline]


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    """On a processor without bf16, where there is no C++ compiler."""
    fake = Inside()
    monkeypatch.setattr(processes, "call", fake)
    machine(monkeypatch)
    return fake


def machine(
    monkeypatch: pytest.MonkeyPatch, features: Sequence[str] = (), compiler: bool = False
) -> None:
    facts = {**module.describe_machine(), "features": list(features)}
    monkeypatch.setattr(module, "describe_machine", lambda: facts)
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/c++" if compiler else None)


def test_every_row_has_its_speed_and_how_exact_it_is(inside: Inside, tmp_path: Path) -> None:
    report = bench(tmp_path / "out", engines=["torch", "ort"])
    assert [row.label for row in report.rows] == [*BASELINES, "torch fp32", "ort fp32", "ort int8"]
    assert {row.status for row in report.rows} == {"passed"}
    for row in report.rows:
        assert row.ms_median is not None
        assert row.ms_p90 is not None
        assert 0 < row.ms_median <= row.ms_p90
        assert row.calls_per_second == pytest.approx(1000 / row.ms_median)
        assert row.fp32_share == pytest.approx(row.calls_per_second * 1e9 / 100e9)
        assert (row.max_error, row.agreement) == (0.0, 1.0)
        assert row.score == report.original.score is not None
        assert row.bundle_mib is not None
        assert row.peak_mib is not None
        assert row.tuned is None
    assert report.original.speedup == 1.0
    assert report.n_rows == 4
    assert report.n_test_rows == 8
    assert report.drift is not None


def test_every_row_is_compared_with_the_fastest_baseline_and_with_the_original(
    inside: Inside, tmp_path: Path
) -> None:
    report = bench(tmp_path / "out", engines=["ort"])
    fastest = min(
        (row for row in report.rows if row.baseline), key=lambda row: row.ms_median or 0.0
    )
    assert report.fastest_baseline == fastest.label
    assert fastest.speedup_over_fastest == 1.0
    for row in report.rows:
        assert row.ms_median is not None
        assert row.speedup == pytest.approx(report.original.ms_median / row.ms_median)
        assert row.speedup_over_fastest == pytest.approx(fastest.ms_median / row.ms_median)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| × fastest baseline | × original |" in text
    assert f"The fastest baseline is {fastest.label}." in text
    assert f"times the original's forward, on {report.machine['cpu']}" in text
    assert "100 GFLOP/s by x" in text
    assert "y missing" in text


def test_the_original_is_timed_first_and_last(inside: Inside, tmp_path: Path) -> None:
    bench(tmp_path / "out", engines=["ort"], precisions=["fp32"])
    timed = [given["engine"]["name"] for step, given in inside.calls if step == "measure"]
    assert timed == ["eager", "eager-readout", "ort", "eager"]


def test_bf16_and_compiled_baselines_where_the_machine_has_them(
    inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, ["AVX2", "bf16"], compiler=True)
    report = bench(tmp_path / "out", engines=["torch", "openvino"])
    baselines = [row.label for row in report.rows if row.baseline]
    assert baselines == [
        f"{name} {p}" for name in ("eager", "eager-readout", "compiled") for p in ("fp32", "bf16")
    ]
    assert "openvino bf16" in engine_rows(report)
    assert report.notes == []
    made = [
        given for step, given in inside.calls if step == "optimize" and given["target"] == "torch"
    ]
    assert [given["precision"] for given in made] == [
        "bf16"
    ]  # one bundle for three baselines and the torch engine


def test_what_this_machine_leaves_out_is_noted(inside: Inside, tmp_path: Path) -> None:
    report = bench(tmp_path / "out", engines=["openvino"])
    assert engine_rows(report) == ["openvino fp32", "openvino int8"]
    bf16, compiler = report.notes
    assert bf16.startswith("no bf16 baselines: this processor has neither AVX512_BF16 nor AMX")
    assert compiler.startswith("no torch.compile: there is no C++ compiler")
    assert bf16 in (tmp_path / "out" / "report.md").read_text()
    assert "openvino bf16" in engine_rows(
        bench(tmp_path / "asked", engines=["openvino"], precisions=["bf16"])
    )


def test_a_baseline_that_fails_is_a_row(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {("measure", "eager-readout"): EngineError("out of memory")}
    report = bench(tmp_path / "out", engines=["ort"])
    assert (report.rows[1].status, report.rows[1].reason) == ("failed", "out of memory")
    assert report.fastest_baseline == "eager fp32"


@pytest.mark.usefixtures("drawn")
def test_the_files_of_a_report_have_all_rows_and_are_not_replaced(
    inside: Inside, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = bench(output, engines=["ort"])
    assert sorted(file.name for file in output.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
        "report.png",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert BenchReport.model_validate_json((output / "report.json").read_text()) == report
    text = (output / "report.md").read_text()
    for row in report.rows:
        assert text.count(f"| {row.label} |") == 2
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BbtError, match="exists already"):
        bench(output, engines=["ort"])


@pytest.mark.usefixtures("drawn")
def test_failures_are_rows(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {
        ("optimize", "openvino-int8"): MissingDependency('pip install "bbt-accel[openvino]"'),
        ("compare", "torch"): EngineError("out of memory"),
    }
    report = bench(
        tmp_path / "out", engines=["torch", "openvino", "trt"], precisions=["fp32", "int8"]
    )
    found = {row.label: (row.status, row.reason, row.speedup is not None) for row in report.rows}
    assert found == {
        **dict.fromkeys(BASELINES, ("passed", None, True)),
        "torch fp32": ("failed", "out of memory", True),
        "torch int8": ("failed", "torch runs in fp32, bf16, fp16", False),
        "openvino fp32": ("passed", None, True),
        "openvino int8": ("not installed", 'pip install "bbt-accel[openvino]"', False),
        "trt fp32": ("failed", "trt needs --device cuda, for the baselines too", False),
        "trt int8": ("failed", "trt runs in fp32, fp16, bf16", False),
    }
    text = (tmp_path / "out" / "report.md").read_text()
    for label in found:
        assert f"| {label} |" in text
    assert "trt needs --device cuda" in text


def test_the_original_must_run(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {("measure", "eager"): EngineError("out of memory")}
    with pytest.raises(
        EngineError, match=r"the original's forward \(eager fp32\) failed: out of memory"
    ):
        bench(tmp_path / "out", engines=["ort"])
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_everywhere_is_an_error(inside: Inside, tmp_path: Path) -> None:
    inside.errors = {("export", "exported"): ExportError("no LM head")}
    with pytest.raises(ExportError, match="no LM head"):
        bench(tmp_path / "out")
    with pytest.raises(DataError, match="--rows 100000"):
        bench(tmp_path / "out", rows=100000)


@pytest.mark.usefixtures("drawn")
def test_each_engine_has_the_scores_of_its_own_searches(inside: Inside, tmp_path: Path) -> None:
    asked = {
        "popsize": 4,
        "k_shot": 2,
        "engines": ["ort"],
        "precisions": ["fp32"],
        "seeds": 2,
        "budget": 8,
    }
    report = bench(tmp_path / "out", tune=True, **asked)
    assert [row.label for row in report.rows if row.tuned] == ["eager fp32", "ort fp32"]
    for row in report.rows:
        if row.tuned is not None:
            assert (row.tuned.seeds, row.tuned.budget, len(row.tuned.scores)) == ([42, 43], 8, 2)
            assert row.tuned.mean == pytest.approx(np.mean(row.tuned.scores))
            assert row.tuned.std == pytest.approx(np.std(row.tuned.scores, ddof=1))
    assert report.original.score == report.original.tuned.scores[0]  # type: ignore[union-attr] # the shared prompt
    text = (tmp_path / "out" / "report.md").read_text()
    assert "tuned score" in text
    assert "one tuned prompt" in text


def test_prompts_are_scored_behind_the_demonstrations_of_their_own_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = dict[str, bytes]()

    class Decoder(Inside):
        def __call__(self, step: Callable[..., Any], **arguments: Any) -> Any:
            if step is steps.compare:
                context = steps.load_batch(str(arguments["batch"])).context_ids
                assert context is not None
                contexts[Path(arguments["batch"]).stem] = context.tobytes()
            return super().__call__(step, **arguments)

        def write(self, folder: Path) -> None:
            bundle = tiny_bundle(folder, "llama", "cat", max_length=400)
            write_info(folder, bundle.info.model_copy(update={"stages": []}))

    monkeypatch.setattr(processes, "call", Decoder())
    machine(monkeypatch)
    demo = load_task("demo")
    own = demo.model_copy(
        update={"name": "own", "context": demo.context.model_copy(update={"demonstrations": 2})}
    )
    (tmp_path / "own.toml").write_text(to_toml(own))
    changes = {
        "task": str(tmp_path / "own.toml"),
        "data": DATA,
        "engines": ["ort"],
        "precisions": ["fp32"],
    }
    report = bench(
        tmp_path / "out",
        **changes,
        prompt_mode="cat",
        tune=True,
        seeds=2,
        budget=4,
        popsize=4,
        k_shot=4,
    )
    assert [row.tuned.seeds for row in report.rows if row.tuned] == [[42, 43]] * 2
    assert contexts["tested 42"] == contexts["tested"] != contexts["tested 43"]


def test_a_budget_that_cannot_be(inside: Inside, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="budget 1 is too small"):
        bench(tmp_path / "out", popsize=4, k_shot=2, tune=True, budget=1)
    with pytest.raises(
        UsageError, match="popsize: Input should be greater than or equal to 4; got 2"
    ):
        bench(tmp_path / "out", popsize=2, tune=True)
    assert inside.calls == []  # not even an export


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Ablated:
    """A report with an ablation, its Markdown, and the steps. It has its plot."""
    fake, output = Inside(), tmp_path_factory.mktemp("ablated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "call", fake)
        machine(patch)
        report = bench(output, engines=["ort"], precisions=["fp32"], ablate=True)
    return report, (output / "report.md").read_text(), fake


def test_an_ablation_leaves_out_each_optimization_and_then_all(ablated: Ablated) -> None:
    report, text, _ = ablated
    off = [row.without for row in report.rows if row.ablation]
    assert {"buckets", "population", "label-head", "last-block", "shared-first"} == {
        n for names in off for n in names
    }
    assert max(off, key=len) == off[-1]
    assert "## Ablation" in text


def test_optimizations_of_other_architectures_and_methods_are_not_ablated(ablated: Ablated) -> None:
    off = [tuple(row.without) for row in ablated[0].rows if row.ablation]
    assert not {"prefix-cache", "short-decoder", "layer-cache"} & {
        name for names in off for name in names
    }
    assert len(set(off)) == len(off)


def test_a_graph_without_an_optimization_is_exported(ablated: Ablated) -> None:
    calls = ablated[2].calls
    exported = [given["without"] for step, given in calls if step == "export"]
    each = [["label-head"], ["last-block"], ["shared-first"]]
    assert exported == [[], *each, ["label-head", "last-block", "shared-first"]]
    assert sum(step == "optimize" for step, _ in calls) == 5


def test_a_bundle_of_bbtv2_is_measured_as_one_of_bbt_is(inside: Inside, tmp_path: Path) -> None:
    inside.method = "bbtv2"
    report = bench(tmp_path / "out", engines=["ort"], precisions=["fp32"], method="bbtv2")
    assert report.options.method == "bbtv2"
    assert {row.status for row in report.rows} == {"passed"}


def test_command_line_repeats_the_options() -> None:
    options = BenchOptions(
        backbone="a b",
        task="demo",
        engines=["ort", "trt"],
        tune=True,
        popsize=4,
        threads=2,
        data=Path("rows"),
    )
    assert shlex.split(options.command_line(Path("out"))) == [
        *[
            "bbt-accel",
            "bench",
            "--backbone",
            "a b",
            "--task",
            "demo",
            "--data",
            "rows",
            "--set",
            "popsize=4",
            "--tune",
        ],
        *["--set", "threads=2", "--engines", "ort,trt", "-o", "out"],
    ]


@pytest.mark.parametrize(
    "name", ["rows", "popsize", "repeats", "seeds", "threads", "k_shot", "test_rows", "budget"]
)
def test_numbers_have_a_minimum(name: str) -> None:
    with pytest.raises(
        UsageError, match=f"--{name.replace('_', '-')}: .* greater than or equal to"
    ):
        bench_options(**SMALL | {name: 0})


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_the_command_measures_the_demo_each_row_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)  # the other baselines take minutes: they compile
    words = "--set rows=4 --set popsize=2 --set repeats=1 --set test_rows=8 --set threads=1"
    words += " --engines torch,dummy,trt --precisions fp32"
    words += f" --backbone demo --task demo -o {tmp_path / 'out'}"
    result = CliRunner().invoke(app, ["--json", "bench", *words.split()], catch_exceptions=False)
    report = BenchReport.model_validate_json(result.stdout)
    rows = {row.label: row for row in report.rows}
    eager, torch, dummy, trt = (rows[f"{name} fp32"] for name in ("eager", "torch", "dummy", "trt"))
    assert rows["eager-readout fp32"].status == "passed"
    assert rows["eager-readout fp32"].flops < eager.flops  # type: ignore[operator] # the head at one position
    assert (eager.status, torch.status, dummy.status) == ("passed", "passed", "differs")
    assert trt.status in ("failed", "not installed")
    assert torch.max_error is not None
    assert torch.max_error < 1e-4
    assert eager.peak_mib is not None
    assert dummy.peak_mib is not None
    assert dummy.peak_mib < eager.peak_mib  # a process of its own, without torch
    assert eager.flops is not None
    assert eager.flops > 10**9
    assert report.machine["fp32_rate"] > 1
