"""Processes that share a population: the same search, whatever happens to a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_parts import SETTINGS, batch, search_bundle, task_file
from search_parts import job as make_job

from bbt_accel import tune
from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import Settings
from bbt_accel.errors import BundleError, EngineError, NonFiniteLoss, UsageError
from bbt_accel.io.cluster import connect
from bbt_accel.search.evaluator import Evaluator, Job
from bbt_accel.search.history import Generation, History
from bbt_accel.search.loop import SearchOutcome, search
from bbt_accel.search.methods import PromptSpace
from bbt_accel.search.run import Run
from bbt_accel.search.workers import WorkersEvaluator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

SMALL = Settings(readout="verbalizer", intrinsic_dim=6, popsize=5, budget=60, eval_every=10, seed=3)
TRAIN, DEV = batch(8, seed=0), batch(8, seed=1)


@pytest.fixture(params=["bbt", "bbtv2"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle", request.param)


def job(
    bundle: Bundle, engine: str = "dummy", settings: Settings = SMALL, train: Batch = TRAIN
) -> Job:
    return make_job(bundle, settings, train, DEV, engine)


Observe = Callable[[Generation], None]


def walk(
    evaluator: Evaluator, work: Job, file: Path, observe: Observe = lambda generation: None
) -> tuple[SearchOutcome, list[tuple[Any, ...]]]:
    """The search, and what does not depend on the clock of each generation."""
    with evaluator, History(file) as history:
        outcome = search(evaluator, work.bundle, work.settings, history, observe)
        done = history.generations
        return outcome, [
            (g.candidates, g.losses, g.metric, g.dev_score, g.dev_loss, g.step_size) for g in done
        ]


def die(worker: WorkersEvaluator, number: int) -> None:
    """A worker's process ends before its next call."""
    worker.actors[number].__ray_call__.remote(lambda self: os._exit(1))


@pytest.mark.parametrize(("engine", "method"), [("ort", "bbt"), ("ort", "bbtv2"), ("torch", "bbt")])
def test_the_trajectory_is_the_same_as_in_one_process(
    engine: str, method: str, tiny: Any, tmp_path: Path
) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(engine, engine))
    bundle = tiny("roberta", method)
    ids = np.random.default_rng(0).integers(10, 30, (6, 9))
    mask = np.arange(9) < np.array([[5], [6], [7], [8], [9], [9]])
    rows = Batch(ids, mask, np.ones(6), np.arange(6) % 2, np.array([11, 12]))
    work = replace(
        job(bundle, engine, Settings(intrinsic_dim=6, popsize=6, budget=24, seed=1)),
        train=rows,
        dev=rows,
    )
    alone = walk(work.evaluator(), work, tmp_path / "alone")[1]
    assert walk(WorkersEvaluator(2, "local", work), work, tmp_path / "shared")[1] == alone


def test_a_worker_that_dies_is_replaced_and_its_candidates_are_evaluated_again(
    bundle: Bundle, tmp_path: Path
) -> None:
    import ray

    work = job(bundle)
    alone = walk(work.evaluator(), work, tmp_path / "alone")[1]
    reports: list[str] = []
    pool = WorkersEvaluator(2, "local", work, reports.append)
    first = list(pool.actors)

    def kill(generation: Generation) -> None:
        if generation.generation == 2:
            die(pool, 0)
        if generation.generation == 6:
            ray.kill(pool.actors[0])
            die(pool, 1)
        if generation.generation == 9:
            assert not set(pool.actors) & set(first)

    assert walk(pool, work, tmp_path / "shared", kill)[1] == alone
    assert sorted(line.split(" (")[0] for line in reports) == [
        "worker 1 died",
        "worker 1 died",
        "worker 2 died",
    ]


