"""A tuning run as a folder: made, interrupted, killed, resumed, refused, read."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dummy_engine import DummyBoundBatch
from safetensors.numpy import load_file, save_file
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.population import Population
from bbt_accel.core.settings import FITTED
from bbt_accel.errors import BbtError, NonFiniteLoss, RunError, UsageError
from bbt_accel.io.files import reserved
from bbt_accel.search import readout_search as readouts
from bbt_accel.search.callbacks import Callback
from bbt_accel.search.history import Generation
from bbt_accel.search.run import Run

Tune = Callable[..., Run]
FILES = [
    "README.md",
    "curve.png",
    "history.jsonl",
    "prompt.safetensors",
    "readout.safetensors",
    "run.json",
    "task.toml",
]


@pytest.fixture(params=["bbt", "bbtv2"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle", request.param)


@pytest.fixture
def start(bundle: Bundle, tmp_path: Path) -> Tune:
    """`tune` of the toy task with the dummy engine, into tmp_path/run unless told otherwise."""
    task = task_file(tmp_path / "data")

    def call(output: str = "run", settings: dict[str, object] = SETTINGS, **more: Any) -> Run:
        more = {"data": tmp_path / "data", "engine": "dummy", "progress": False, **more}
        return tune(bundle, task, output=tmp_path / output, settings=settings, **more)

    return call


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C at the n-th population; scores on the dev rows do not count."""
    return lambda at: at_population(monkeypatch, at, KeyboardInterrupt)


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """NaN as the logits of the n-th population."""
    return lambda at: at_population(monkeypatch, at)


def at_population(
    monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException] | None = None
) -> None:
    count, whole = 0, DummyBoundBatch._label_logits

    def logits(self: DummyBoundBatch, population: Population) -> np.ndarray:
        nonlocal count
        count += len(population) > 1
        found = whole(self, population)
        if count != at or len(population) == 1:
            return found
        if error:
            raise error
        return np.full_like(found, np.nan)

    monkeypatch.setattr(DummyBoundBatch, "_label_logits", logits)


def prompt_bytes(run: Run) -> bytes:
    return (run.path / "prompt.safetensors").read_bytes()


def result_bytes(run: Run) -> bytes:
    """The prompt and its readout."""
    return prompt_bytes(run) + (run.path / "readout.safetensors").read_bytes()


def test_a_run_holds_what_the_next_steps_need(start: Tune, bundle: Bundle, tmp_path: Path) -> None:
    run = start()
    assert sorted(p.name for p in run.path.iterdir()) == FILES
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    info = run.info
    assert info.status == "done"
    assert (info.settings.popsize, info.settings.seed, info.settings.budget) == (4, 7, 80)
    assert info.calls == (80 if bundle.info.method == "bbt" else 72)  # whole sweeps of 3 layers
    assert (info.bundle.digest, info.bundle.backbone) == (bundle.digest, "toy")
    assert info.label_words == ["bad", "great"]
    assert {"cma", "numpy", "bbt-accel"} <= info.versions.keys()
    assert info.engine.versions == {"dummy": "1"}
    assert info.best is not None
    assert info.best.dev_score == max(g.dev_score for g in run.history if g.dev_score is not None)
    assert run.prompt.dtype == np.float32
    assert run.prompt.shape == bundle.info.prompt_shape
    assert run.task.name == "toy"
    assert (load_file(run.path / "prompt.safetensors")["prompt"] == run.prompt).all()


def test_the_same_seed_gives_the_same_prompt(start: Tune) -> None:
    first = start("a")
    assert prompt_bytes(start("b")) == prompt_bytes(first)
    assert prompt_bytes(start("c", {**SETTINGS, "seed": 8})) != prompt_bytes(first)


