"""Tasks: the built-in ones, files of one's own, and the errors in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbt_accel.errors import TaskError
from bbt_accel.tasks.task import GROUPS, Context, load_task, task_names, to_toml

GOOD = """
name = "mine"
text = ["review"]
n_classes = 2
[templates]
masked = "{review} . It was {mask} ."
[label_words]
masked = ["bad", "great"]
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_built_in_tasks_have_every_template_group() -> None:
    assert task_names() == ["agnews", "dbpedia", "demo", "mrpc", "rte", "snli", "sst2", "yelpp"]
    for name in task_names():
        task = load_task(name)
        assert task.name == name
        for group in GROUPS:
            assert len(task.words(group)) == task.n_classes
            assert all(f"{{{column}}}" in task.template(group) for column in task.text)
        assert "budget" in task.preset("bbt")
        assert task.preset("bbtv2")["sigma"] == 0.2
        assert task.template("span").endswith("{mask}"), "the label word follows"


@pytest.mark.parametrize(
    ("name", "template", "words"),
    [
        ("sst2", "{sentence} . It was {mask} .", ["bad", "great"]),
        ("agnews", "{mask} News: {text}", ["World", "Sports", "Business", "Tech"]),
        ("mrpc", "{sentence1} ? {mask} , {sentence2}", ["No", "Yes"]),
        ("rte", "{sentence1} ? {mask} , {sentence2}", ["Yes", "No"]),
        ("snli", "{premise} ? {mask} , {hypothesis}", ["Yes", "Maybe", "No"]),
    ],
)
def test_templates_and_words_of_the_paper(name: str, template: str, words: list[str]) -> None:
    task = load_task(name)
    assert (task.template("masked"), task.words("masked")) == (template, words)


def test_presets_of_the_paper() -> None:
    assert load_task("dbpedia").preset("bbt")["budget"] == 20000
    assert load_task("sst2").preset("bbt") == {
        "sigma": 1.0,
        "alpha": 1.0,
        "budget": 8000,
        "loss": "ce",
    }
    assert {n for n in task_names() if load_task(n).preset("bbt")["loss"] == "hinge"} == {
        "mrpc",
        "rte",
        "snli",
    }
    assert load_task("mrpc").metric == "f1"


