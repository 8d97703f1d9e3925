"""The parts of bench: which rows there are, what they are checked by, what is timed, and the
ceilings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dummy_engine import DummyEngine
from tiny_bundles import tiny_bundle

from bbt_accel.benchmarks import bench, ceilings
from bbt_accel.benchmarks.bench import ablations, plan_measurements, run_bench
from bbt_accel.benchmarks.bench_report import BenchReport, Measurement
from bbt_accel.benchmarks.ceilings import matrix_rates, median_seconds
from bbt_accel.benchmarks.options import BenchOptions, bench_options
from bbt_accel.benchmarks.script import Timed
from bbt_accel.benchmarks.steps import (
    compare,
    compared_rows,
    generation,
    load_batch,
    milliseconds,
    peak_mib,
    random_prompts,
    save_batch,
)
from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle, write_info
from bbt_accel.core.demo import DATA
from bbt_accel.core.engine_specs import Precision, engine_spec, engine_specs
from bbt_accel.errors import DataError, UsageError
from bbt_accel.io.machine import describe_machine
from bbt_accel.tasks.task import load_task

TARGETS = np.array([0, 1, 2, 0] * 25)
EAGER = np.eye(3, dtype=np.float32)[TARGETS]


def some_rows(count: int = 5) -> Batch:
    ids = np.arange(7 * count).reshape(count, 7)
    return Batch(ids, np.ones_like(ids), np.full(count, 3), np.zeros(count), np.array([1, 2]))


def checked(precision: str, logits: np.ndarray[Any, Any]) -> Measurement:
    row = Measurement(engine="ort", precision=precision)
    row.compare(logits.astype(np.float32), EAGER, TARGETS, "accuracy")
    return row


def test_fp32_is_checked_by_its_logits() -> None:
    assert checked("fp32", EAGER + 0.9e-4).status == "passed"
    row = checked("fp32", EAGER + 1e-3)
    assert (row.status, row.agreement, row.score) == ("differs", 1.0, 1.0)
    assert row.reason == "logit error 1.0e-03 is more than 1e-04"


def test_lower_precisions_are_checked_by_agreement() -> None:
    logits = EAGER + 0.1
    assert checked("int8", logits).status == "passed"
    logits[:3] = [0, 0, 5]
    assert (checked("int8", logits).status, checked("int8", logits).agreement) == ("passed", 0.98)
    logits[:5] = [0, 5, 0]
    assert checked("int8", logits).status == "differs"


def test_logits_that_are_not_finite_differ() -> None:
    logits = EAGER.copy()
    logits[0, 0] = np.nan
    row = checked("fp16", logits)
    assert (row.status, row.max_error, row.score, row.agreement) == ("differs", None, None, 0.99)
    assert row.reason == "1 of 100 test rows have NaN or infinite logits"


def options(**changes: Any) -> BenchOptions:
    return bench_options(**{"backbone": "demo", "task": "demo"} | changes)


@pytest.fixture
def engine_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Measurement]]:
    """Rows after the baselines, on a processor with bf16 unless it is said to have none."""
    info = tiny_bundle(tmp_path).info

    def plan(features: Sequence[str] = ("bf16",), **changes: Any) -> list[Measurement]:
        machine = {**describe_machine(), "features": list(features)}
        monkeypatch.setattr(bench, "describe_machine", lambda: machine)
        rows, _ = plan_measurements(options(**changes), info)
        return [row for row in rows if not row.baseline]

    return plan


def pairs(rows: list[Measurement]) -> list[tuple[str, str]]:
    return [(row.engine, row.precision) for row in rows]


def test_the_engines_declare_which_rows_there_are(
    engine_rows: Callable[..., list[Measurement]],
) -> None:
    known = engine_specs().values()
    every = [
        (spec.name, precision) for spec in known if not spec.baseline for precision in spec.benched
    ]
    assert pairs(engine_rows()) == every
    assert pairs(engine_rows(features=())) == [pair for pair in every if pair[1] != "bf16"]


def test_engines_on_a_gpu_are_measured_in_fp32_and_fp16(
    engine_rows: Callable[..., list[Measurement]],
) -> None:
    rows = [row for row in engine_rows(device="cuda") if row.status == "passed"]
    assert pairs(rows) == [
        (name, precision) for name in ("torch", "ort", "trt") for precision in ("fp32", "fp16")
    ]


def test_a_gpu_is_compared_with_eager_in_half_precision_and_with_tf32_too(tmp_path: Path) -> None:
    def baselines(device: str) -> set[tuple[str, str]]:
        rows, _ = plan_measurements(options(device=device), tiny_bundle(tmp_path).info)
        return {(row.engine, row.precision) for row in rows if row.baseline}

    assert baselines("cuda:1") >= {
        ("eager", "fp32"),
        ("eager", "fp16"),
        ("eager", "bf16"),
        ("eager-tf32", "fp32"),
    }
    assert ("eager-tf32", "bf16") not in baselines("cuda")
    assert not {
        engine
        for engine, precision in baselines("cpu")
        if engine == "eager-tf32" or precision == "fp16"
    }


def test_pairs_that_do_not_exist_are_rows_only_if_both_were_asked_for(
    engine_rows: Callable[..., list[Measurement]],
) -> None:
    assert pairs(engine_rows(precisions=["int8"])) == [("ort", "int8"), ("openvino", "int8")]
    assert pairs(engine_rows(engines=["torch", "eager", "torch"])) == [
        ("torch", "fp32"),
        ("torch", "bf16"),
    ]
    (row,) = engine_rows(engines=["torch"], precisions=["int8"])
    assert (row.status, row.reason) == ("failed", "torch runs in fp32, bf16, fp16")


def test_a_single_file_has_no_rows_to_compare_on() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl has no test rows; give a folder"):
        compared_rows(load_task("demo"), DATA / "train.jsonl", 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engines": ["openvin"]}, "did you mean openvino"),
        ({"precisions": ["fp23"]}, "did you mean fp32"),
        ({"without": ["bucket"]}, "did you mean buckets"),
        ({"engines": ["remote"]}, "bench has no --url for the engine remote"),
    ],
)
def test_names_that_bench_does_not_have_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        run_bench(options(**changes), tmp_path / "out")


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_an_ablation_is_of_each_optimization_and_then_of_all(method: str, tmp_path: Path) -> None:
    info = tiny_bundle(tmp_path).info.model_copy(update={"method": method})
    *each, everything = ablations(info, [])
    assert all(len(names) == 1 for names in each)
    assert everything == [name for (name,) in each]
    assert ("layer-cache" in everything) == (method == "bbtv2")
    assert all("buckets" in names for names in ablations(info, ["buckets"]))


def test_which_bundle_an_engine_reads() -> None:
    read = {
        ("torch", "fp32"): "onnx",
        ("ort", "fp32"): "ort",
        ("dummy", "fp32"): "onnx",
        ("trt", "fp16"): "trt",
    }
    for (name, precision), target in read.items():
        assert engine_spec(name).target(precision) == target
    for name in ("eager", "eager-readout", "compiled"):
        assert (engine_spec(name).target("fp32"), engine_spec(name).target("bf16")) == (
            "onnx",
            "torch",
        )
    with pytest.raises(
        UsageError, match="engine openvino runs in fp32, bf16, int8, int4, not in fp16"
    ):
        engine_spec("openvino").target("fp16")


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_a_generation_is_timed_for_each_repeat(method: str, tmp_path: Path) -> None:
    tiny = tiny_bundle(tmp_path)
    bundle = Bundle(tmp_path, tiny.info.model_copy(update={"method": method}))
    prompts = random_prompts(bundle.info, 3, 0)
    assert prompts.dtype == np.float32
    assert prompts.std() == pytest.approx(bundle.info.word_embedding_std, rel=0.1)
    with DummyEngine(bundle).bind(some_rows()) as bound:
        evaluate = generation(bound, 3)
        assert evaluate() == (3 if method == "bbt" else 3 * bundle.info.n_layers)
        found = milliseconds(evaluate, 4)
    assert len(found) == 4
    assert min(found) > 0


def test_logits_in_parts(tmp_path: Path) -> None:
    bundle, batch = tiny_bundle(tmp_path / "bundle"), some_rows(130)
    write_info(bundle.path, bundle.info)
    prompt = random_prompts(bundle.info, 1, 0)[0]
    save_batch(tmp_path / "rows.npz", batch)
    np.save(tmp_path / "prompt.npy", prompt)
    engine = {"bundle": tmp_path / "bundle", "name": "dummy"}
    found = compare(engine, str(tmp_path / "rows.npz"), str(tmp_path / "prompt.npy"))
    np.testing.assert_allclose(
        found, DummyEngine(bundle).bind(batch).label_logits(prompt[None])[0], rtol=1e-6
    )


def test_batches_travel(tmp_path: Path) -> None:
    save_batch(tmp_path / "rows.npz", some_rows())
    found = load_batch(tmp_path / "rows.npz")
    np.testing.assert_array_equal(found.input_ids, some_rows().input_ids)
    assert found.decoder_input_ids is None


def test_times_are_summarized_by_their_median_and_the_slow_end() -> None:
    timed = Timed()
    assert timed.set_times([1.0, 2.0, 3.0]) == 2.0
    assert (timed.ms_median, timed.ms_p90, timed.ms_p99) == pytest.approx((2.0, 2.8, 2.98))


def test_the_ceiling_is_that_of_the_fastest_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def missing(n: int, threads: int) -> Any:
        raise ImportError("no module")

    known = {"fp32 slow": 4.0, "fp32 fast": 2.0, "int8 x": 1.0}
    made = {name: lambda n, threads, seconds=seconds: seconds for name, seconds in known.items()}
    monkeypatch.setitem(ceilings.PRODUCTS, "cpu", made | {"fp32 other": missing})
    monkeypatch.setattr(ceilings, "median_seconds", lambda call, threads: call)
    found = matrix_rates("cpu", 1)
    assert found["fp32_rate_by"] == "fast"
    assert found["fp32_rate"] == found["rates"]["fp32 fast"] == 2 * found["rates"]["fp32 slow"]
    assert found["rates"]["int8 x"] > found["fp32_rate"]
    assert found["unavailable"] == {"fp32 other": "ImportError: no module"}


@pytest.mark.parametrize("name", ceilings.PRODUCTS["cpu"])
def test_every_library_multiplies(name: str) -> None:
    for module in ("torch", "onnx", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    found: Any = ceilings.PRODUCTS["cpu"][name](16, 1)()
    product = found if hasattr(found, "shape") else found[0]
    assert tuple(product.shape) == (16, 16)


def test_a_call_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    assert median_seconds(lambda: None, 1) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not report it")
def test_the_largest_memory_of_this_process_is_known() -> None:
    peak = peak_mib()
    assert peak is not None
    assert 10 < peak < 10**6


def test_summary_warns_of_an_unsteady_machine() -> None:
    rows = [
        Measurement(engine="eager", precision="fp32", baseline=True, ms_median=4.0, speedup=1.0)
    ]
    rows.append(
        Measurement(
            engine="ort", precision="fp32", ms_median=2.0, speedup=2.0, speedup_over_fastest=1.5
        )
    )
    off = {"without": ["buckets"], "ablation": True}
    rows.append(Measurement(engine="ort", precision="fp32", ms_median=1.0, speedup=4.0, **off))
    machine = {
        **describe_machine(),
        "fp32_rate": 1,
        "fp32_rate_by": "x",
        "rates": {},
        "unavailable": {},
    }
    for change, warned in ((0.05, False), (-0.2, True), (None, False)):
        report = BenchReport.model_construct(
            options=options(),
            machine=machine,
            rows=rows,
            fastest_baseline="eager fp32",
            drift=change,
        )
        assert ("not steady" in report.summary()) == warned
        assert (
            "**ort fp32**: 1.50 times the fastest baseline and 2.00 times the original's"
            in report.summary()
        )


def test_an_ablation_is_compared_with_the_same_engine_and_precision() -> None:
    def row(precision: Precision, ms: float, **more: Any) -> Measurement:
        return Measurement(engine="ort", precision=precision, ms_median=ms, **more)

    off = row("fp32", 10.0, without=["buckets"], ablation=True)
    report = BenchReport.model_construct(
        options=options(), rows=[row("fp32", 4.0), row("int8", 1.0), off]
    )
    assert "| ort fp32 | buckets | 4 | 10 | 2.50 |" in report.ablation()
    assert "rows of similar length together" in report.ablation()


def test_every_field_is_documented() -> None:
    schema = BenchReport.model_json_schema()
    for name, part in {"BenchReport": schema, **schema["$defs"]}.items():
        for field, description in part["properties"].items():
            assert description.get("description"), f"{name}.{field}"
