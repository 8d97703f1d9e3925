"""What stands in front of every row of a decoder: the instruction and demonstrations of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundles import tiny_bundle

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import resolve
from bbt_accel.errors import DataError, TaskError, UsageError
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import choose_demonstrations, load_few_shot
from bbt_accel.tasks.task import Task, load_task

TASK = """
name = "mood"
text = ["text"]
n_classes = 2
[templates]
masked = "{text} {mask}"
causal = "{text} is"
[label_words]
masked = ["bad", "great"]
causal = ["bad", "great"]
[context]
instruction = "Say {mood}."
separator = " ; "
[presets.bbt]
intrinsic_dim = 6
popsize = 4
budget = 12
"""
ROWS = [Row({"text": f"t{i}"}, i % 2) for i in range(12)]


def task(**context: Any) -> Task:
    found = load_toml(TASK)
    return found.model_copy(update={"context": found.context.model_copy(update=context)})


def load_toml(text: str) -> Task:
    import tomllib

    return Task.model_validate(tomllib.loads(text))


def text_of(encoder: Encoder, ids: Any) -> str:
    return str(encoder._tokenizer.decode(list(ids), skip_special_tokens=False))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "llama", "llama", "cat", max_length=200)


# Encoding


def test_the_instruction_and_the_demonstrations_stand_in_front_of_the_row(bundle: Bundle) -> None:
    encoder = Encoder(bundle, task(), ROWS[:2])
    batch = encoder.encode([Row({"text": "new"})])
    assert batch.context_ids is not None
    assert text_of(encoder, batch.context_ids) == "Say {mood}. ; t0 is bad ; t1 is great ; "
    assert batch.input_ids[0, 0] == bundle.info.special.begin
    assert text_of(encoder, batch.input_ids[0, 1:]) == "new is"
    assert batch.readout.tolist() == [batch.input_ids.shape[1] - 1]


def test_a_template_for_demonstrations_has_the_label_where_it_says(bundle: Bundle) -> None:
    encoder = Encoder(
        bundle, task(template="{label}: {text}", instruction="", separator="\n"), ROWS[1:2]
    )
    assert encoder.context_ids is not None
    assert text_of(encoder, encoder.context_ids) == "great: t1\n"


def test_a_label_is_shown_with_the_space_with_which_it_is_read(bundle: Bundle) -> None:
    own = task(instruction="", separator="\n")
    for ending, shown in (
        ("", " great"),
        (" ", " great"),
        ("\n", "\ngreat"),
        ("</s>", "</s>great"),
    ):
        own = own.model_copy(
            update={"templates": own.templates | {"causal": f"{{text}} is{ending}"}}
        )
        encoder = Encoder(bundle, own, ROWS[1:2])
        assert encoder.context_ids is not None
        assert text_of(encoder, encoder.context_ids) == f"t1 is{shown}\n"


def test_escaped_braces_are_no_placeholder(bundle: Bundle, tmp_path: Path) -> None:
    odd = task(template="{{label}}: {text} {label}", instruction="{{prompt}}", separator=" ; ")
    odd = odd.model_copy(update={"templates": odd.templates | {"causal": "{{prompt}} {text} is"}})
    encoder = Encoder(bundle, odd, ROWS[1:2])
    assert encoder.context_ids is not None
    assert text_of(encoder, encoder.context_ids) == "{{prompt}} ; {label}: t1 great ; "
    assert (
        text_of(encoder, encoder.encode([Row({"text": "new"})]).input_ids[0, 1:])
        == "{prompt} new is"
    )
    added = Encoder(tiny_bundle(tmp_path / "add", "llama", "add", max_length=200), odd)
    n = added.bundle.info.n_prompt_tokens
    assert text_of(added, added.encode([Row({"text": "new"})]).input_ids[0, 1 + n :]).endswith(
        "{prompt} new is"
    )


def test_a_column_named_label_cannot_be_part_of_a_demonstration(bundle: Bundle) -> None:
    templates = {"masked": None, "span": None, "causal": "{label} is"}
    own = task().model_copy(update={"text": ["label"], "label": "y", "templates": templates})
    assert Encoder(bundle, own).context_ids is not None
    with pytest.raises(
        TaskError, match="a column of demonstrations cannot have the name 'label'; rename it"
    ):
        Encoder(bundle, own, [Row({"label": "a"}, 1)])


def test_no_context_is_none_and_an_encoder_has_none(bundle: Bundle, tmp_path: Path) -> None:
    assert Encoder(bundle, task(instruction="")).encode(ROWS).context_ids is None
    assert Encoder(tiny_bundle(tmp_path / "bert", "bert"), task()).encode(ROWS).context_ids is None


def test_chat_tokens_may_be_written_in_a_task_but_not_in_a_text(bundle: Bundle) -> None:
    chat = task(instruction="</s>a</s>", separator="</s>")
    chat = chat.model_copy(update={"templates": chat.templates | {"causal": "</s>{text}</s> is\n"}})
    encoder = Encoder(bundle, chat, [Row({"text": "</s>"}, 0)])
    end = encoder._tokenizer.token_to_id("</s>")
    assert encoder.context_ids is not None
    assert (
        encoder.context_ids.tolist().count(end) == 2 + 1 + 2 + 1
    )  # instruction, separator, template, separator
    (row,) = encoder.encode([Row({"text": "</s> <s>"})]).input_ids.tolist()
    assert row.count(end) == 2
    assert text_of(encoder, row[-3:]).endswith("is\n"), "a line break at the end stays"
    assert text_of(encoder, encoder.label_token_ids[:1]) == "b", (
        "and the label word behind it has no space"
    )


def test_a_row_is_truncated_to_what_the_context_leaves(bundle: Bundle) -> None:
    encoder = Encoder(bundle, task(), ROWS[:3])
    assert encoder.context_ids is not None
    batch = encoder.encode([Row({"text": "a" * 1000})])
    assert batch.input_ids.shape[1] + len(encoder.context_ids) == 200
    with pytest.raises(
        TaskError,
        match=r"template and context of task mood alone exceeds the 200 tokens .*; shorten",
    ):
        Encoder(bundle, task(), ROWS * 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text}", "needs {label} exactly once"),
        ("{label}", "has no text column"),
        ("{text} {x} {label}", "unknown"),
    ],
)
def test_a_wrong_demonstration_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_toml(TASK.replace("separator", f'template = "{template}"\nseparator'))


# Choice


@given(
    classes=st.integers(2, 4),
    k=st.integers(1, 5),
    count=st.integers(0, 19),
    seed=st.integers(0, 99),
)
def test_demonstrations_are_balanced_and_leave_the_other_rows(
    classes: int, k: int, count: int, seed: int
) -> None:
    train = [Row({"text": str(i)}, i % classes) for i in range(classes * k)]
    if count >= len(train):
        with pytest.raises(DataError, match=f"demonstrations={count} leaves none"):
            choose_demonstrations(train, classes, count, seed)
        return
    shown, rest = choose_demonstrations(train, classes, count, seed)
    assert (shown, rest) == choose_demonstrations(train, classes, count, seed)
    assert len(shown) == count
    assert [row for row in train if row not in shown] == rest
    per_class = np.bincount([row.label or 0 for row in shown], minlength=classes)
    assert per_class.max() - per_class.min() <= 1


def test_more_demonstrations_include_the_fewer() -> None:
    few, _ = choose_demonstrations(ROWS, 2, 3, seed=5)
    many, _ = choose_demonstrations(ROWS, 2, 6, seed=5)
    assert all(row in many for row in few)
    assert few != choose_demonstrations(ROWS, 2, 3, seed=6)[0]


# A search


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        lines = [
            json.dumps({"text": f"{'up' if i % 2 else 'down'} {i}", "label": i % 2})
            for i in range(40)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "mood.toml").write_text(TASK)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("bbt", "cat"), ("bbtv2", "add")])
def test_a_run_keeps_its_demonstrations(tiny: Any, folder: Path, method: str, mode: str) -> None:
    """So that `evaluate` and `predict` need neither the rows nor the settings of the search."""
    from bbt_accel import tune
    from bbt_accel.predict.inference import evaluate, predict_texts

    settings = {"k_shot": 4, "demonstrations": 2, "budget": 8, "popsize": 4, "intrinsic_dim": 6}
    options: dict[str, Any] = {
        "data": folder,
        "settings": settings,
        "progress": False,
        "output": folder / "run",
    }
    run = tune(tiny("llama", method, mode), str(folder / "mood.toml"), **options)
    train, _ = load_few_shot(run.task, folder, run.info.settings)
    assert run.info.demonstrations == choose_demonstrations(train, 2, 2, run.info.settings.seed)[0]
    again = Run.read(run.path)
    assert again.info.demonstrations == run.info.demonstrations
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").rename(folder / f"{split}.kept")
    found = predict_texts(run.path, [{"text": "up 7"}])[0]["probabilities"]
    (folder / "test.kept").rename(folder / "test.jsonl")
    assert evaluate(run.path)["rows"] == 40
    with_others = again.info.model_copy(update={"demonstrations": []})
    (run.path / "run.json").write_text(with_others.model_dump_json())
    assert predict_texts(run.path, [{"text": "up 7"}])[0]["probabilities"] != found


@pytest.mark.slow
@pytest.mark.parametrize("without", [(), ("context-cache",)])
def test_the_context_is_computed_once_for_all_calls(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    from test_exactness import batch_of, random_prompts

    from bbt_accel import load_engine

    bundle = tiny("llama", "bbt", "cat")
    shape = {
        "rows": 6,
        "text": 9,
        "labels": 3,
        "padding": "right",
        "decoder": None,
        "context": 5,
        "seed": 1,
    }
    rows, prompts = batch_of(bundle, shape), random_prompts(bundle, 3, 0)
    rows.input_ids[:, 0] = rows.input_ids[0, 0]  # one begin token
    with load_engine(bundle, "ort", threads=1, without=without) as engine:
        ran, run = [], engine.run  # type: ignore[attr-defined]
        monkeypatch.setattr(
            engine, "run", lambda stage, *given: ran.append(stage) or run(stage, *given)
        )
        for part in (slice(0, 3), slice(3, 6)):
            with engine.bind(rows.rows(part)) as bound:
                bound.label_logits(prompts)
                bound.label_logits(prompts)
    assert ran.count("context") == (ran.count("model") if without else 1)


def test_demonstrations_for_an_encoder_are_refused(folder: Path) -> None:
    from search_parts import search_bundle

    from bbt_accel import tune

    with pytest.raises(UsageError, match="demonstrations are for decoders"):
        tune(
            search_bundle(folder / "b"),
            str(folder / "mood.toml"),
            data=folder,
            settings={"demonstrations": 2},
        )


def test_the_task_sets_the_number_and_the_command_line_overrides_it() -> None:
    own = task(demonstrations=4)
    assert resolve(own.preset("bbt")).demonstrations == 4
    assert resolve(own.preset("bbt"), {"demonstrations": 0}).demonstrations == 0
    assert load_task("demo").context.demonstrations == 0
