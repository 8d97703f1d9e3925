"""Sweeps: what they run, what they keep, and the table of scores."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import blank_plot
from dummy_engine import DummyBoundBatch
from search_parts import search_bundle, task_file

from bbt_accel.benchmarks.sweep import runner
from bbt_accel.benchmarks.sweep.cross_evaluation import score_prompts
from bbt_accel.benchmarks.sweep.grid import PRESETS, Sweep, Trial, preset_names, read_sweep
from bbt_accel.benchmarks.sweep.rendering import markdown, scores
from bbt_accel.benchmarks.sweep.report import SweepReport, TrialResult, make_report
from bbt_accel.benchmarks.sweep.runner import run_sweep
from bbt_accel.cli.commands import app, main
from bbt_accel.errors import BbtError, BundleError, DataError, EngineError, RunError, UsageError
from bbt_accel.io import processes
from bbt_accel.io.pools import Pool, PoolJob
from bbt_accel.search.run import Run
from bbt_accel.tasks.task import load_task

FAST = {"readout": "verbalizer", "k_shot": 3, "eval_every": 10, "budget": 24}


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, Any]:
    """What a sweep is given: the toy task, a bundle, two seeds, the engine without weights."""
    search_bundle(tmp_path / "toy-bundle")
    task = task_file(tmp_path / "data" / "toy")
    return {
        "tasks": [str(task)],
        "bundles": [str(tmp_path / "toy-bundle")],
        "engines": ["dummy"],
        "seeds": [1, 2],
        "data": str(tmp_path / "data"),
        "settings": FAST,
    }


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than a search. The tests with failed or missing trials draw it."""
    monkeypatch.setattr(runner, "draw", blank_plot)


def sweep(folder: Path, given: dict[str, Any] | None = None, **more: Any) -> SweepReport:
    return run_sweep(folder, given=given, progress=False, **more)