def test_the_default_name_says_what_was_run(
    bundle: Bundle, start: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tune(
        bundle,
        task_file(tmp_path / "data"),
        data=tmp_path / "data",
        engine="dummy",
        settings=SETTINGS,
        progress=False,
    )
    assert run.path == tmp_path / "runs" / f"toy-{bundle.info.method}-dummy-7"


@pytest.mark.parametrize("readout", ["verbalizer", "auto"])
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_end(
    start: Tune, interrupt: Callable[[int], None], readout: str
) -> None:
    settings, first = {**SETTINGS, "readout": readout}, int(readout == "auto")
    whole = start("whole", settings)
    interrupt(6)
    run = start(settings=settings)
    assert run.info.status == "interrupted"
    assert Run.read(run.path).info.calls == first + 20
    interrupt(4)  # and again, counted from where it continues
    assert start(settings=settings, resume=True).info.calls == first + 32
    interrupt(-1)
    resumed = start(settings=settings, resume=True)
    assert resumed.info.status == "done"
    assert result_bytes(resumed) == result_bytes(whole)
    assert resumed.info.best == whole.info.best


@pytest.mark.parametrize("readout", ["verbalizer", "calibrated"])
def test_a_loss_that_is_not_finite_is_an_error_and_the_best_prompt_before_it_is_saved(
    start: Tune,
    overflow: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    readout: str,
    tmp_path: Path,
) -> None:
    settings = {**SETTINGS, "readout": readout}
    for resume in (False, True):
        overflow(1 if resume else 6)  # the sixth generation, which a resumed search begins with
        with pytest.raises(NonFiniteLoss, match="candidate 0"):
            start(settings=settings, resume=resume, progress=True)
        run = Run.read(tmp_path / "run")
        assert (run.info.status, len(run.history)) == ("interrupted", 5)
        assert (
            f"{run.path} holds the best prompt of {run.info.calls} calls" in capsys.readouterr().err
        )
    overflow(-1)
    whole = start("whole", settings=settings)
    assert result_bytes(start(settings=settings, resume=True)) == result_bytes(whole)


def test_a_loss_that_is_not_finite_in_generation_one_leaves_the_readout_without_a_search(
    start: Tune, overflow: Callable[[int], None], tmp_path: Path
) -> None:
    overflow(1)
    with pytest.raises(NonFiniteLoss):
        start("runs/run")
    assert not (tmp_path / "runs").exists()
    overflow(1)
    with pytest.raises(NonFiniteLoss):
        start(settings={**SETTINGS, "readout": "calibrated"})
    run = Run.read(tmp_path / "run")
    assert (run.info.calls, run.readout.name, run.info.readout.searched) == (1, "calibrated", False)


def test_a_killed_search_keeps_the_readout_that_auto_has_chosen(
    start: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killing(Callback):
        def on_generation(self, generation: Generation) -> None:
            if generation.generation == 3:
                raise ConnectionError("enough")

    settings = {**SETTINGS, "readout": "auto"}
    whole = start("whole", settings)
    with pytest.raises(ConnectionError):
        start(settings=settings, callbacks=[Killing()])
    other = next(name for name in FITTED if name != whole.readout.name)
    monkeypatch.setattr(readouts, "chosen", lambda _: other)
    assert result_bytes(start(settings=settings, resume=True)) == result_bytes(whole)


def test_the_seconds_of_a_resumed_search_include_those_before_its_interruption(
    start: Tune, interrupt: Callable[[int], None]
) -> None:
    settings = {**SETTINGS, "readout": "auto"}
    interrupt(2)
    first = start(settings=settings).info.seconds
    interrupt(3)
    second = start(settings=settings, resume=True)
    assert second.info.seconds > first + sum(g.seconds for g in second.history[1:])


def test_other_threads_than_before_are_noted(
    start: Tune, interrupt: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(2)
    start(threads=1)
    interrupt(-1)
    start(threads=2, resume=True, progress=True)
    assert (
        "so far the search ran with threads 1, now with threads 2; the last bits"
        in capsys.readouterr().err
    )


def test_ctrl_c_before_the_first_generation_leaves_nothing(
    start: Tune, interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        start("runs/run")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_in_the_first_generation_keeps_a_readout_without_a_search(
    start: Tune, interrupt: Callable[[int], None]
) -> None:
    fitted = {**SETTINGS, "readout": "auto"}
    whole = start("whole", settings=fitted)
    interrupt(1)
    first = start(settings=fitted)
    assert (first.info.status, first.info.calls, first.history) == ("interrupted", 1, [])
    assert first.readout.name == whole.readout.name
    resumed = start(settings=fitted, resume=True)
    assert result_bytes(resumed) == result_bytes(whole)


def test_resume_starts_a_run_and_returns_a_complete_one(start: Tune) -> None:
    first = start(resume=True)
    before = (first.path / "run.json").stat().st_mtime_ns
    assert start(resume=True).info == first.info
    assert (first.path / "run.json").stat().st_mtime_ns == before


def test_what_others_put_into_a_run_is_there_after_it_was_continued(start: Tune) -> None:
    first = start()
    (first.path / "tensorboard").mkdir()
    (first.path / "tensorboard" / "notes.txt").write_text("mine")
    continued = start(settings={"budget": 2 * first.info.settings.budget}, resume=True)
    assert continued.info.calls > first.info.calls
    assert (continued.path / "tensorboard" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("readout", ["verbalizer", "calibrated", "auto"])
@pytest.mark.parametrize(
    "first", [20, 48]
)  # the dev score at its end is due there in a longer search, or it is not
def test_a_larger_budget_continues_a_complete_run_as_if_it_had_been_given_at_first(
    start: Tune, readout: str, first: int
) -> None:
    settings = {**SETTINGS, "readout": readout, "popsize": 4, "eval_every": 16}
    whole, short = (
        start("whole", settings | {"budget": 80}),
        start(settings=settings | {"budget": first}),
    )
    computed = short.history[:-1]
    continued = start(settings={"budget": 80}, resume=True)
    assert result_bytes(continued) == result_bytes(whole)
    assert continued.info.best == whole.info.best
    assert (continued.info.calls, continued.info.settings) == (
        whole.info.calls,
        whole.info.settings,
    )
    times = {"seconds", "calls_per_second"}
    one, other = ([g.model_dump(exclude=times) for g in run.history] for run in (continued, whole))
    assert one == other
    assert (
        continued.history[: len(computed)] == computed
    )  # with its times: it was not computed again
    assert [r.name for r in continued.info.readout.tried] == [
        r.name for r in whole.info.readout.tried
    ]


def test_a_run_that_is_interrupted_on_the_way_to_a_larger_budget_is_continued_to_it(
    start: Tune, interrupt: Callable[[int], None]
) -> None:
    larger = {**SETTINGS, "budget": 80}
    whole, done = start("whole", larger), len(start(settings={**SETTINGS, "budget": 40}).history)
    interrupt(3)
    halted = start(settings=larger, resume=True)
    assert (halted.info.status, halted.info.settings.budget) == ("interrupted", 80)
    assert done < len(halted.history) < len(whole.history)
    interrupt(-1)
    assert result_bytes(start(resume=True, settings={})) == result_bytes(whole)


def test_an_existing_run_is_replaced_only_on_request(start: Tune) -> None:
    first = start()
    with pytest.raises(RunError, match="--resume, --overwrite"):
        start()
    assert Run.read(first.path).info == first.info
    second = start(settings={**SETTINGS, "seed": 8}, overwrite=True)
    assert second.info.settings.seed == 8
    assert not [p for p in second.path.parent.iterdir() if p.name.startswith(".")]


def test_overwrite_replaces_only_runs(start: Tune, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is not a run"):
        start(overwrite=True)
    assert (tmp_path / "run" / "letter.txt").read_text() == "dear"


def test_overwrite_replaces_a_link_to_a_run_and_leaves_that_run(
    start: Tune, tmp_path: Path
) -> None:
    first = start("elsewhere")
    (tmp_path / "run").symlink_to(first.path, target_is_directory=True)
    for seed in (8, 9):
        second = start(settings={**SETTINGS, "seed": seed}, overwrite=True)
        assert second.info.settings.seed == seed
    assert Run.read(first.path).info == first.info
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("readout", ["verbalizer", "calibrated"])
@pytest.mark.parametrize("at", [1, 3])
def test_overwrite_keeps_the_former_run_until_the_new_one_is_complete(
    start: Tune, interrupt: Callable[[int], None], at: int, readout: str
) -> None:
    first, settings = start(), {**SETTINGS, "seed": 8, "readout": readout}
    whole = start("whole", settings)
    interrupt(at)
    with pytest.raises(KeyboardInterrupt):
        start(settings=settings, overwrite=True)
    assert Run.read(first.path).info == first.info
    interrupt(-1)
    assert prompt_bytes(start(settings=settings, resume=at > 1, overwrite=at == 1)) == prompt_bytes(
        whole
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {**SETTINGS, "budget": 40}}, r"budget \(was 80, is now 40\)"),
        ({"settings": {**SETTINGS, "seed": 8}}, r"seed \(was 7, is now 8\)"),
        ({"without": ["buckets"]}, r"without \(was \[\], is now \['buckets'\]\)"),
        ({"engine": "torch", "device": "cuda"}, r"device \(was cpu, is now cuda\)"),
    ],
)
def test_resume_names_what_is_different(start: Tune, change: dict[str, Any], named: str) -> None:
    start()
    with pytest.raises(RunError, match=named):
        start(resume=True, **change)


def test_resume_refuses_other_rows_and_another_bundle(
    start: Tune, tmp_path: Path, bundle: Bundle
) -> None:
    start()
    rows = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(rows.replace("w1", "w2"))
    with pytest.raises(RunError, match="data"):
        tune(
            bundle, tmp_path / "data" / "task.toml", data=tmp_path / "data", engine="dummy",
            output=tmp_path / "run",
            resume=True, progress=False,
        )  # fmt: skip
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    search_bundle(tmp_path / "bundle", bundle.info.method, precision="fp16")
    with pytest.raises(RunError, match="bundle"):
        start(resume=True)


def test_resume_takes_settings_that_are_not_given_from_the_run(
    start: Tune, interrupt: Callable[[int], None]
) -> None:
    whole = start("whole")
    interrupt(5)
    start()
    interrupt(-1)
    assert prompt_bytes(start(settings={}, resume=True)) == prompt_bytes(whole)


def test_usage_is_checked_before_anything_is_written(start: Tune, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        start("runs/run", resume=True, overwrite=True)
    with pytest.raises(UsageError, match="too small"):
        start("runs/run", {**SETTINGS, "budget": 3})
    with pytest.raises(UsageError, match="omit it with --engine remote"):
        start("runs/run", engine="remote", workers=2)
    with pytest.raises(BbtError, match="class '0' has 15 rows"):
        start("runs/run", {**SETTINGS, "k_shot": 16})
    assert not (tmp_path / "runs").exists()


def test_a_damaged_run_is_refused(start: Tune, tmp_path: Path) -> None:
    run = start()

    def damaged(name: str, content: bytes | None) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run.path, copy)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        return copy

    with pytest.raises(RunError, match="is not a run"):
        Run.read(tmp_path / "nothing")
    with pytest.raises(RunError, match="is not a run"):
        Run.read(damaged("run.json", None))
    with pytest.raises(RunError, match="cannot be read"):
        Run.read(damaged("run.json", b"{"))
    with pytest.raises(RunError, match="run format 99"):
        Run.read(
            damaged(
                "run.json",
                (run.path / "run.json").read_bytes().replace(b'"format": 3', b'"format": 99'),
            )
        )
    with pytest.raises(RunError, match=r"has no prompt\.safetensors"):
        Run.read(damaged("prompt.safetensors", None))
    save_file({"prompt": run.prompt + 1}, tmp_path / "other")
    with pytest.raises(RunError, match="sha256"):
        Run.read(damaged("prompt.safetensors", (tmp_path / "other").read_bytes()))


def test_tensorboard_shows_every_generation(start: Tune) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(track=["tensorboard"])
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    shown = [(e.step, e.value) for e in events.Scalars("best_loss")]
    assert shown == [(g.calls, pytest.approx(g.best_loss)) for g in run.history]
    assert len(events.Scalars("dev_score")) == len(
        [g for g in run.history if g.dev_score is not None]
    )


# A fork for each line, killed before or after the n-th call that renames, replaces or syncs a file.
KILLED = """
import json, os, signal, sys
import huggingface_hub.repocard, matplotlib.backends.backend_agg, matplotlib.figure
from bbt_accel import tune
import dummy_engine
def searched(task, bundle, data, output, settings, resume, at):
    count = 0
    def point():
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def deadly(function):
        return lambda *args: (point(), function(*args), point())[1]
    os.fsync, os.rename, os.replace = map(deadly, (os.fsync, os.rename, os.replace))
    options = dict(engine="dummy", output=output, settings=settings, progress=False)
    tune(bundle, task, data=data, resume=resume, **options)
    return count
for line in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(120)
        print(json.dumps([0, searched(*json.loads(line))]), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(json.dumps([status, None]), flush=True)
"""
InAFork = Callable[[Path, str, int, bool], tuple[int, Any]]


@pytest.fixture(scope="module")
def in_a_fork() -> Iterator[InAFork]:
    """`in_a_fork(tmp_path, output, at, resume)`: the exit code of a search that is killed at a
    point, and its points.

    Its process is a fork of one that has imported everything.
    """

    def call(tmp_path: Path, output: str, at: int, resume: bool) -> tuple[int, Any]:
        data = str(tmp_path / "data")
        settings = {**SETTINGS, "budget": 48}
        arguments = [
            f"{data}/task.toml",
            str(tmp_path / "bundle"),
            data,
            str(tmp_path / output),
            settings,
            resume,
            at,
        ]
        process.stdin.write(json.dumps(arguments) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        code, points = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        return code, points

    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield call


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("bundle", ["bbtv2"], indirect=True)
def test_a_run_killed_at_any_moment_resumes_to_the_same_prompt(
    start: Tune, in_a_fork: InAFork, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "budget": 48}
    whole = start("whole", settings)
    _, steps = in_a_fork(tmp_path, "counted", 0, False)
    rng = random.Random(len(whole.history))
    # Anywhere in the search; then, resumed, at the very end, where the folder takes its name.
    for output, at in (("a", rng.randrange(1, steps - 8)), ("b", steps - 1)):
        assert in_a_fork(tmp_path, output, at, False)[0] == -signal.SIGKILL
        if (tmp_path / output).exists():
            Run.read(tmp_path / output)  # nothing half-written has its final name
        in_a_fork(tmp_path, output, rng.randrange(1, 12), True)
        resumed = start(output, settings, resume=True)
        assert prompt_bytes(resumed) == prompt_bytes(whole)
        assert resumed.info.best == whole.info.best
        assert not [p for p in tmp_path.iterdir() if p.name == f".{output}.partial"]
        assert sorted(p.name for p in resumed.path.iterdir()) == FILES


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("bundle", ["bbt"], indirect=True)
def test_a_run_killed_on_the_way_to_a_larger_budget_is_still_there_and_continued(
    start: Tune, in_a_fork: InAFork, tmp_path: Path
) -> None:
    larger, smaller = {**SETTINGS, "budget": 48}, {**SETTINGS, "budget": 24}
    whole, first = start("whole", larger), prompt_bytes(start("counted", smaller))
    _, steps = in_a_fork(tmp_path, "counted", 0, True)
    rng = random.Random(len(whole.history))
    for number, at in enumerate((1, rng.randrange(2, steps - 8), *range(steps - 4, steps))):
        output = f"killed-{number}"
        start(output, smaller)
        assert in_a_fork(tmp_path, output, at, True)[0] == -signal.SIGKILL
        if (tmp_path / output).exists():  # else it was renamed, and is so again by the next command
            assert prompt_bytes(Run.read(tmp_path / output)) in (first, prompt_bytes(whole))
        assert prompt_bytes(start(output, larger, resume=True)) == prompt_bytes(whole)
        assert not [
            p
            for p in tmp_path.iterdir()
            if p.name.startswith(f".{output}.") and p.suffix != ".lock"
        ]


@pytest.mark.parametrize("readout", ["verbalizer", "auto"])
def test_a_run_killed_between_two_generations_resumes_to_the_same_prompt(
    start: Tune, tmp_path: Path, readout: str
) -> None:
    """The folder as a killed process leaves it, at every generation: run.json, and some lines of
    history.
    """
    settings = {**SETTINGS, "readout": readout}
    whole = start("whole", settings)
    lines = (whole.path / "history.jsonl").read_bytes().splitlines(keepends=True)
    running = whole.info.model_copy(
        update={"status": "running", "calls": 0, "best": None, "prompt_sha256": ""}
    )
    for generations in (0, 1, len(lines) // 2, len(lines)):
        partial = tmp_path / ".run.partial"
        partial.mkdir()
        (partial / "run.json").write_text(running.model_dump_json())
        (partial / "history.jsonl").write_bytes(b"".join(lines[:generations]) + b'{"generation": ')
        (partial / ".prompt.safetensors.123").write_bytes(b"half")
        with pytest.raises(RunError, match="--resume"):
            start(settings=settings)
        run = start(settings=settings, resume=True)
        assert result_bytes(run) == result_bytes(whole)
        assert sorted(p.name for p in run.path.iterdir()) == FILES
        shutil.rmtree(run.path)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("place", ["run", ".run.partial"])
def test_a_run_in_use_is_refused_and_left_alone(
    start: Tune,
    tmp_path: Path,
    options: dict[str, Any],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setattr("bbt_accel.io.files.PATIENCE", 0.0)
    run = start()
    if place != "run":
        shutil.move(run.path, tmp_path / place)
    (tmp_path / place / ".run.json.123").write_text("half")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with reserved(run.path):
        with pytest.raises(
            BbtError, match="in use by another bbt-accel; wait for it or choose another -o"
        ):
            start(**options)
        assert {p: p.read_bytes() for p in before} == before


def test_two_searches_at_once_end_as_one_run_and_one_line(start: Tune, tmp_path: Path) -> None:
    """One is started while the other computes, in a thread of this process."""
    pytest.importorskip("fcntl")
    refusals: list[str] = []
    whole = DummyBoundBatch._label_logits

    def second(self: DummyBoundBatch, population: Population) -> np.ndarray:
        if not refusals:
            for options in ({}, {"overwrite": True}, {"resume": True}):
                refusals.append("")  # so that this one does not start a third
                try:
                    start(**options)
                except BbtError as error:
                    refusals[-1] = str(error)
        return whole(self, population)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bbt_accel.io.files.PATIENCE", 0.0)
        patch.setattr(DummyBoundBatch, "_label_logits", second)
        run = start()
    assert all("is in use" in refusal for refusal in refusals)
    assert len(refusals) == 3
    assert prompt_bytes(run) == prompt_bytes(start("other"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("content", ["", "dear"])
def test_a_folder_that_appears_during_the_search_is_left_alone(
    start: Tune, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DummyBoundBatch._label_logits

    def appear(self: DummyBoundBatch, population: Population) -> np.ndarray:
        (tmp_path / "run").mkdir(exist_ok=True)
        if content:
            (tmp_path / "run" / "letter.txt").write_text(content)
        return whole(self, population)

    with monkeypatch.context() as patch:
        patch.setattr(DummyBoundBatch, "_label_logits", appear)
        with pytest.raises(RunError, match=r"appeared during the search.*then --resume"):
            start()
    with pytest.raises(RunError, match="appeared"):
        start(resume=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == (["letter.txt"] if content else [])
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert prompt_bytes(start(resume=True)) == prompt_bytes(start("other"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["fsync", "replace", "rename"])
def test_a_full_disk_is_one_line_and_the_search_continues_later(
    start: Tune, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    whole, count = start("whole"), 0
    ours = getattr(os, at)

    def filling(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return full() if count > {"fsync": 4, "replace": 2, "rename": 1}[at] else ours(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, at, filling)
        if at == "rename":
            patch.setattr("bbt_accel.search.workspace.rename_new", full)
        with pytest.raises(
            RunError, match=r"cannot write .*\.run\.partial .*No space left.*; free some .*--resume"
        ):
            start()
    assert prompt_bytes(start(resume=True)) == prompt_bytes(whole)


def test_a_full_disk_at_the_plot_costs_the_plot_alone(
    start: Tune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bbt_accel.search.workspace.draw_curve", full)
    run = start(progress=True)
    assert run.info.status == "done"
    assert sorted(p.name for p in run.path.iterdir()) == [
        name for name in FILES if name != "curve.png"
    ]
    assert (
        "has no curve.png, which could not be written (No space left on device)"
        in capsys.readouterr().err
    )


TERMINATED = """
import os, signal, sys
from bbt_accel.cli.commands import main
from dummy_engine import DummyBoundBatch
whole, count = DummyBoundBatch._label_logits, 0
def logits(self, population):
    global count
    count += len(population) > 1
    if count == 6 and len(population) > 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, population)
DummyBoundBatch._label_logits = logits
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("bundle", ["bbt"], indirect=True)
def test_sigterm_ends_the_command_as_ctrl_c_does(bundle: Bundle, tmp_path: Path) -> None:
    task = task_file(tmp_path / "data")
    words = [
        "tune",
        "--bundle",
        str(bundle.path),
        "--task",
        str(task),
        "--data",
        str(tmp_path / "data"),
    ]
    words += [
        "--engine",
        "dummy",
        "--readout",
        "verbalizer",
        "--k-shot",
        "3",
        "-o",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    info = Run.read(tmp_path / "run").info
    assert (info.status, info.calls) == ("interrupted", 20)


def test_a_killed_replacement_is_undone(start: Tune) -> None:
    run = start()
    os.rename(run.path, run.path.with_name(f".{run.path.name}.old"))
    assert start(resume=True).info == run.info
