"""Tasks as data: one TOML file a task, and its loader."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bbt_accel.bundle import Method, first_problem
from bbt_accel.errors import TaskError

FOLDER = Path(__file__).parent
Group = Literal["masked", "t5", "gpt2"]
GROUPS: dict[str, Group] = {"roberta": "masked", "bert": "masked", "bart": "masked", "t5": "t5", "gpt2": "gpt2"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HubData(Strict):
    """A data set of the Hugging Face hub."""

    path: str
    config: str | None = None
    test: str = "test"
    """The split that has labels to test on: `validation` where those of `test` are withheld."""


class Preset(Strict):
    """Settings that suit the task; an option given on the command line wins over them."""

    sigma: float | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    budget: int | None = Field(default=None, ge=1)
    loss: Literal["ce", "hinge", "perf"] | None = None
    popsize: int | None = Field(default=None, ge=2)
    intrinsic_dim: int | None = Field(default=None, ge=1)

    def given(self) -> dict[str, float | int | str]:
        """The settings that the task names."""
        return self.model_dump(exclude_none=True)


class Presets(Strict):
    bbt: Preset = Preset()
    bbtv2: Preset = Preset()


class Templates(Strict):
    """How a row is written, by family group: masked (RoBERTa, BERT, BART), t5, gpt2."""

    masked: str | None = None
    t5: str | None = None
    gpt2: str | None = None


class LabelWords(Strict):
    """The word of each class, in class order, by family group."""

    masked: list[str] | None = None
    t5: list[str] | None = None
    gpt2: list[str] | None = None


class Task(Strict):
    """A classification task, as its TOML file describes it."""

    name: str = Field(pattern=r"^[\w.-]+$")
    metric: Literal["accuracy", "f1"] = "accuracy"
    text: list[str] = Field(min_length=1)
    """Columns that hold text, in the order in which a row without column names lists them."""
    label: str = "label"
    n_classes: int = Field(ge=2)
    clean: Literal["newlines"] | None = None
    """`newlines`: a backslash followed by n, which some data sets write for a line break, becomes a space."""
    separator: str = " . "
    """What stands between the initial prompt tokens and the template, where the template has no {prompt}."""
    hub: HubData | None = None
    templates: Templates
    label_words: LabelWords
    presets: Presets = Presets()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric == "f1" and self.n_classes != 2:
            raise ValueError(f"metric: f1 is for 2 classes, n_classes is {self.n_classes}")
        for column in self.text:
            if column in ("mask", "prompt") or self.text.count(column) > 1 or column == self.label:
                raise ValueError(f"text: {column!r} cannot name a text column here")
        if not self.templates.model_dump(exclude_none=True):
            raise ValueError("templates: give one at least, of masked, t5 and gpt2")
        for group in ("masked", "t5", "gpt2"):
            self._check_template(group)
            self._check_words(group)
        return self

    def _check_template(self, group: str) -> None:
        template, words = getattr(self.templates, group), getattr(self.label_words, group)
        if (template is None) != (words is None):
            lacking = "templates" if template is None else "label_words"
            raise ValueError(f"{lacking}.{group}: missing")
        if template is None:
            return
        key = f"templates.{group}"
        try:
            parts = parse_template(template)
        except ValueError as error:
            raise ValueError(f"{key}: {error}; write {{{{ and }}}} for braces") from None
        used = [name for _, name in parts if name is not None]
        known = [*self.text, "prompt"] + ([] if group == "gpt2" else ["mask"])
        for name in used:
            if name not in known:
                names = ", ".join(f"{{{k}}}" for k in known)
                raise ValueError(f"{key}: unknown placeholder {{{name}}}; known here: {names}")
        if group != "gpt2" and used.count("mask") != 1:
            raise ValueError(f"{key}: needs {{mask}} exactly once")
        if used.count("prompt") > 1:
            raise ValueError(f"{key}: {{prompt}} may stand once")
        if not any(column in used for column in self.text):
            raise ValueError(f"{key}: has no text column; write {{{self.text[0]}}}")

    def _check_words(self, group: str) -> None:
        words = getattr(self.label_words, group)
        if words is None:
            return
        if len(words) != self.n_classes:
            raise ValueError(f"label_words.{group}: {len(words)} words for {self.n_classes} classes")
        if len(set(words)) != len(words) or not all(word.strip() for word in words):
            raise ValueError(f"label_words.{group}: each class needs a word of its own")

    def template(self, family: str) -> str:
        """The template for a backbone family. Raises TaskError when the task has none."""
        template: str | None = getattr(self.templates, GROUPS[family])
        if template is None:
            raise self._lacks("templates", family)
        return template

    def words(self, family: str) -> list[str]:
        """The label words for a backbone family, in class order. Raises TaskError when the task has none."""
        words: list[str] | None = getattr(self.label_words, GROUPS[family])
        if words is None:
            raise self._lacks("label_words", family)
        return list(words)

    def preset(self, method: Method) -> dict[str, float | int | str]:
        """The settings that the task names for a method; empty when it names none."""
        preset: Preset = getattr(self.presets, method)
        return preset.given()

    def _lacks(self, key: str, family: str) -> TaskError:
        return TaskError(f"task {self.name} has no {key}.{GROUPS[family]}, which a {family} backbone needs; add it")


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the placeholder that follows it (None at the end). ValueError when malformed."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in Formatter().parse(template):
        if name is not None and (name == "" or spec or conversion):
            raise ValueError(f"a placeholder is a name alone, not {{{name}{spec or ''}...}}")
        parts.append((literal, name))
    return parts


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or a user's own by the path of a .toml file.

    Raises TaskError, in one line, for an unknown name and for a file that is missing or malformed.
    """
    name = str(name_or_path)
    if name.endswith(".toml"):
        return _read(Path(name))
    if name in task_names():
        return _read(FOLDER / f"{name}.toml")
    close = get_close_matches(name.lower(), task_names(), n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise TaskError(
        f"unknown task {name!r}. {hint}Built-in tasks: {', '.join(task_names())}; or give the path of a .toml file"
    )


def _read(file: Path) -> Task:
    try:
        return Task.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise TaskError(f"cannot read the task file {file} ({error.strerror})") from None
    except ValidationError as error:
        raise TaskError(f"{file}: {first_problem(error).removeprefix('Value error, ')}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: not valid TOML ({first_problem(error)})") from None
