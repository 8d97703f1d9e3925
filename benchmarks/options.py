"""What a benchmark was asked to do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bbt_accel.bundle import Method, PromptMode
from bbt_accel.errors import UsageError

SEED = 42
"""Of the timed and compared rows, the random prompts and the first tuning run."""


@dataclass(frozen=True)
class Options:
    """The arguments of `run_bench`, defaults filled in; None is left where another part knows the default."""

    backbone: str
    task: str
    data: Path | None = None
    method: Method = "bbt"
    prompt_mode: PromptMode = "add"
    n_prompt_tokens: int = 50
    rows: int | None = None
    """Rows of the timed batch; None for k_shot a class."""
    k_shot: int = 16
    test_rows: int = 512
    popsize: int = 20
    repeats: int = 5
    tune: bool = False
    seeds: int = 3
    budget: int | None = None
    """Candidates of a tuning run; None for the task's own number."""
    device: str = "cpu"
    threads: int = 1
    engines: Sequence[str] | None = None
    precisions: Sequence[str] | None = None
    without: Sequence[str] = ()
    savings: bool = False

    def __post_init__(self) -> None:
        names = ("n_prompt_tokens", "rows", "k_shot", "test_rows", "repeats", "seeds", "budget", "threads")
        for name, least in (*((name, 1) for name in names), ("popsize", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{option(name)} must be at least {least}, not {value}")

    @property
    def tuning_seeds(self) -> list[int]:
        """Empty without --tune."""
        return list(range(SEED, SEED + self.seeds)) if self.tune else []

    def command_line(self, output: Path) -> str:
        """The command that repeats the benchmark; options that have their default are left out."""
        words = ["bbt-accel", "bench"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                words.append(option(field.name))
            elif value != field.default and value is not None:
                text = ",".join(value) if isinstance(value, (list, tuple)) else str(value)
                words += [option(field.name), text]
        return shlex.join([*words, "-o", str(output)])


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
