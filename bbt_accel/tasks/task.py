"""Tasks as data: one TOML file per task, and its loader."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from bbt_accel.core.bundle import Method, TemplateGroup
from bbt_accel.core.option_types import Demonstrations
from bbt_accel.core.settings import Metric, resolve
from bbt_accel.errors import TaskError, UsageError, check_known, did_you_mean, first_problem

FOLDER = Path(__file__).parent
GROUPS: tuple[TemplateGroup, ...] = get_args(TemplateGroup)


class HubData(BaseModel, extra="forbid", frozen=True):
    """A dataset of the Hugging Face hub."""

    path: str = Field(description="Its id on the hub.")
    config: str | None = Field(default=None, description="Its configuration, where it has several.")
    test: str = Field(
        default="test",
        description="The split to test on, where `test` is without labels `validation`.",
    )


def _check_settings(values: dict[str, float | int | str]) -> dict[str, float | int | str]:
    try:
        resolve(values)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("settings: ")) from None
    return values


TaskPreset = Annotated[
    dict[str, float | int | str], AfterValidator(_check_settings)
]  # the command line overrides it


class Presets(BaseModel, extra="forbid", frozen=True):
    """Settings of a search that suit the task; the command line overrides them."""

    bbt: TaskPreset = Field(default={}, description="For bundles of bbt.")
    bbtv2: TaskPreset = Field(default={}, description="For bundles of bbtv2.")


class Context(BaseModel, extra="forbid", frozen=True):
    """What precedes every row of a decoder: an instruction, then demonstrations.

    The tokenizer's special tokens, e.g. of a chat template, may be written here and in the causal
    template; in the text of a row they are ordinary text.
    """

    instruction: str = Field(default="", description="A text in front of everything.")
    demonstrations: Demonstrations = 0
    template: str | None = Field(
        default=None,
        description="Of a demonstration, with {label}; unless given, the causal template and the "
        "label word.",
    )
    separator: str = Field(
        default="\n\n", description="After the instruction, and after each demonstration."
    )


class PromptStart(BaseModel, extra="forbid", frozen=True):
    """The text that a prompt starts from, for bundles that are exported with it."""

    init: str = Field(description="The text.")


def _every_group(given: object) -> object:
    if not isinstance(given, dict):
        return given
    for name in given:
        check_known("template group", name, GROUPS, ValueError)
    return dict.fromkeys(GROUPS) | given


def _one_or_more(given: object) -> object:
    return [given] if isinstance(given, str) else given


T = TypeVar("T")
Columns = Annotated[
    list[str], BeforeValidator(_one_or_more, json_schema_input_type=str | list[str])
]
ByGroup = Annotated[
    dict[str, T | None], BeforeValidator(_every_group)
]  # a value, or None, for every template group


def _optional_count(schema: dict[str, Any]) -> None:
    """In a file `classes` may replace `n_classes`."""
    schema["required"].remove("n_classes")


class Task(BaseModel, extra="forbid", frozen=True, json_schema_extra=_optional_count):
    """A classification task, as its TOML file describes it."""

    name: str = Field(
        pattern=r"^[\w-][\w.-]*$", description="Name of the task, in reports and of run folders."
    )
    metric: Metric = Field(
        default="accuracy", description="What is reported; f1 is that of class 1."
    )
    class_shares: list[Annotated[float, Field(ge=1e-6, le=1e9)]] | None = Field(
        default=None,
        description="How frequent each class is among the rows to classify, in proportion; "
        "few-shot rows do not tell.",
    )
    text: Columns = Field(
        min_length=1, description="Text columns, in the order of a row without column names."
    )
    label: str = Field(default="label", description="The column of labels.")
    classes: list[str] | None = Field(
        default=None,
        description="The labels in the data, in class order, where they are not integers from 0.",
    )
    n_classes: int = Field(
        ge=2, le=10_000, description="As many as there are `classes`, where those are given."
    )
    clean: Literal["newlines"] | None = Field(
        default=None,
        description="newlines: a backslash and n, in some data sets a line break, become a space.",
    )
    separator: str = Field(
        default=" . ",
        description="Between the initial prompt tokens and a template without {prompt}.",
    )
    hub: HubData | None = Field(
        default=None, description="Where the rows come from without --data."
    )
    templates: ByGroup[str] = Field(description="How a row is written.")
    label_words: ByGroup[list[str | list[str]]] = Field(
        description="The word or words of each class, in class order."
    )
    context: Context = Field(default=Context(), description="What precedes every row (decoders).")
    prompt: PromptStart | None = Field(
        default=None, description="A text that the prompt starts from."
    )
    presets: Presets = Field(default=Presets(), description="Settings of a search.")

    @model_validator(mode="before")
    @classmethod
    def _count(cls, given: object) -> object:
        if isinstance(given, dict) and isinstance(given.get("classes"), list):
            return {"n_classes": len(given["classes"])} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.classes is not None:
            self._check_classes(self.classes)
        if any(name is not None for _, name in _parsed("separator", self.separator)):
            raise ValueError("separator: takes no placeholder; write {{ and }} for braces")
        if self.metric == "f1" and self.n_classes != 2:
            raise ValueError(f"metric: f1 is for 2 classes, n_classes is {self.n_classes}")
        if self.class_shares is not None and len(self.class_shares) != self.n_classes:
            raise ValueError(
                f"class_shares: has {len(self.class_shares)} numbers for {self.n_classes} classes"
            )
        for column in self.text:
            if (
                column == self.label
                or not can_be_placeholder(column)
                or self.text.count(column) > 1
            ):
                raise ValueError(f"text: {column!r} cannot name a text column here")
        for group in GROUPS:
            template, words = self.templates[group], self.label_words[group]
            if template is not None and words is not None:
                self._check_template(
                    f"templates.{group}", template, {} if group == "causal" else {"mask": 1}
                )
                self._check_words(f"label_words.{group}", words)
            elif template is not None or words is not None:
                raise ValueError(
                    f"{'templates' if template is None else 'label_words'}.{group}: missing"
                )
        if not any(self.templates.values()):
            raise ValueError(f"templates: give at least one of {', '.join(GROUPS)}")
        if self.context.template is not None:
            self._check_template("context.template", self.context.template, {"label": 1})
        return self

    def _check_classes(self, names: list[str]) -> None:
        if len(names) != self.n_classes:
            raise ValueError(f"classes: {len(names)} names, n_classes is {self.n_classes}")
        if len(set(names)) != len(names) or any(not name or name != name.strip() for name in names):
            raise ValueError(
                "classes: each class needs a name of its own, without spaces around it"
            )

    def _check_template(self, key: str, template: str, once: dict[str, int]) -> None:
        """once: placeholders besides the text columns and {prompt} that it needs exactly once."""
        used = [name for _, name in _parsed(key, template) if name is not None]
        known = [*self.text, "prompt", *once]
        for name in used:
            if name not in known:
                names = ", ".join(f"{{{k}}}" for k in known)
                raise ValueError(f"{key}: unknown placeholder {{{name}}}; known here: {names}")
        for name in once:
            if used.count(name) != 1:
                raise ValueError(f"{key}: needs {{{name}}} exactly once")
        if used.count("prompt") > 1:
            raise ValueError(f"{key}: {{prompt}} may be used once")
        if not any(column in used for column in self.text):
            raise ValueError(f"{key}: has no text column; write {{{self.text[0]}}}")

    def _check_words(self, key: str, words: list[str | list[str]]) -> None:
        if len(words) != self.n_classes:
            raise ValueError(f"{key}: {len(words)} words for {self.n_classes} classes")
        every = [word for of_class in word_lists(words) for word in of_class]
        if (
            not all(word_lists(words))
            or len(set(every)) != len(every)
            or not all(word.strip() for word in every)
        ):
            raise ValueError(f"{key}: each class needs a word of its own")

    def cleaned(self, text: str) -> str:
        """A text of the data as it is read."""
        return text.replace("\\n", " ") if self.clean == "newlines" else text

    def template(self, group: TemplateGroup) -> str:
        """The template of a group. Raises TaskError when the task has none."""
        return self._required("templates", self.templates, group)

    def words(self, group: TemplateGroup) -> list[str]:
        """A label word for each class of a group, the first, in class order. TaskError when the
        task has none.
        """
        return [words[0] for words in self.all_words(group)]

    def all_words(self, group: TemplateGroup) -> list[list[str]]:
        """All label words of each class of a group, in class order. Raises TaskError when the task
        has none.
        """
        return word_lists(self._required("label_words", self.label_words, group))

    def _required(self, key: str, values: dict[str, T | None], group: TemplateGroup) -> T:
        if (value := values[group]) is None:
            raise TaskError(
                f"task {self.name} has no {key}.{group}, which this backbone needs; add it"
            )
        return value

    def preset(self, method: Method) -> dict[str, float | int | str]:
        """The task's settings for a method; may be empty."""
        own = {"demonstrations": self.context.demonstrations} if self.context.demonstrations else {}
        return own | (self.presets.bbt if method == "bbt" else self.presets.bbtv2)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the placeholder that follows it (None at the end). ValueError when
    malformed.
    """
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in Formatter().parse(template):
        if name is not None and (name == "" or spec or conversion):
            raise ValueError(f"a placeholder is a name alone, not {{{name}{spec or ''}...}}")
        parts.append((literal, name))
    return parts


def written(template: Sequence[tuple[str, str | None]]) -> str:
    """The template of which `parse_template` gives these pairs."""
    braces = str.maketrans({"{": "{{", "}": "}}"})
    return "".join(
        literal.translate(braces) + (f"{{{name}}}" if name else "") for literal, name in template
    )


def word_lists(words: list[str | list[str]]) -> list[list[str]]:
    """Several words or one for each class, as lists."""
    return [[own] if isinstance(own, str) else own for own in words]


def can_be_placeholder(column: str) -> bool:
    """Whether a template can name a column: {mask} and {prompt} mean something else, and some
    characters end a name.
    """
    try:
        return column not in ("mask", "prompt") and parse_template(f"{{{column}}}") == [
            ("", column)
        ]
    except ValueError:
        return False


def _parsed(key: str, template: str) -> list[tuple[str, str | None]]:
    try:
        return parse_template(template)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; write {{{{ and }}}} for braces") from None


def to_toml(task: Task) -> str:
    """The content of a task file, from which `load_task` reads the same task."""
    return "\n".join(_toml(task.model_dump(exclude_defaults=True, exclude_none=True))) + "\n"


def _toml(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Lines: a table's values, then its tables. The names of fields need no quotes."""
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    for name in (
        name for name, value in values.items() if value is not None and name not in tables
    ):
        # A JSON string is one of TOML, except for a character that TOML wants escaped.
        yield f"{name} = {json.dumps(values[name], ensure_ascii=False)}".replace("\x7f", "\\u007f")
    for name, table in tables.items():
        yield f"\n[{prefix}{name}]"
        yield from _toml(table, f"{prefix}{name}.")


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def absolute_file(task: str) -> str:
    """What `load_task` takes, from any working directory: of a file its absolute path."""
    return str(Path(task).absolute()) if task.endswith(".toml") else task


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or a user's own by the path of a .toml file. Raises TaskError, in
    one line.
    """
    name, names = str(name_or_path), task_names()
    if not name.endswith(".toml") and name not in names:
        raise TaskError(
            f"unknown task {name!r}; {did_you_mean(name, names)} (or give the path of a .toml file)"
        )
    file = FOLDER / f"{name}.toml" if name in names else Path(name)
    try:
        return Task.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise TaskError(f"cannot read the task file {file} ({error.strerror})") from None
    except ValidationError as error:
        raise TaskError(f"{file}: {first_problem(error)}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # besides tomllib's, of integers of thousands of digits
        raise TaskError(f"{file}: not valid TOML ({first_problem(error)})") from None
