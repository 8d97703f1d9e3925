"""bbt-accel fit: one file in, a run and its test score out, and the commands that give the same run
in steps.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from tiny_backbones import N_PROMPT

from bbt_accel.cli.commands import main
from bbt_accel.errors import BbtError, DataError, RunError, UsageError
from bbt_accel.io.tables import Table
from bbt_accel.predict.fit import FitPlan, Fitted, check_table, fit_file, task_name
from bbt_accel.predict.inference import evaluate, predict_texts
from bbt_accel.search.methods import Bbt
from bbt_accel.search.run import Run
from bbt_accel.search.workspace import Workspace
from bbt_accel.tasks.splits import examples
from bbt_accel.tasks.task import load_task

Fit = Callable[..., Fitted]
OPTIONS: dict[str, Any] = {
    "text": "review",
    "label": "mood",
    "engine": "ort",
    "precision": "fp32",
    "threads": 1,
}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """40 rows, separated by semicolons: 24 of one class, 16 of the other."""
    file = tmp_path / "my reviews.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["review", "mood"])
        for i in range(40):
            writer.writerow([f"text {i}; number {i * 7}", ["up", "down"][i % 5 in (1, 3)]])
    return file


@pytest.fixture
def fit(
    reviews: Path, bundle_cache: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Fit:
    """`fit_file` of the reviews with a tiny backbone, in tmp_path; bundles are kept for all
    tests.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BBT_ACCEL_CACHE", str(bundle_cache))

    def call(output: str = "run", **options: Any) -> Fitted:
        given = {
            **OPTIONS,
            "backbone": str(shared / "roberta"),
            "budget": 41,
            "n_prompt_tokens": N_PROMPT,
            **options,
        }
        return fit_file(reviews.name, output, progress=False, **given)

    return call


def test_a_fit_that_was_killed_is_continued(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = fit("whole").run

    def killed(*_: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish", killed)
        with pytest.raises(RuntimeError):
            fit()
    begun = (tmp_path / ".run.partial" / "history.jsonl").read_text()
    with pytest.raises(
        RunError, match=r"\.run\.partial is another search, which is unfinished; remove it, use"
    ):
        fit(seed=1)
    found = fit().run
    assert (found.path / "history.jsonl").read_text() == begun
    assert found.prompt.tobytes() == whole.prompt.tobytes()


def test_a_file_becomes_a_run_that_is_scored_on_the_rows_left_over(fit: Fit) -> None:
    found = fit()
    assert found.plan.counts == {"down": 16, "up": 24}
    assert (found.run.task.classes, found.run.task.text, found.run.task.label) == (
        ["down", "up"],
        ["review"],
        "mood",
    )
    assert (found.run.info.data.train_rows, found.run.info.data.dev_rows) == (
        13,
        13,
    )  # a third of 16 and of 24
    assert found.run.task.class_shares == [16, 24]
    assert found.score is not None
    assert (found.score["rows"], found.score["chance"], found.score["majority"]) == (
        14,
        0.5,
        8 / 14,
    )
    assert evaluate(found.run.path)["score"] == found.score["score"]
    assert load_task(found.run.path / "task.toml") == found.run.task
    prediction = predict_texts(found.run.path, [{"review": "text"}])[0]
    assert prediction["class"] in prediction["probabilities"].keys() == {"down", "up"}


@pytest.mark.parametrize(("count", "k"), [(2, 1), (3, 1), (16, 5), (48, 16), (25_000, 16)])
def test_a_class_gives_a_third_of_its_rows_but_at_most_16(count: int, k: int) -> None:
    assert examples(count, 16, parts=3) == k


def test_the_commands_that_it_prints_give_the_same_run(fit: Fit) -> None:
    plans: list[FitPlan] = []
    run = fit(announce=plans.append, seed=7, k_shot=4).run
    for line in plans[0].script():
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line)[1:])
        assert caught.value.code == 0, line
    again = Run.read("run-again")
    for name in ("prompt.safetensors", "readout.safetensors", "task.toml"):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    assert (again.info.settings, again.info.data) == (run.info.settings, run.info.data)
    assert again.info.bundle.digest == run.info.bundle.digest


def test_what_is_given_is_taken(fit: Fit) -> None:
    given = {
        "template": "{review} mood: {mask}",
        "label_words": ["x", "y"],
        "k_shot": 8,
        "readout": "verbalizer",
    }
    found = fit(**given)
    assert found.run.task.template("masked") == given["template"]
    assert found.run.info.label_words == ["x", "y"]
    assert (found.run.info.settings.k_shot, found.run.info.readout.name) == (8, "verbalizer")
    assert "8 examples per class to search with, as many to choose by, 8 to test on" in str(
        found.plan.facts()["split"]
    )


