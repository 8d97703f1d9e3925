"""Scores and predictions of a run: which rows and which bundle it takes, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dummy_engine import DummyEngine
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.core.bundle import write_info as write_bundle_info
from bbt_accel.core.logits import log_softmax
from bbt_accel.core.objective import Objective
from bbt_accel.errors import BundleError, DataError, RunError, UsageError
from bbt_accel.predict.inference import evaluate, predict_texts, scored_rows
from bbt_accel.search.run import Run, write_info
from bbt_accel.tasks.data import Row, load_rows
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import split_rows
from bbt_accel.tasks.task import load_task

TEXTS = [{"text": f"w{i} w{i + 1}"} for i in range(80)]


@pytest.fixture(params=["bbt", "bbtv2"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    bundle = search_bundle(tmp_path / "bundle", request.param)
    task = task_file(tmp_path / "data")
    return tune(
        bundle,
        task,
        data=tmp_path / "data",
        engine="dummy",
        output=tmp_path / "run",
        settings=SETTINGS,
        progress=False,
    )


def test_evaluate_scores_every_test_row_with_and_without_the_prompt(
    run: Run, tmp_path: Path
) -> None:
    report = evaluate(run.path)
    rows = load_rows(run.task, "test", tmp_path / "data")
    engine = DummyEngine(run.open_bundle())
    batch = Encoder(engine.bundle, run.task).encode(
        rows
    )  # 70 rows at once, which evaluate splits in two
    logits = engine.bind(batch).label_logits(np.stack([run.prompt, np.zeros_like(run.prompt)]))
    plain = log_softmax(logits[1])
    _, (score, without, calibrated) = Objective().score(
        np.stack([*logits, plain - plain.mean(0)]), batch.targets
    )
    assert (report["score"], report["without_prompt"], report["batch_calibrated"]) == (
        score,
        without,
        calibrated,
    )
    assert (report["split"], report["metric"], report["rows"], report["engine"]) == (
        "test",
        "accuracy",
        70,
        "dummy",
    )
    dev = evaluate(run.path, split="dev")
    assert run.info.best is not None
    assert (dev["rows"], dev["score"]) == (6, run.info.best.dev_score)


def test_what_predict_does_not_take_is_named(run: Run) -> None:
    assert predict_texts(run.path, iter(TEXTS[:2])) == predict_texts(run.path, TEXTS[:2])
    assert predict_texts(run.path, TEXTS[0]) == predict_texts(run.path, TEXTS[:1])
    for wrong in ("a text", ["a text"]):
        with pytest.raises(DataError, match="row 1 is 'a text'; give a mapping from text to texts"):
            predict_texts(run.path, wrong)  # type: ignore[arg-type]
    for call in (predict_texts, evaluate):
        with pytest.raises(TypeError, match="unexpected keyword argument 'enginee'"):
            call(run.path, **({"texts": TEXTS[:1]} if call is predict_texts else {}), enginee="ort")  # type: ignore[operator]


def test_an_unknown_split_or_preset_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown split 'validation'; choose from dev, test"):
        evaluate(run.path, split="validation")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown preset 'papers'; did you mean paper"):
        tune(run.open_bundle(), run.task, output=tmp_path / "new", preset="papers")  # type: ignore[arg-type]


def test_another_engine_runs_on_the_runs_device_only_if_it_can(run: Run) -> None:
    on_gpu = run.info.engine.model_copy(update={"name": "trt", "device": "cuda:1"})
    names = ("trt", "ort", "torch", "openvino", "remote")
    assert [on_gpu.used_with(name, None)[1] for name in names] == [
        "cuda:1",
        "cuda:1",
        "cuda:1",
        "cpu",
        "cpu",
    ]
    on_cpu = run.info.engine.model_copy(update={"name": "ort", "without": ["buckets"]})
    assert on_cpu.used_with(None, None) == ("ort", "cpu", ["buckets"])
    assert on_cpu.used_with("trt", None) == ("trt", "cuda", [])  # which runs nowhere else
    assert on_cpu.used_with(None, "cuda:1") == ("ort", "cuda:1", ["buckets"])
    served = run.info.engine.model_copy(update={"name": "remote"})
    assert served.used_with(None, None) == ("ort", "cpu", [])
    write_info(run.path, run.info.model_copy(update={"engine": on_gpu}))
    assert evaluate(run.path, engine="dummy")["device"] == "cpu"


def damaged(info: dict[str, Any], name: str) -> dict[str, Any]:
    changes = {
        "label_words": {"label_words": ["bad"]},
        "demonstrations": {"demonstrations": [{"fields": {"text": "a"}, "label": 2}]},
        "readout": {"readout": info["readout"] | {"name": "calibrated"}},
    }
    return info | changes[name]


@pytest.mark.parametrize("name", ["label_words", "demonstrations", "readout"])
def test_a_run_whose_parts_do_not_fit_each_other_is_refused(run: Run, name: str) -> None:
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(damaged(info, name)))
    with pytest.raises(RunError, match=f"{name}: |does not fit run.json"):
        Run.read(run.path)


def test_a_readout_with_other_classes_than_the_tasks_is_refused(run: Run) -> None:
    readout = replace(run.readout, classes=np.array([0, 10**10]))
    record = run.info.readout.model_copy(
        update={"sha256": readout.save(run.path / "readout.safetensors")}
    )
    write_info(run.path, run.info.model_copy(update={"readout": record}))
    with pytest.raises(RunError, match=r"does not fit run\.json; tune again"):
        Run.read(run.path)


def test_predict_returns_labels_and_probabilities_in_order(run: Run) -> None:
    answers = predict_texts(run.path, TEXTS)
    assert len(answers) == 80
    for answer in answers:
        assert answer["probabilities"].keys() == {"bad", "great"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["word"] == ["bad", "great"][answer["label"]]
        assert answer["probabilities"][answer["word"]] == max(answer["probabilities"].values())
    assert predict_texts(run.path, TEXTS[70:]) == answers[70:]
    assert predict_texts(run.path, []) == []


def test_predict_names_a_missing_column(run: Run) -> None:
    with pytest.raises(DataError, match="row 2 has no text 'text'"):
        predict_texts(run.path, [{"text": "w1"}, {"sentence": "w2"}])


def test_run_and_bundle_may_move_together(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("run", "bundle"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert predict_texts(tmp_path / "elsewhere" / "run", TEXTS[:1])


def test_a_run_alone_may_move(run: Run, tmp_path: Path) -> None:
    shutil.move(run.path, tmp_path / "data" / "moved")
    assert predict_texts(tmp_path / "data" / "moved", TEXTS[:1])


def test_a_bundle_that_changed_is_refused_unless_it_is_named(run: Run, tmp_path: Path) -> None:
    method = run.info.bundle.method
    search_bundle(tmp_path / "bundle", method, precision="fp16")
    with pytest.raises(BundleError, match="not the bundle"):
        evaluate(run.path)
    assert evaluate(run.path, bundle=tmp_path / "bundle")["bundle"] == str(tmp_path / "bundle")


def test_a_bundle_of_the_other_method_is_refused(run: Run, tmp_path: Path) -> None:
    other = search_bundle(tmp_path / "other", "bbtv2" if run.info.bundle.method == "bbt" else "bbt")
    with pytest.raises(BundleError, match="method"):
        predict_texts(run.path, TEXTS[:1], bundle=other.path)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("backbone", "another"),
        ("revision", "abc"),
        ("prompt_mode", "cat"),
        ("prompt_init", "Classify"),
        ("n_prompt_tokens", 5),
    ],
)
def test_a_bundle_that_takes_other_prompts_is_refused(
    run: Run, tmp_path: Path, fact: str, value: Any
) -> None:
    other = search_bundle(tmp_path / "other", run.info.bundle.method)
    write_bundle_info(other.path, other.info.model_copy(update={fact: value}))
    with pytest.raises(
        BundleError,
        match="takes prompts" if fact == "n_prompt_tokens" else f"has the {fact} {value}",
    ):
        predict_texts(run.path, TEXTS[:1], bundle=other.path)


def test_a_run_with_held_out_rows_is_scored_on_them(tmp_path: Path) -> None:
    task, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    (tmp_path / "data" / "test.jsonl").unlink()
    rows = load_rows(load_task(task), "train", tmp_path / "data")
    for number, data in enumerate((tmp_path / "data", tmp_path / "data" / "train.jsonl")):
        settings = {**SETTINGS, "hold_out": True}
        place = {"engine": "dummy", "output": tmp_path / f"run{number}", "progress": False}
        run = tune(bundle, task, data=data, settings=settings, **place)  # type: ignore[arg-type]
        train, dev, rest, _ = split_rows(rows, 2, 3, 7)
        assert sorted(map(id, (*train, *dev, *rest))) == sorted(map(id, rows))
        assert scored_rows(run, None, "test") == rest
        assert scored_rows(run, data, "test") == rest
        assert scored_rows(run, None, "dev") == dev
        assert evaluate(run.path)["rows"] == 30 - 12
        assert evaluate(run.path, data=task_file(tmp_path / "other").parent)["rows"] == 70
        assert evaluate(run.path, data=tmp_path / "other" / "test.jsonl")["rows"] == 70
        copy = shutil.copy(tmp_path / "data" / "train.jsonl", tmp_path / f"copy{number}.jsonl")
        assert scored_rows(run, copy, "test") == rest  # and not the rows of the search


def test_a_text_that_comes_again_is_held_out_from_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    data = tmp_path / "data" / "train.jsonl"
    text = data.read_text()
    data.write_text(
        text + text.replace('"text": "', '"text": "  ') + text
    )  # white space in front does not count
    settings = {**SETTINGS, "hold_out": True}
    run = tune(bundle, task, data=data, engine="dummy", output=tmp_path / "run", settings=settings)
    assert "60 of 90 rows repeat the text of another and are left out" in capsys.readouterr().err
    texts = [
        row.fields["text"] for split in ("dev", "test") for row in scored_rows(run, None, split)
    ]  # type: ignore[arg-type]
    assert len(texts) == len(set(texts)) == 30 - 6


def test_a_run_without_test_rows_says_so_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    for data in (tmp_path / "data", tmp_path / "data" / "train.jsonl"):
        (tmp_path / "data" / "test.jsonl").unlink(missing_ok=True)
        run = tune(
            bundle,
            task,
            data=data,
            engine="dummy",
            output=tmp_path / data.name / "run",
            settings=SETTINGS,
        )
        assert (
            "no test rows, so there will be no test score; --set hold_out=true"
            in capsys.readouterr().err
        )
        with pytest.raises(
            DataError,
            match="has no test rows; give some with --data, or tune with --set hold_out=true",
        ):
            evaluate(run.path)
        assert evaluate(run.path, split="dev")["rows"] == 6
        with pytest.raises(DataError, match="has no test rows"):  # the same rows under another name
            evaluate(
                run.path,
                data=shutil.copytree(data, tmp_path / "copy") if data.is_dir() else linked(data),
            )
    few = {**SETTINGS, "k_shot": 5, "hold_out": True}
    rows = few_rows(tmp_path / "few.jsonl", 20)
    run = tune(
        bundle,
        task,
        data=rows,
        engine="dummy",
        output=tmp_path / "few",
        settings=few,
        progress=False,
    )
    with pytest.raises(DataError, match=r"class '1' has 1 rows, --k-shot 5 needs 10.*; add rows$"):
        split_rows([Row({"text": "a"}, 0)] * 20 + [Row({"text": "b"}, 1)], 2, 5, 1)
    with pytest.raises(DataError, match="leaves no row to hold out; lower --k-shot 5"):
        evaluate(run.path)


def linked(file: Path) -> Path:
    link = file.with_name("link.jsonl")
    link.symlink_to(file)
    return link


def test_rows_that_have_changed_since_the_search_are_not_taken_for_test_rows(
    tmp_path: Path,
) -> None:
    task, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    data = tmp_path / "data" / "train.jsonl"
    settings = {**SETTINGS, "hold_out": True}
    run = tune(
        bundle,
        task,
        data=data,
        engine="dummy",
        output=tmp_path / "run",
        settings=settings,
        progress=False,
    )
    with data.open(
        "a"
    ) as file:  # the seed draws other rows now, so that those of the search would be test rows
        file.write('{"text": "w1", "label": 1}\n')
    for split in ("test", "dev"):
        with pytest.raises(DataError, match="has other rows than when the prompt was searched for"):
            evaluate(run.path, split=split)  # type: ignore[arg-type]


def few_rows(file: Path, count: int) -> Path:
    file.write_text("".join(f'{{"text": "w{i}", "label": {i % 2}}}\n' for i in range(count)))
    return file


def test_a_label_word_of_which_only_a_token_is_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    task.write_text(task.read_text().replace('["bad", "great"]', '["bad it", "great"]'))
    tune(
        bundle,
        task,
        data=tmp_path / "data",
        engine="dummy",
        output=tmp_path / "run",
        settings=SETTINGS,
    )
    assert (
        "label word 'bad it' has several tokens, of which the first, 'bad', is read"
        in capsys.readouterr().err
    )


def test_classes_are_predicted_by_name(tmp_path: Path) -> None:
    file, bundle = task_file(tmp_path / "data"), search_bundle(tmp_path / "bundle")
    file.write_text(file.read_text().replace("n_classes = 2", 'classes = ["neg", "pos"]'))
    for split in ("train", "test"):
        data = tmp_path / "data" / f"{split}.jsonl"
        data.write_text(data.read_text().replace(": 0}", ': "neg"}').replace(": 1}", ': "pos"}'))
    run = tune(
        bundle,
        file,
        data=tmp_path / "data",
        engine="dummy",
        output=tmp_path / "run",
        settings=SETTINGS,
        progress=False,
    )
    assert evaluate(run.path)["rows"] == 70
    for answer in predict_texts(run.path, TEXTS[:5]):
        assert answer["probabilities"].keys() == {"neg", "pos"}
        assert (answer["class"], answer["word"]) in (("neg", "bad"), ("pos", "great"))
    data.write_text('{"text": "w1", "label": "poss"}\n')
    with pytest.raises(
        DataError, match="row 1: label is 'poss', no class of task toy; did you mean pos"
    ):
        evaluate(run.path)
    data.write_text('{"text": "w1", "label": 1}\n{"text": "w1", "label": "0"}\n')
    assert [row.label for row in scored_rows(run, None, "test")] == [
        1,
        0,
    ]  # integers still name classes
