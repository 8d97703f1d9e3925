"""What a benchmark is asked to measure. `bbt-accel bench` takes its options, limits and help texts
from here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.core.bundle import Method, PromptMode
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, Device, Precision
from bbt_accel.core.option_types import (
    BACKBONE,
    FIT_PROMPT_TOKENS,
    JOBS,
    METHOD,
    PROMPT_MODE,
    PROMPT_TOKENS,
    TASK_FOLDERS,
    Budget,
    Budgets,
    Count,
    KShot,
    Names,
    PromptTokens,
    Seeds,
    Threads,
)
from bbt_accel.core.settings import DEFAULTS, FITTED, resolve
from bbt_accel.errors import UsageError, check_known, first_problem
from bbt_accel.io.reporting import Schema

Options = TypeVar("Options", bound=BaseModel)


class BenchOptions(BaseModel):
    """The options of `run_bench`; None leaves the choice to the task or the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    without_option: ClassVar = (
        *("method", "prompt_mode", "n_prompt_tokens", "rows", "k_shot", "test_rows"),
        *("popsize", "repeats", "seeds", "budget", "threads", "without"),
    )
    """Those that the command takes by --set."""
    backbone: str = Field(description=BACKBONE)
    task: str = Field(description="Built-in task, or path of a task.toml.")
    data: Path | None = Field(
        default=None, description="Folder with train and test rows (default: the task's dataset)."
    )
    method: Method = Field(default="bbt", description=METHOD)
    prompt_mode: PromptMode = Field(default="add", description=PROMPT_MODE)
    n_prompt_tokens: PromptTokens = PROMPT_TOKENS
    rows: Count | None = Field(
        default=None, description="Rows of the timed batch, instead of --k-shot per class."
    )
    k_shot: KShot = Field(
        default=DEFAULTS.k_shot,
        description="Examples per class, in the timed batch and for tuning.",
    )
    test_rows: Count = Field(
        default=512, description="Maximum number of test rows to compare logits and predictions on."
    )
    popsize: int = Field(default=DEFAULTS.popsize, ge=2, description="Candidates per call.")
    repeats: Count = Field(
        default=5, description="Timed calls per row of the report, after warm-up calls."
    )
    tune: bool = Field(
        default=False,
        description="Also search for soft prompts with every engine, and compare scores.",
    )
    seeds: Count = Field(default=3, description="Searches per engine, with --tune.")
    budget: Budget | None = Field(
        default=None, description="Calls of a search, with --tune (default: the task's)."
    )
    device: Device = Field(default="cpu", description="Where all engines and baselines run.")
    threads: Threads | None = Field(
        default=None, description="CPU threads of an engine (default: the physical cores)."
    )
    engines: list[str] = Field(
        default=[], description="Engines to measure (default: all but remote)."
    )
    precisions: list[str] = Field(
        default=[], description="Precisions to measure (default: those of each engine)."
    )
    without: list[str] = Field(
        default=[], description="Optimizations to switch off in engines, not in baselines."
    )
    ablate: bool = Field(
        default=False, description="Also measure what each optimization contributes, without it."
    )

    def command_line(self, output: Path) -> str:
        """The command that repeats the benchmark."""
        return command_line(["bench"], self, output)


def bench_options(**given: Any) -> BenchOptions:
    """The options of a benchmark. Raises UsageError, in one line, for an unknown name or an invalid
    value.
    """
    return read_options(BenchOptions, given)


REFERENCES = ("gradient-prompt", "lora", "fine-tuning", "embeddings")
CONTENDERS = ("readouts", "auto", *get_args(Method), *REFERENCES)
SEARCHES = ("auto", *get_args(Method), *FITTED)
"""Contenders that search, and may have settings of their own: the readouts among them search with
bbt.
"""
TAKEN = {
    **dict.fromkeys(
        ("seed", "k_shot", "readout", "budget"),
        "is the comparison's own; use its option, or another contender",
    ),
    **dict.fromkeys(
        ("hold_out", "allow_rare_classes"), "would give this search other rows; leave it out"
    ),
}
"""Settings that a search of a comparison cannot have, and why."""