def test_an_existing_run_is_kept_unless_told_otherwise(fit: Fit, tmp_path: Path) -> None:
    first = fit(budget=1)
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match="other exists already and is no run"):
        fit("other")
    for other in (
        {"budget": 1, "seed": 1},
        {"budget": 1, "backbone": "/no/such", "readout": "words"},
    ):
        with pytest.raises(RunError, match="run is the run of another search; use --overwrite"):
            fit(**other)
    again = fit(budget=1)  # as after a kill while the test rows were scored
    assert (again.run.prompt.tobytes(), again.score) == (first.run.prompt.tobytes(), first.score)
    assert fit(budget=1, seed=1, overwrite=True).run.info.settings.seed == 1


def test_a_file_that_was_moved_is_scored_as_it_is_now(
    fit: Fit, reviews: Path, tmp_path: Path
) -> None:
    first = fit(budget=1)
    (tmp_path / "moved").mkdir()
    moved = reviews.rename(tmp_path / "moved" / reviews.name)
    given = {
        **OPTIONS,
        "backbone": first.run.info.bundle.backbone,
        "n_prompt_tokens": N_PROMPT,
        "budget": 1,
    }
    assert fit_file(moved, "run", progress=False, **given).score == first.score
    with pytest.raises(
        DataError,
        match=r"my reviews.csv, which holds the rows of .*, does not exist; .* with --data",
    ):
        evaluate("run")


