from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import tiny_bundle

from bbt_accel.batch import Batch
from bbt_accel.benchmarks import worker
from bbt_accel.benchmarks.accuracy import judge, row_logits
from bbt_accel.benchmarks.machine import peak_mib, rate
from bbt_accel.benchmarks.markdown import digits, summary
from bbt_accel.benchmarks.plan import POSSIBLE, USUAL, plan, switched_off
from bbt_accel.benchmarks.report import Baseline, Report, Row
from bbt_accel.benchmarks.timing import percentiles, random_prompts, seconds_per_candidate
from bbt_accel.benchmarks.workload import load_batch, save_batch
from bbt_accel.bundle import Bundle
from bbt_accel.cores import physical_cores
from bbt_accel.engines.dummy import DummyEngine
from bbt_accel.errors import EngineError, MissingDependency, UsageError

TARGETS = np.array([0, 1, 2, 0] * 25)
EAGER = np.eye(3, dtype=np.float32)[TARGETS]


def some_rows(count: int = 5) -> Batch:
    ids = np.arange(7 * count).reshape(count, 7)
    return Batch(ids, np.ones_like(ids), np.full(count, 3), np.zeros(count), np.array([1, 2]))


def judged(precision: str, logits: np.ndarray[Any, Any]) -> Row:
    row = Row(engine="ort", precision=precision)
    judge(row, logits.astype(np.float32), EAGER, TARGETS, "accuracy")
    return row


def test_judge_fp32_by_the_logits() -> None:
    assert judged("fp32", EAGER + 0.9e-4).status == "passed"
    row = judged("fp32", EAGER + 1e-3)
    assert (row.status, row.agreement, row.score) == ("differs", 1.0, 1.0)
    assert row.reason == "logit error 1.0e-03 is more than 1e-04"


def test_judge_lower_precisions_by_agreement() -> None:
    logits = EAGER + 0.1
    assert judged("int8", logits).status == "passed"
    logits[:3] = [0, 0, 5]
    assert (judged("int8", logits).status, judged("int8", logits).agreement) == ("passed", 0.98)
    logits[:5] = [0, 5, 0]
    assert judged("int8", logits).status == "differs"


def test_judge_logits_that_are_not_finite() -> None:
    logits = EAGER.copy()
    logits[0, 0] = np.nan
    row = judged("fp16", logits)
    assert (row.status, row.max_error, row.score, row.agreement) == ("differs", None, None, 0.99)
    assert row.reason == "1 of 100 test rows have NaN or infinite logits"


def test_plan_defaults() -> None:
    cases = plan(None, None)
    assert [(c.engine, c.precision) for c in cases] == [(e, p) for e, ps in USUAL.items() for p in ps]
    assert all(c.problem is None for c in cases)


def test_plan_leaves_out_what_was_not_asked_for() -> None:
    assert [(c.engine, c.precision) for c in plan(None, ["int8"])] == [("ort", "int8"), ("openvino", "int8")]
    assert [(c.engine, c.precision) for c in plan(["torch", "eager", "torch"], None)] == [("torch", "fp32")]
    (case,) = plan(["torch"], ["int8"])
    assert case.problem == "torch takes fp32"