def test_workers_that_keep_dying_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(search_bundle(tmp_path / "bundle"))
    pool = WorkersEvaluator(2, "local", work)
    made = pool._make

    def doomed() -> Any:
        actor = made()
        actor.__ray_call__.remote(lambda self: os._exit(1))
        return actor

    monkeypatch.setattr(pool, "_make", doomed)
    die(pool, 1)
    with pytest.raises(EngineError, match="3 workers died in a row") as caught:
        walk(pool, work, tmp_path / "history")
    assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_is_raised_as_itself(tmp_path: Path) -> None:
    bundle = search_bundle(tmp_path / "bundle")
    with pytest.raises(UsageError, match="unknown engine 'none'"):
        WorkersEvaluator(1, "local", job(bundle, "none"))
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="has changed since"):
        WorkersEvaluator(1, "local", job(bundle))


def test_a_loss_that_is_not_finite_names_the_candidate(tmp_path: Path) -> None:
    work = job(search_bundle(tmp_path / "bundle"))
    candidates = np.zeros((5, 6))
    candidates[4] = np.nan
    pool = WorkersEvaluator(2, "local", work)
    with pool, pytest.raises(NonFiniteLoss, match="candidate 4 is not finite"):
        pool.train(PromptSpace(work.bundle, work.settings), 0, candidates)


def test_impossible_numbers_of_workers_and_threads_are_refused(tmp_path: Path) -> None:
    work = job(search_bundle(tmp_path / "bundle"))
    for workers in (0, 3):
        with pytest.raises(
            UsageError, match=f"--workers must lie in 1..2, half of --popsize 5; got {workers}"
        ):
            WorkersEvaluator(workers, "local", work)
    record = work.engine.model_copy(update={"threads": 64})
    with pytest.raises(EngineError, match="--workers 2 needs 128 CPUs, the Ray cluster has 4"):
        WorkersEvaluator(2, "local", replace(work, engine=record))


def test_a_run_resumes_with_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = search_bundle(tmp_path / "bundle", "bbtv2")
    task, data = task_file(tmp_path / "data"), tmp_path / "data"

    def start(output: str, **more: Any) -> Run:
        options: dict[str, Any] = {
            "data": data,
            "engine": "dummy",
            "progress": False,
            "settings": SETTINGS,
            **more,
        }
        return tune(bundle, task, output=tmp_path / output, **options)

    whole = start("whole")
    evaluate = WorkersEvaluator.train
    calls = 0

    def interrupted(self: WorkersEvaluator, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return evaluate(self, *arguments)

    monkeypatch.setattr(WorkersEvaluator, "train", interrupted)
    run = start("run", workers=2)
    assert (run.info.status, run.info.calls, run.info.engine.workers) == ("interrupted", 20, 2)
    run = start("run", workers=1, resume=True)
    assert run.info.status == "done"
    assert (run.path / "prompt.safetensors").read_bytes() == (
        whole.path / "prompt.safetensors"
    ).read_bytes()
    assert [g.losses for g in run.history] == [g.losses for g in whole.history]
    with pytest.raises(UsageError, match="--workers"):
        start("other", ray="auto")


def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"no Ray cluster at {address}"), connect(address):
            pass


TERMINATED = """
import os, signal, sys
from bbt_accel.cli.commands import main
from bbt_accel.search.workers import WorkersEvaluator
train, calls = WorkersEvaluator.train, []
def counted(self, *arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return train(self, *arguments)
WorkersEvaluator.train = counted
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_sigterm_keeps_the_best_prompt_and_the_working_directory_holds_no_modules(
    tmp_path: Path,
) -> None:
    """Ray has a handler of its own for the one, and puts the other on the workers' path."""
    bundle, task, place = (
        search_bundle(tmp_path / "bundle"),
        task_file(tmp_path / "data"),
        tmp_path / "here",
    )
    for name in ("bbt_accel", "numpy", "onnx", "triton"):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text(
            'raise RuntimeError("imported from the working directory")'
        )
    words = [
        "tune",
        "--bundle",
        str(bundle.path),
        "--task",
        str(task),
        "--data",
        str(task.parent),
        "--engine",
        "dummy",
    ]
    words += ["--readout", "verbalizer", "--k-shot", "3", "--workers", "2", "-o", "run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-P", "-c", TERMINATED, *words]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130, done.stderr
    info = Run.read(place / "run").info
    assert (info.status, info.calls) == ("interrupted", 12)