def test_a_task_file_has_defaults_and_no_template_that_it_does_not_give(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert (task.separator, task.label, task.metric, task.preset("bbt")) == (
        " . ",
        "label",
        "accuracy",
        {},
    )
    with pytest.raises(TaskError, match=r"no templates\.span"):
        task.template("span")


@pytest.mark.parametrize("name", ["sst", "agnew", "dbpedia14", "SST2"])
def test_near_miss_is_named(name: str) -> None:
    with pytest.raises(TaskError, match="did you mean "):
        load_task(name)


def test_unknown_name_lists_the_tasks() -> None:
    with pytest.raises(TaskError, match="unknown task 'zzzzzz'; choose from agnews"):
        load_task("zzzzzz")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("name =", "name ="), None),
        (("n_classes = 2", "n_classes = 3"), r"label_words\.masked: 2 words for 3 classes"),
        (('name = "mine"', ""), "name: Field required"),
        (("n_classes", "klasses"), "n_classes: Field required|klasses: Extra"),
        (("name =", "colour = 1\nname ="), "colour: Extra inputs"),
        (
            ("{review}", "{text}"),
            r"templates\.masked: unknown placeholder {text}; known here: {review}",
        ),
        (("{review} .", ""), r"templates\.masked: has no text column"),
        (("{mask}", ""), r"templates\.masked: needs {mask} exactly once"),
        (("{mask}", "{mask} {mask}"), "exactly once"),
        (("{mask}", "{prompt} {prompt} {mask}"), "{prompt} may be used once"),
        (("{mask}", "{mask"), r"templates\.masked: .*brace"),
        (("{review}", "{review!r}"), r"templates\.masked: a placeholder is a name alone"),
        (('masked = "{', 'causal = "{'), r"templates\.masked: missing"),
        (
            ('masked = "{', 'gpt2 = "{'),
            "templates: unknown template group 'gpt2'; choose from masked, span, causal",
        ),
        (
            ('masked = ["', 't5 = ["'),
            "label_words: unknown template group 't5'; choose from masked, span, causal",
        ),
        (('["bad", "great"]', '["bad", "bad"]'), "a word of its own"),
        (('["bad", "great"]', '["bad", " "]'), "a word of its own"),
        (('["review"]', "[]"), "text: "),
        (('["review"]', '["review", "mask"]'), "text: 'mask'"),
        (("n_classes = 2", 'n_classes = 2\nmetric = "bleu"'), "metric: "),
        (("[templates]", "[presets.bbt]\nsigma = -1\n[templates]"), r"presets\.bbt: sigma: "),
        (
            ("[templates]", "[presets.bbtv2]\npopsize = 2\n[templates]"),
            r"presets\.bbtv2: popsize: .*equal to 4; got 2",
        ),
        (
            ("[templates]", "[presets.bbt]\nsteps = 1\n[templates]"),
            r"presets\.bbt: unknown setting 'steps'",
        ),
        (("[templates]", "[templates"), "not valid TOML"),
        (
            ("n_classes = 2", "n_classes = 2\nseparator = ' {mask} '"),
            "separator: takes no placeholder",
        ),
        (("n_classes = 2", "n_classes = 2\nseparator = ' { '"), "separator: .*for braces"),
        (("n_classes = 2", "n_classes = 2\nseparator = ' {{ '"), None),
        (("n_classes = 2", f"n_classes = {'1' * 5000}"), "not valid TOML"),
        (("n_classes = 2", "n_classes = 1000000000"), "n_classes: "),
        (("n_classes = 2", f"n_classes = {'[' * 5000}2{']' * 5000}"), "not valid TOML"),
    ],
)
def test_malformed_file_is_one_line_with_file_and_key(
    tmp_path: Path, change: tuple[str, str], complaint: str | None
) -> None:
    file = write(tmp_path, GOOD.replace(*change))
    if complaint is None:
        load_task(file)
        return
    with pytest.raises(TaskError, match=complaint) as caught:
        load_task(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_task_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot read the task file"):
        load_task(tmp_path / "none.toml")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not valid TOML"):
        load_task(tmp_path / "x.toml")


@pytest.mark.parametrize("name", task_names())
def test_a_written_task_file_is_the_same_task(name: str, tmp_path: Path) -> None:
    odd = '"quoted" \\ back\x7f\n{{ü}} '
    context = Context(instruction=odd, demonstrations=2)
    task = load_task(name).model_copy(update={"context": context, "separator": odd})
    (tmp_path / "written.toml").write_text(to_toml(task), encoding="utf-8")
    assert load_task(tmp_path / "written.toml") == task


def test_class_shares_are_a_number_for_each_class(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD.replace("[templates]", "class_shares = [95, 5]\n[templates]"))
    assert load_task(file).class_shares == [95, 5]
    for wrong, complaint in (
        ("[1, 2, 3]", "has 3 numbers for 2 classes"),
        ("[1, 0]", "greater than"),
        ("[1, 1e300]", "less than"),
    ):
        file.write_text(GOOD.replace("[templates]", f"class_shares = {wrong}\n[templates]"))
        with pytest.raises(TaskError, match=f"class_shares.*{complaint}"):
            load_task(file)


def test_classes_have_names_and_a_single_text_column_needs_no_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    words = '[templates]\nmasked = "{review} {mask}"\n[label_words]\nmasked = ["bad", "good"]'
    file.write_text(f'name = "mine"\ntext = "review"\nclasses = ["neg", "pos"]\n{words}')
    assert (load_task(file).n_classes, load_task(file).text) == (2, ["review"])
    for wrong, complaint in (
        ('["neg"]', "classes: 1 names|2 words for 1|n_classes"),
        ('["neg", "neg"]', "classes: each class needs a name of its own"),
        ('["neg", " pos"]', "classes: each class needs a name of its own"),
        ('["neg", "pos"]\nn_classes = 3', "classes: 2 names, n_classes is 3"),
    ):
        file.write_text(f'name = "mine"\ntext = "review"\nclasses = {wrong}\n{words}')
        with pytest.raises(TaskError, match=complaint):
            load_task(file)