def test_a_larger_budget_continues_a_complete_fit(fit: Fit) -> None:
    whole = fit("whole", budget=61, readout="verbalizer")
    assert whole.run.info.best.calls > 20
    assert len(fit(budget=20, readout="verbalizer").run.history) < len(whole.run.history)
    continued = fit(budget=61, readout="verbalizer")
    assert continued.run.prompt.tobytes() == whole.run.prompt.tobytes()
    assert (continued.run.info.calls, continued.score) == (whole.run.info.calls, whole.score)
    with pytest.raises(RunError, match="run is the run of another search"):
        fit(budget=21)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Ctrl-C in the second generation of the searches in the block."""

    @contextmanager
    def block() -> Iterator[None]:
        ask, asked = Bbt.ask, list[int]()

        def interrupted(self: Bbt) -> Any:
            asked.append(1)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return ask(self)

        with monkeypatch.context() as patched:
            patched.setattr(Bbt, "ask", interrupted)
            yield

    return block


def test_an_interrupted_fit_is_continued_by_the_same_call(
    fit: Fit, interrupt: Callable[[], Any]
) -> None:
    whole = fit("whole").run
    with interrupt():
        assert fit().run.info.status == "interrupted"
    found = fit().run
    assert (found.info.status, found.prompt.tobytes()) == ("done", whole.prompt.tobytes())


def test_an_interrupted_fit_leaves_the_run_that_it_is_to_replace(
    fit: Fit, interrupt: Callable[[], Any]
) -> None:
    first, whole = fit().run, fit("whole", seed=1).run
    with interrupt(), pytest.raises(KeyboardInterrupt):
        fit(seed=1, overwrite=True)
    assert Run.read(first.path).info == first.info
    with pytest.raises(
        RunError, match=r"\.run\.partial is another search, which is unfinished; remove it"
    ):
        fit()
    assert fit(seed=1).run.prompt.tobytes() == whole.prompt.tobytes()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"text": "reviews"},
            "has no column 'reviews'; it has 'review', 'mood'; did you mean review",
        ),
        ({"label": "stars"}, "has no column 'stars'"),
        ({"text": "mood"}, "must name different columns"),
        ({"k_shot": 9}, "'down' has 16 rows, --k-shot 9 needs 18.*lower it or leave it out"),
        ({"label_words": ["x"]}, "1 words for 2 classes"),
        ({"template": "{text} {mask}"}, "unknown placeholder {text}"),
        ({"engine": "tf"}, "unknown engine 'tf'"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(
    fit: Fit, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BbtError, match=complaint) as caught:
        fit(**options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["my reviews.csv"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"readout": "verbalizer", "budget": 5}, "budget 5 is too small"),
        ({"readout": "verbalise"}, "readout: Input should be"),
        ({"seed": -1}, "seed: Input should be"),
        (
            {"engine": "openvino", "precision": "fp16"},
            "engine openvino runs in fp32, bf16, int8, int4, not in fp16",
        ),
        ({"engine": "remote"}, "fit has no --url for the engine remote"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_backbone_is_exported(
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    complaint: str,
) -> None:
    monkeypatch.setenv("BBT_ACCEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=complaint):
        fit(**options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("without_graphs")
def test_a_backbone_that_the_cache_lacks_is_exported_into_it_once(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBT_ACCEL_CACHE", str(tmp_path / "cache"))
    first, second = (fit(name, engine="eager", budget=1).plan.bundle for name in ("run", "other"))
    assert (first.info.target, first.info.n_prompt_tokens) == ("onnx", N_PROMPT)
    assert (
        [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        == [first.path]
        == [second.path]
    )


def test_an_engine_may_take_the_bundle_of_another(fit: Fit) -> None:
    found = fit(engine="eager", precision="bf16", budget=1)
    assert (found.plan.bundle.info.target, found.plan.bundle.info.precision) == ("torch", "bf16")
    assert "--target torch --bf16" in found.plan.script()[1]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "has no rows"),
        ([("a", "x"), ("b", "x")], "label is 'x' in every row; at least two classes"),
        (
            [("a", "x"), ("b", "x"), ("c", "y")],
            "label has 2 classes, and 'y' has 1 text of its own; each needs two",
        ),
        ([("a", "x"), ("a ", "x"), ("c", "y"), ("d", "y")], "'x' has 1 text of its own"),
        (
            [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y"), ("a", "z")],
            "3 classes, and 'z' has no text of its own",
        ),
        ([("a", "x"), ("", "y")], "text is empty in 1 row, first in row 2"),
        ([("a", "x"), (" ", "y"), (None, "y")], "text is empty in 2 rows, first in row 2"),
        ([("a", "x"), ("b", float("nan"))], "label is empty in 1 row, first in row 2"),
        ([("a", "x"), ("b", None)], "label is empty in 1 row"),
        ([("a", "x"), (5, "y"), ("b", "x"), ("c", "y")], "f.csv row 2: text is 5, not text"),
        (
            [("a", "x"), ("b", "x"), ("c", "\ud800"), ("d", "\ud800")],
            "in a row, which is no text; correct the row",
        ),
    ],
)
def test_rows_that_cannot_be_fitted_are_one_line(
    rows: list[tuple[object, object]], complaint: str
) -> None:
    table = Table([dict(zip(("text", "label"), row, strict=True)) for row in rows])
    with pytest.raises(BbtError, match=complaint) as caught:
        check_table(table, Path("f.csv"), ["text"], "label")
    assert "\n" not in str(caught.value)


def test_a_column_that_a_template_cannot_name_is_one_line() -> None:
    table = Table(
        [{"a:b": text, "label": label} for text, label in zip("abcd", "xyxy", strict=True)]
    )
    with pytest.raises(UsageError, match="--text a:b: a template cannot name a column"):
        check_table(table, Path("f.csv"), ["a:b"], "label")


def test_a_task_is_named_after_its_file() -> None:
    names = {
        "my reviews.csv": "my-reviews",
        "m².csv": "m",
        "..csv": "task",
        "東京.csv": "task",
        "a.b.csv": "a.b",
    }
    assert {name: task_name(Path(name)) for name in names} == names


def test_classes_are_sorted_and_numbers_by_value() -> None:
    for order in (("nan", "b", "a"), ("b", "a", "nan"), ("inf", "nan", "b", "a")):
        found = check_table(
            Table([{"t": f"{i}", "y": y} for i, y in enumerate(order * 2)]), Path("f"), ["t"], "y"
        )
        assert list(found) == sorted(order)
    rows: list[dict[str, object]] = [
        {"t": f"{i}", "y": y} for i, y in enumerate((10, 2, 2.0, "10", "x", "x"))
    ]
    assert check_table(Table([*rows, *rows]), Path("f"), ["t"], "y") == {"2": 2, "10": 2, "x": 2}


def test_the_command_prints_what_was_chosen_and_the_score(
    fit: Fit, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "fit",
        "my reviews.csv",
        "--text",
        "review",
        "--label",
        "mood",
        "--backbone",
        str(shared / "roberta"),
    ]
    words += ["--engine", "ort", "--precision", "fp32", "--budget", "1"]
    words += ["--set", "threads=1", "--set", f"n_prompt_tokens={N_PROMPT}"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "-o", "run"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "separated by ';'" in out
    assert "--set hold_out=true --set threads=1" in out
    assert out.index("The same in steps") < out.index("Score")
    with pytest.raises(SystemExit):
        main([*words, "-o", "other", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["score"]["rows"] == 14
    assert report["classes"] == {"down": 16, "up": 24}