def parse_contender(text: str) -> tuple[str, dict[str, str]]:
    """NAME or NAME:SETTING=VALUE:…, as in auto:alpha=2. Raises UsageError."""
    name, *given = text.split(":")
    check_known("contender", name, dict.fromkeys((*CONTENDERS, *SEARCHES)))
    settings = dict(part.partition("=")[::2] for part in given)
    if len(settings) < len(given):
        raise UsageError(f"--contenders {text}: a setting is given twice; give it once")
    if settings and name not in SEARCHES:
        raise UsageError(f"--contenders {text}: {name} has no settings; {', '.join(SEARCHES)} have")
    if taken := [name for name in TAKEN if name in settings]:
        raise UsageError(f"--contenders {text}: {taken[0]} {TAKEN[taken[0]]}")
    with naming(text):
        resolve(settings)
    return name, settings


@contextmanager
def naming(contender: str) -> Iterator[None]:
    """Errors of its settings name the contender."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--contenders {contender}: {error}") from None


class CompareOptions(Schema):
    """The options of `run_compare`."""

    without_option: ClassVar = (
        *("reference", "k_shot", "n_prompt_tokens", "test_rows"),
        *("engine", "precision", "threads"),
    )
    """Those that the command takes by --set."""
    backbone: str = Field(default="demo", description=BACKBONE)
    data: Path | None = Field(default=None, description=TASK_FOLDERS)
    contenders: Names = Field(
        default=list(CONTENDERS),
        description=(
            f"Any of {', '.join(CONTENDERS)}, or a readout; a search may have settings, "
            "as in auto:alpha=2."
        ),
    )
    reference: str | None = None
    """Contender that the others are compared with, pair by pair (default: auto, if it is one of
    them).
    """
    budgets: Budgets = Field(default=[64, 300, 1000])
    """calls of the searches."""
    seeds: Seeds = Field(
        default=[42, 43, 44], description="Seeds of the rows and of every random draw."
    )
    k_shot: KShot = Field(
        default=DEFAULTS.k_shot,
        description="Examples per class to train on, and again in the dev set.",
    )
    n_prompt_tokens: PromptTokens = FIT_PROMPT_TOKENS
    test_rows: Count = Field(default=800, description="Maximum number of test rows.")
    engine: str = Field(
        default=DEFAULT_ENGINE, description="Engine of the readouts and the searches."
    )
    precision: Precision = Field(default="fp32", description="Precision of the engine.")
    threads: Threads | None = Field(
        default=None, description="CPU threads per trial (default: its share)."
    )
    jobs: Count | None = Field(default=None, description=JOBS)

    def command_line(self, tasks: Sequence[str], output: Path) -> str:
        """The command that repeats the comparison."""
        return command_line(["compare", *tasks], self, output)


DECISIVE = ("backbone", "k_shot", "n_prompt_tokens", "test_rows", "engine", "precision")
"""Options of `CompareOptions` that decide the scores of a trial; the budgets do so, too, where it
is a search.
"""


def bundle_of(contender: str) -> str:
    """The bundle that a contender reads, a key of `prepare`'s: of its method, or as exported, to
    train it.
    """
    name, _ = parse_contender(contender)
    return "bbt exported" if name in REFERENCES else method_of(name)


def method_of(search: str) -> Method:
    """The method of a search among the contenders."""
    return "bbtv2" if search == "bbtv2" else "bbt"


def readout_of(search: str) -> str:
    """The readout of a search among the contenders."""
    return "verbalizer" if search in get_args(Method) else search


def check_reference(reference: str, contenders: Sequence[str]) -> None:
    """Raises UsageError for a contender that is not compared."""
    provided = [*contenders, *(FITTED if "readouts" in contenders else ())]
    check_known("reference", reference, dict.fromkeys(provided))


def compare_options(**given: Any) -> CompareOptions:
    """The options of a comparison. Raises UsageError, in one line, for an unknown name or an
    invalid value.
    """
    return read_options(CompareOptions, given)


def command_line(words: Sequence[str], options: BenchOptions | CompareOptions, output: Path) -> str:
    """A command of bbt-accel with these options; those at their default are omitted."""
    words = ["bbt-accel", *words]
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if value == field.default:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name in options.without_option:
            words += ["--set", f"{name}={text}"]
        else:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return shlex.join([*words, "-o", str(output)])


def read_options(model: type[Options], given: dict[str, Any]) -> Options:
    try:
        return model(**given)
    except ValidationError as error:
        where, _, problem = first_problem(error).partition(": ")
        option = where.partition(".")[0].replace("_", "-")
        raise UsageError(f"--{option}: {problem}; got {error.errors()[0]['input']!r}") from None