@pytest.mark.parametrize(
    ("engines", "precisions", "without", "words"),
    [
        (["opt"], None, (), "did you mean ort"),
        (["zzz"], None, (), "known are torch"),
        ([], None, (), "names none"),
        (None, ["fp23"], (), "did you mean fp32"),
        (None, None, ("bucket",), "buckets"),
    ],
)
def test_plan_refuses(engines: Any, precisions: Any, without: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(engines, precisions, without)


def test_switched_off() -> None:
    for method in ("bbt", "bbtv2"):
        *each, everything = switched_off(method, ())  # type: ignore[arg-type]
        assert all(len(names) == 1 for names in each)
        assert everything == tuple(name for (name,) in each)
        assert ("layer-cache" in everything) == (method == "bbtv2")
    assert all("buckets" in names for names in switched_off("bbt", ("buckets",)))


def test_every_engine_has_usual_precisions() -> None:
    assert all(set(precisions) <= set(POSSIBLE[engine]) for engine, precisions in USUAL.items())


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_timing(method: str, tmp_path: Path) -> None:
    tiny = tiny_bundle(tmp_path)
    bundle = Bundle(tmp_path, tiny.info.model_copy(update={"method": method}))
    prompts = random_prompts(bundle.info, 3, 0)
    assert prompts.dtype == np.float32
    assert prompts.std() == pytest.approx(bundle.info.word_embedding_std, rel=0.1)
    with DummyEngine(bundle).bind(some_rows()) as bound:
        seconds = seconds_per_candidate(bound, prompts, 4)
    assert len(seconds) == 4
    assert min(seconds) > 0


def test_row_logits_in_parts(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    prompt = random_prompts(bundle.info, 1, 0)[0]
    engine, batch = DummyEngine(bundle), some_rows(130)
    np.testing.assert_array_equal(row_logits(engine, batch, prompt), engine.bind(batch).label_logits(prompt[None])[0])


def test_batches_travel(tmp_path: Path) -> None:
    save_batch(tmp_path / "rows.npz", some_rows())
    found = load_batch(tmp_path / "rows.npz")
    np.testing.assert_array_equal(found.input_ids, some_rows().input_ids)
    assert found.decoder_input_ids is None


def test_percentiles() -> None:
    assert percentiles([0.001, 0.002, 0.003]) == pytest.approx((2.0, 2.8, 2.98))


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbt_accel.benchmarks.machine.SECONDS", 0.0)
    assert rate(10, lambda: None) > 0
    assert physical_cores() >= 1
    peak = peak_mib()
    assert peak is None or 10 < peak < 10**6


def test_digits() -> None:
    assert [digits(x) for x in (0.01234, 12.345, 123.4, 12345.6)] == ["0.0123", "12.3", "123", "12,346"]


def test_summary_warns_of_an_unsteady_machine() -> None:
    rows = [Row(engine="eager", precision="fp32", speedup=1.0), Row(engine="ort", precision="fp32", speedup=2.0)]
    rows.append(Row(engine="ort", precision="fp32", without=["buckets"], speedup=3.0))
    for drift, warned in ((0.05, False), (-0.2, True), (None, False)):
        baseline = Baseline(first_ms=1.0, last_ms=1.0, drift=drift)
        text = summary(Report.model_construct(rows=rows, baseline=baseline))
        assert ("not steady" in text) == warned
        assert "**ort fp32**, 2.00 times" in text


def test_every_field_is_documented() -> None:
    schema = Report.model_json_schema()
    for name, part in {"Report": schema, **schema["$defs"]}.items():
        for field, description in part["properties"].items():
            assert description.get("description"), f"{name}.{field}"


def test_worker_returns_and_raises(tmp_path: Path) -> None:
    request, reply = tmp_path / "request.json", tmp_path / "reply.json"

    def answer(step: str, **arguments: Any) -> Any:
        request.write_text(json.dumps(arguments))
        worker.main(step, str(request), str(reply))
        return json.loads(reply.read_text())

    (tmp_path / "no").mkdir()
    engine = {"bundle": str(tmp_path / "no"), "name": "ort"}
    missing = answer("compare", engine=engine, batch="", prompt="", logits="")
    assert missing["error"] == "BundleError"
    assert "TypeError" in answer("compare")["message"]


def test_worker_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(code: str) -> None:
        monkeypatch.setattr(
            subprocess, "run", lambda command, **o: run([sys.executable, "-c", code, *command[4:]], **o)
        )

    run = subprocess.run
    program("import sys; open(sys.argv[2], 'w').write('{\"value\": 3}')")
    assert worker.call("rates", device="cpu") == 3
    program('import sys; open(sys.argv[2], \'w\').write(\'{"error": "MissingDependency", "message": "x"}\')')
    with pytest.raises(MissingDependency, match="x"):
        worker.call("rates")
    program("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineError, match="SIGKILL, perhaps for want of memory"):
        worker.call("rates")
    program("import sys; sys.exit('broken')")
    with pytest.raises(EngineError, match=r"exit code 1 \(broken\)"):
        worker.call("rates")