@pytest.mark.usefixtures("in_process")
def test_every_combination_is_tuned_scored_and_in_the_table(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    search_bundle(tmp_path / "deep", "bbtv2")
    report = sweep(
        tmp_path / "sweep", {**toy, "bundles": [*toy["bundles"], str(tmp_path / "deep")]}
    )
    assert [(t.name, t.status) for t in report.trials] == [
        (f"toy-{bundle}-dummy-{seed}", "done")
        for bundle in ("toy-bundle", "deep")
        for seed in (1, 2)
    ]
    assert [(row.method, row.bundle, row.engine) for row in report.rows] == [
        ("bbt", "toy-bundle", "dummy"),
        ("bbtv2", "deep", "dummy"),
    ]
    run = Run.read(tmp_path / "sweep" / "trials" / "toy-deep-dummy-2" / "run")
    assert (run.info.settings.seed, run.info.settings.budget, run.info.bundle.method) == (
        2,
        24,
        "bbtv2",
    )
    assert (
        SweepReport.model_validate_json((tmp_path / "sweep" / "report.json").read_text()) == report
    )
    table = (tmp_path / "sweep" / "report.md").read_text()
    mean, std = report.rows[0].cells[0].mean, report.rows[0].cells[0].std
    assert mean is not None
    assert std is not None
    assert f"| BBT | toy-bundle | dummy | {100 * mean:.2f} ({100 * std:.2f}) |" in table
    assert (tmp_path / "sweep" / "report.png").stat().st_size > 10_000
    assert not list((tmp_path / "sweep").rglob(".*"))


@pytest.mark.usefixtures("in_process", "without_plots")
def test_finished_trials_are_not_run_again_and_more_can_be_added(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    first = sweep(folder, {**toy, "seeds": [1]})
    with pytest.raises(BbtError, match="can be continued with --resume"):
        sweep(folder, toy)
    started: list[str] = []
    start = InProcess.start

    def recorded(self: InProcess, job: PoolJob) -> None:
        started.append(job.name)
        start(self, job)

    monkeypatch.setattr(InProcess, "start", recorded)
    again = sweep(folder, resume=True)
    assert (started, again.trials) == ([], first.trials)
    more = sweep(folder, {"seeds": [1, 2]}, resume=True)
    assert started == ["toy-toy-bundle-dummy-2"]
    assert more.trials[0] == first.trials[0]
    assert more.count("done") == 2


@pytest.mark.usefixtures("in_process", "without_plots")
def test_an_interrupted_trial_is_resumed(toy: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first = sweep(folder, {**toy, "seeds": [1]})
    trial = folder / "trials" / "toy-toy-bundle-dummy-1"
    whole = Run.read(trial / "run")
    partial = trial / ".run.partial"
    shutil.move(trial / "run", partial)
    for name in ("prompt.safetensors", "curve.png"):
        (partial / name).unlink()
    lines = (partial / "history.jsonl").read_text().splitlines(keepends=True)
    (partial / "history.jsonl").write_text("".join(lines[:2]))
    running = whole.info.model_copy(
        update={"status": "running", "calls": 0, "best": None, "prompt_sha256": ""}
    )
    (partial / "run.json").write_text(running.model_dump_json())
    (trial / "score.json").unlink()
    again = sweep(folder, resume=True)
    assert again.trials[0].score == first.trials[0].score
    resumed = Run.read(trial / "run")
    assert (resumed.prompt == whole.prompt).all()
    assert (
        (resumed.path / "history.jsonl").read_text().startswith("".join(lines[:2]))
    )  # their times, too


@pytest.mark.usefixtures("in_process", "without_plots")
def test_a_loss_for_the_verbalizer_alone_makes_it_the_readout_of_every_trial(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    own = {name: value for name, value in FAST.items() if name != "readout"}
    report = sweep(tmp_path / "sweep", {**toy, "seeds": [1], "settings": {**own, "loss": "hinge"}})
    assert [(trial.status, trial.reason) for trial in report.trials] == [("done", None)]
    found = Run.read(tmp_path / "sweep" / "trials" / report.trials[0].name / "run").info.settings
    assert (found.loss, found.readout) == ("hinge", "verbalizer")


def test_rows_that_are_missing_end_a_sweep_before_its_first_search(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="--k-shot 500 needs 1000"):
        sweep(tmp_path / "sweep", {**toy, "settings": {**FAST, "k_shot": 500}})
    (tmp_path / "data" / "toy" / "test.jsonl").unlink()
    with pytest.raises(DataError, match="has no test rows"):
        sweep(tmp_path / "sweep", toy)
    assert not (tmp_path / "sweep").exists()


def test_two_trials_of_the_same_name_are_refused(toy: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(Path(toy["tasks"][0]).read_text().replace('name = "toy"', 'name = "toy-a"'))
    bundles = [str(search_bundle(tmp_path / name).path) for name in ("b", "a-b")]
    with pytest.raises(UsageError, match="2 trials are named toy-a-b-dummy-1; rename"):
        Sweep(
            tasks=[*toy["tasks"], str(other)], bundles=bundles, engines=["dummy"], seeds=[1]
        ).trials()


def test_failures_are_rows_and_the_other_trials_run(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = processes.prepare
    crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]

    def crashing(function: Any, arguments: dict[str, Any], folder: Path) -> list[str]:
        return crash if arguments["trial"]["seed"] == 1 else prepare(function, arguments, folder)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "prepare", crashing)
        report = sweep(tmp_path / "sweep", {**toy, "seeds": [1, 2]}, jobs=2)
    assert [(t.status, t.reason) for t in report.trials] == [
        ("failed", "the process was ended by SIGSEGV"),
        ("done", None),
    ]
    text = (tmp_path / "sweep" / "report.md").read_text()
    assert "2 trials: 1 done, 1 failed." in text
    assert "- **toy-toy-bundle-dummy-1:** the process was ended by SIGSEGV" in text
    assert sweep(tmp_path / "sweep", resume=True).count("done") == 2

    before = (tmp_path / "sweep" / "report.md").read_text()
    with pytest.raises(
        RunError,
        match=r"finished trial with another budget \(was 24, is now 20\); choose another -o",
    ):
        sweep(tmp_path / "sweep", {"seeds": [2], "settings": {"budget": 20}}, resume=True)
    assert (tmp_path / "sweep" / "report.md").read_text() == before
    assert sweep(tmp_path / "sweep", resume=True).count("done") == 2


@pytest.mark.usefixtures("in_process", "without_plots")
def test_a_sweep_is_continued_to_a_larger_budget(toy: dict[str, Any], tmp_path: Path) -> None:
    whole = sweep(tmp_path / "whole", {**toy, "settings": {**FAST, "budget": 40}})
    sweep(tmp_path / "sweep", toy)
    larger = sweep(tmp_path / "sweep", {"settings": {"budget": 40}}, resume=True)
    assert [(t.status, t.calls, t.score) for t in larger.trials] == [
        ("done", t.calls, t.score) for t in whole.trials
    ]
    assert [t.calls for t in larger.trials] == [40, 40]


@pytest.mark.usefixtures("in_process", "without_plots")
def test_a_setting_that_is_gone_from_the_sweep_is_not_taken_from_its_former_runs(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    sweep(tmp_path / "sweep", {**toy, "seeds": [1], "settings": {**FAST, "alpha": 2.0}})
    config = tmp_path / "sweep.toml"
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in {**toy, "seeds": [1]}.items()
        if name != "settings"
    ]
    settings = [f"{name} = {json.dumps(value)}" for name, value in FAST.items()]
    config.write_text("\n".join([*lines, "[settings]", *settings]))
    with pytest.raises(RunError, match=r"alpha \(was 2.0, is now 1.0\)"):
        run_sweep(tmp_path / "sweep", config=config, resume=True, progress=False)


@pytest.mark.usefixtures("in_process", "without_plots")
@pytest.mark.parametrize("changed", ["task definition", "data"])
def test_a_trial_of_another_task_or_other_rows_is_not_kept(
    toy: dict[str, Any], tmp_path: Path, changed: str
) -> None:
    sweep(tmp_path / "sweep", {**toy, "seeds": [1]})
    if changed == "data":
        file = tmp_path / "data" / "toy" / "train.jsonl"
        file.write_text(file.read_text().replace("w1 ", "w2 "))
    else:
        file = Path(toy["tasks"][0])
        file.write_text(file.read_text().replace("it was", "it is"))
    with pytest.raises(
        RunError, match=f"finished trial with another .*{changed}.*; choose another -o"
    ):
        sweep(tmp_path / "sweep", resume=True)


@pytest.mark.usefixtures("in_process")
def test_an_interrupt_keeps_finished_trials(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = InProcess.wait
    ended = 0

    def interrupted(self: InProcess) -> Any:
        nonlocal ended
        if ended:
            raise KeyboardInterrupt
        ended += 1
        return wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "wait", interrupted)
        report = sweep(tmp_path / "sweep", toy)
    assert report.interrupted
    assert [t.status for t in report.trials] == ["done", "not run"]
    report = sweep(tmp_path / "sweep", resume=True)
    assert (report.interrupted, report.count("done")) == (False, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_sweep_on_ray_gives_the_same_scores(toy: dict[str, Any], tmp_path: Path) -> None:
    here = sweep(tmp_path / "here", toy)
    there = sweep(tmp_path / "there", toy, ray="local", jobs=2)
    assert [t.score for t in there.trials] == [t.score for t in here.trials]
    assert there.count("done") == 2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_task_that_dies_on_ray_is_a_failure(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(function: Any, arguments: dict[str, Any]) -> None:
        import os

        os._exit(3)

    crash.__module__ = "__main__"  # so that it travels whole
    monkeypatch.setattr(processes, "attempt", crash)
    report = sweep(tmp_path / "sweep", {**toy, "seeds": [1]}, ray="local")
    assert report.trials[0].status == "failed"
    assert (report.trials[0].reason or "").startswith("the process ended (")
    with pytest.raises(EngineError, match="a trial needs 64 CPUs"):
        sweep(tmp_path / "other", toy, ray="local", threads=64)


def test_options_override_the_toml_file(toy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'tasks = ["{toy["tasks"][0]}"]\nbundles = ["{toy["bundles"][0]}"]\nengines = '
        '["dummy"]\nseeds = [1, 2, 3]\n'
        "[settings]\nbudget = 40\nk_shot = 3\n"
    )
    found = read_sweep(file, {"seeds": [5], "engines": None, "settings": {"budget": 24}})
    assert (found.seeds, found.engines, found.settings) == (
        [5],
        ["dummy"],
        {"budget": 24, "k_shot": 3},
    )
    assert [trial.seed for trial in found.trials()] == [5]


@pytest.mark.usefixtures("in_process", "without_plots")
def test_settings_that_do_not_apply_are_not_taken_for_given_ones(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    report = sweep(tmp_path / "sweep", {**toy, "settings": {**FAST, "random_proj": "uniform"}})
    assert [trial.status for trial in report.trials] == ["done", "done"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tasks": []}, "the sweep has no tasks; give --tasks, a --config or a --preset"),
        ({"seeds": [1, 1]}, "seeds: the same value is listed twice"),
        ({"seeds": ["1", "x"]}, "unable to parse string as an integer; got 'x'"),
        ({"engines": ["ortt"]}, "unknown engine 'ortt'; did you mean ort?"),
        (
            {"engines": ["remote"]},
            "sweep has no --url for the engine remote; use tune and evaluate",
        ),
        ({"settings": {"budgett": 3}}, "did you mean budget"),
        ({"settings": {"seed": 3}}, "a sweep takes no setting 'seed'"),
        (
            {"settings": {"hold_out": True}, "cross_evaluate": True},
            "cross_evaluate scores on test rows",
        ),
        ({"settings": {"readout": "verbalizer", "budget": 3}}, "budget 3 is too small"),
        (
            {"settings": {"readout": "auto", "loss": "hinge"}},
            "--loss hinge is for --readout verbalizer",
        ),
        ({"settings": {"demonstrations": 4}}, "demonstrations are for decoders"),
        ({"engines": ["dummy", "openvino"], "device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"tasks": ["sst"]}, "did you mean sst2"),
        ({"bundles": ["nowhere"]}, "nowhere is not a bundle"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_runs(
    toy: dict[str, Any], tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BbtError, match=re.escape(complaint)) as caught:
        sweep(tmp_path / "sweep", {**toy, **change})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_a_trial_on_ray_has_a_gpu_of_its_own(toy: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--device cuda:1: a trial on Ray gets a GPU of its own; use --device cuda"
    ):
        sweep(tmp_path / "sweep", {**toy, "device": "cuda:1"}, ray="local")


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.toml").write_text("tasks = [")
    (tmp_path / "odd.toml").write_text('taskes = ["sst2"]')
    found = {
        "broken": "broken.toml: ",
        "odd": "odd.toml: 'taskes'; did you mean tasks",
        "no": "cannot read the sweep",
    }
    for name, complaint in found.items():
        with pytest.raises(UsageError, match=complaint):
            sweep(tmp_path / "sweep", config=tmp_path / f"{name}.toml")
    (tmp_path / "letters").mkdir()
    with pytest.raises(BbtError, match="is not a sweep"):
        sweep(tmp_path / "letters", resume=True)
    with pytest.raises(SystemExit):
        main(["sweep", "-o", str(tmp_path / "mistyped"), "--resume"])
    assert "mistyped does not exist, so --resume has nothing to continue" in capsys.readouterr().err


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_the_papers_and_say_how_to_make_the_bundle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = read_sweep(PRESETS / f"{name}.toml", {})
    assert set(found.tasks) == {"sst2", "yelpp", "agnews", "dbpedia", "mrpc", "rte", "snli"}
    assert len(found.seeds) == 3
    assert found.needs is not None
    with pytest.raises(
        BundleError, match=re.escape(f"create it with {found.needs}, or pass yours as --bundles")
    ):
        sweep(tmp_path / "sweep", preset=name)
    words = shlex.split(found.needs)
    cli: Any = typer.main.get_command(app)
    known = {option for parameter in cli.commands[words[1]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
    assert words[-1] == found.bundles[0]
    search_bundle(tmp_path / "own", found.method or "")
    given = read_sweep(PRESETS / f"{name}.toml", {"bundles": [str(tmp_path / "own")]})
    assert {trial.definition.metric for trial in given.trials() if trial.task == "mrpc"} == {"f1"}
    search_bundle(tmp_path / "own", "bbt" if found.method == "bbtv2" else "bbtv2")
    with pytest.raises(BundleError, match=f"was exported for .*, not {found.method}"):
        given.trials()


def made_up(task: str, seed: int) -> Trial:
    return Trial(
        task=task,
        definition=load_task(task),
        bundle="/b/large",
        digest="",
        method="bbt",
        engine="ort",
        seed=seed,
        device="cpu",
        data=None,
        rows=None,
        settings={},
    )


def made_up_result(trial: Trial, score: float) -> TrialResult:
    return TrialResult(
        trial=trial,
        score=score,
        without_prompt=0.5,
        batch_calibrated=0.6,
        dev_score=0.75,
        test_rows=100,
        calls=8000,
        seconds=60,
        versions={},
    )


def test_the_table_is_in_the_form_of_the_papers() -> None:
    trials = [made_up(task, seed) for task in ("sst2", "mrpc", "rte") for seed in (1, 2, 3)]
    points = dict(zip([t.name for t in trials[:4]], (0.8950, 0.8925, 0.8993, 0.6156), strict=True))
    results = {t.name: made_up_result(t, points[t.name]) for t in trials if t.name in points}
    plan = Sweep(tasks=["sst2", "mrpc", "rte"], bundles=["large"], seeds=[1, 2, 3])
    broken = {t.name: "out of memory" for t in trials[5:]}
    report = make_report(plan, trials, results, broken)
    assert scores(report).splitlines() == [
        "| method | bundle | engine | sst2 | mrpc (F1) | rte | mean |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| BBT | large | ort | 89.56 (0.34) | 61.56, 1 of 3 seeds | failed | – |",
        "| without_prompt | large | ort | 50.00 | 50.00 | – | – |",
        "| batch_calibrated | large | ort | 60.00 | 60.00 | – | – |",
    ]
    assert "9 trials: 4 done, 4 failed, 1 not run." in markdown(report, plot=False)
    results |= {t.name: made_up_result(t, 0.6) for t in trials[4:]}
    assert (
        scores(make_report(plan, trials, results, {}))
        .splitlines()[2]
        .endswith("| 60.00 (0.00) | 70.03 |")
    )


def test_every_field_of_the_report_is_documented() -> None:
    schema = SweepReport.model_json_schema()
    for name, part in {"SweepReport": schema, **schema["$defs"]}.items():
        for field, description in part["properties"].items():
            assert description.get("description"), f"{name}.{field}"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_the_command_passes_what_was_given_and_ends_with_1_if_a_trial_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [made_up("sst2", 1), made_up("sst2", 2)]
    results = {trials[0].name: made_up_result(trials[0], 0.9)}
    plan = Sweep(tasks=["sst2"], bundles=["large"], seeds=[1, 2])
    calls: list[dict[str, Any]] = []
    report = make_report(plan, trials, results, {trials[1].name: "out of memory"})

    def fake(output: Path, **options: Any) -> SweepReport:
        calls.append({"output": output, **options})
        return report

    monkeypatch.setattr(runner, "run_sweep", fake)
    words = [
        "sweep",
        "-o",
        "s",
        "--tasks",
        "sst2, rte",
        "--bundles",
        "b",
        "--seeds",
        "1,2",
        "--set",
        "budget=9",
    ]
    code, out, err = command(capsys, *words, "--jobs", "2", "--set", "cross_evaluate=true")
    assert (code, err) == (1, "error: 1 of 2 trials failed; retry them with --resume\n")
    assert "90.00" in out
    assert "out of memory" in out
    given = {
        "tasks": ["sst2", "rte"],
        "bundles": ["b"],
        "seeds": ["1", "2"],
        "cross_evaluate": True,
    }
    assert calls[0]["given"] == {**given, "settings": {"budget": 9}}
    assert (calls[0]["output"], calls[0]["jobs"], calls[0]["resume"]) == (Path("s"), 2, False)
    report = make_report(plan, trials, results, {}, interrupted=True)
    code, out, err = command(capsys, *words, "--json")
    assert (code, err) == (130, "interrupted\n")
    assert json.loads(out)["trials"][1]["status"] == "not run"
    report = make_report(plan, trials[:1], results, {})
    assert command(capsys, *words)[0] == 0


class InProcess(Pool):
    """Calls the functions in this process: faster, and a test can replace parts of them."""

    jobs, threads = 1, 1

    def start(self, job: PoolJob) -> None:
        self.reply = job.name, processes.attempt(job.function, job.arguments)

    def wait(self) -> tuple[str, processes.Reply]:
        return self.reply

    def close(self) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "open_pool", lambda *arguments: InProcess())


@pytest.mark.usefixtures("in_process", "without_plots")
def test_cross_evaluation_scores_every_prompt_in_each_bundle_that_takes_it(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_bundle(tmp_path / "half", precision="fp16")
    search_bundle(tmp_path / "deep", "bbtv2")
    bundles = [*toy["bundles"], str(tmp_path / "half"), str(tmp_path / "deep")]
    assert sweep(tmp_path / "sweep", {**toy, "bundles": bundles}).cross_evaluation is None
    original = DummyBoundBatch._label_logits

    def inverted(self: DummyBoundBatch, population: Any) -> Any:
        return original(self, population) * (-1 if self.bundle.info.precision == "fp16" else 1)

    monkeypatch.setattr(DummyBoundBatch, "_label_logits", inverted)
    report = sweep(tmp_path / "sweep", {"cross_evaluate": True}, resume=True)
    found = report.cross_evaluation
    assert found is not None
    assert found.failures == {}
    own = {row.bundle: row.cells[0].scores for row in report.rows}
    crossed = {(s.tuned_in, s.scored_in): s.scores for s in found.scores}
    assert set(crossed) == {
        (a, b) for a in ("toy-bundle", "half") for b in ("toy-bundle", "half")
    } | {("deep", "deep")}
    for (tuned_in, scored_in), values in crossed.items():
        assert values == pytest.approx([1 - s if scored_in == "half" else s for s in own[tuned_in]])
    assert {(a.tuned_in, a.agreement) for a in found.agreements} == {
        ("toy-bundle", 0.0),
        ("half", 0.0),
    }
    mean = 100 * sum(crossed["half", "toy-bundle"]) / 2
    table = (tmp_path / "sweep" / "report.md").read_text()
    assert f"| toy | dummy | half | toy-bundle | 2 | {mean:.2f} (" in table
    assert (
        "prompts tuned in half: toy-bundle and half predict the same class for 0.00 % of the "
        "test rows" in table
    )
    assert sweep(tmp_path / "sweep", resume=True).cross_evaluation == found


@pytest.mark.usefixtures("in_process")
def test_a_failed_cross_evaluation_is_part_of_the_report(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_bundle(tmp_path / "half", precision="fp16")
    attempt = processes.attempt

    def failing(function: Any, arguments: dict[str, Any]) -> processes.Reply:
        if function is score_prompts and arguments["bundle"].endswith("half"):
            return {"error": "EngineError", "message": "out of memory"}
        return attempt(function, arguments)

    monkeypatch.setattr(processes, "attempt", failing)
    bundles = [*toy["bundles"], str(tmp_path / "half")]
    report = sweep(tmp_path / "sweep", {**toy, "bundles": bundles, "cross_evaluate": True})
    assert report.count("done") == 4
    found = report.cross_evaluation
    assert found is not None
    assert found.failures == {"toy-half-dummy": "out of memory"}
    assert [(s.tuned_in, s.scored_in) for s in found.scores] == [
        ("toy-bundle", "toy-bundle"),
        ("half", "toy-bundle"),
    ]
    assert "- **toy-half-dummy:** out of memory" in (tmp_path / "sweep" / "report.md").read_text()


@pytest.mark.usefixtures("in_process")
def test_without_a_finished_trial_there_is_nothing_to_cross_evaluate(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Run:
        raise EngineError("out of memory")

    monkeypatch.setattr(runner, "tune", failing)
    report = sweep(tmp_path / "sweep", {**toy, "cross_evaluate": True})
    assert (report.count("failed"), report.cross_evaluation) == (2, None)


def test_a_trial_on_tensorrt_requests_a_gpu_from_ray(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pool(ray: Any, jobs: Any, threads: Any, device: str, progress: bool) -> Any:
        asked.append(device)
        raise EngineError("no cluster")

    monkeypatch.setattr(runner, "open_pool", pool)
    for engine in ("trt", "dummy"):
        with pytest.raises(EngineError, match="no cluster"):
            sweep(tmp_path / "sweep", {**toy, "engines": [engine]}, ray="local")
    assert asked == ["cuda", "cpu"]
