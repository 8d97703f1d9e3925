"""The load test: it drives a real server in a process of its own, and reports what it counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("geventhttpclient")
pytest.importorskip("tritonclient")

from conftest import Export
from search_parts import search_bundle
from serving_parts import app, running

from bbt_accel import tune
from bbt_accel.benchmarks import load as module
from bbt_accel.benchmarks.load import LoadReport, Request, load
from bbt_accel.benchmarks.script import run_script
from bbt_accel.errors import EngineError

SETTINGS: dict[str, object] = {
    "k_shot": 2,
    "intrinsic_dim": 5,
    "popsize": 4,
    "budget": 4,
    "eval_every": 4,
}
HEALTH: Request = ("GET", "/v2/health/live", b"", {})


def measure(path: Path, output: Path, *words: str) -> LoadReport:
    arguments = [str(path), "-o", str(output), "--seconds", "0.05", *words]
    return run_script("load", None, module.add_options, module.measure_load, arguments)


def test_a_run_under_load(tiny: Export, tmp_path: Path) -> None:
    run = tune(
        tiny("roberta"),
        "demo",
        engine="ort",
        threads=1,
        output=tmp_path / "run",
        settings=SETTINGS,
        progress=False,
    )
    sizes = "--threads 1 --clients 1,2 --rows 4 --popsize 3"
    report = measure(run.path, tmp_path / "report", *sizes.split())
    assert (
        LoadReport.model_validate_json((tmp_path / "report" / "report.json").read_bytes()) == report
    )
    found = [(row.request, row.clients) for row in report.rows]
    assert found == [
        ("population, no server", 1),
        ("health", 1),
        ("population with its rows", 1),
        ("population", 1),
        ("population", 2),
        ("population as JSON", 1),
        ("texts", 1),
        ("texts", 2),
    ]
    for row in report.rows:
        assert row.requests > 0
        assert row.errors == 0
        assert row.ms_median is not None
        assert 0 < row.ms_median <= row.ms_p90 <= row.ms_p99 <= row.ms_max
        assert row.per_second > 0
    sent = {row.request: row.kib_sent for row in report.rows}
    assert sent["population"] < min(sent["population with its rows"], sent["population as JSON"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"| {what} | {clients} |" in text for what, clients in found)
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_requests_of_which_none_is_answered_are_an_error(tmp_path: Path) -> None:
    with running(app(search_bundle(tmp_path / "bundle"))) as url:
        with pytest.raises(EngineError, match="404"):
            load(url, "nothing", ("GET", "/v2/models/nothing", b"", {}), 2, 0.05)
        assert load(url, "health", HEALTH, 2, 0.05).errors == 0


def test_a_client_that_fails_beside_others_is_counted(tmp_path: Path) -> None:
    inner, requests = app(search_bundle(tmp_path / "bundle")), itertools.count()

    async def refusing_the_first(scope: Any, receive: Any, send: Any) -> None:
        refused = scope["type"] == "http" and next(requests) == 0
        await inner({**scope, "path": "/nothing"} if refused else scope, receive, send)

    with running(refusing_the_first) as url:
        found = load(url, "health", HEALTH, 3, 0.05)
    assert (found.clients, found.errors) == (3, 1)
    assert found.requests >= 2


def test_what_cannot_be_measured(
    tiny: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words, says in (
        (tiny("roberta", "bbtv2").path, (), "was exported for bbtv2, not bbt"),
        (tiny("roberta").path, ("--engine", "nothing"), "unknown engine 'nothing'"),
        (tiny("roberta").path, ("--clients", "0"), "--clients"),
    ):
        with pytest.raises(SystemExit):
            measure(path, tmp_path / "report", *words)
        assert says in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
