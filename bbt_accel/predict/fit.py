"""From one file of labelled texts to a classifier and its test score: what `bbt-accel fit` does."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bbt_accel.core.bundle import Bundle, Method
from bbt_accel.core.label_words import distinct_words
from bbt_accel.core.option_types import FIT_BUDGET, FIT_PROMPT_TOKENS
from bbt_accel.core.settings import DEFAULTS, ReadoutChoice, resolve
from bbt_accel.errors import DataError, RunError, TaskError, UsageError, first_problem
from bbt_accel.io.progress import progress_bar
from bbt_accel.io.tables import Table, as_utf8, distinct, no_column, plain, read_table
from bbt_accel.predict.bundle_cache import Choice, PrecisionChoice, choose, prepared_bundle
from bbt_accel.predict.inference import evaluate
from bbt_accel.search.run import INFO, TASK, Run, RunInfo
from bbt_accel.search.tune import tune
from bbt_accel.search.workspace import find_info, hidden
from bbt_accel.tasks.splits import examples, require_examples
from bbt_accel.tasks.task import Task, can_be_placeholder

TEMPLATES = {
    "masked": "{text} This is about {{mask}} .",
    "span": "text: {{prompt}} {text} This is about {{mask}}",
}
TEMPLATES |= {"causal": "{text} This is about"}


@dataclass(frozen=True)
class FitPlan:
    """What `fit_file` has chosen, and the commands that do the same in steps."""

    table: Table
    counts: dict[str, int]  # different texts of each class
    choice: Choice
    bundle: Bundle
    task: Task
    settings: dict[str, Any]
    commands: list[list[str]]

    @property
    def left(self) -> int:
        """Rows that the search does not use."""
        s = resolve(self.settings)
        return sum(count - 2 * examples(count, s.k_shot, s.parts) for count in self.counts.values())

    def facts(self) -> dict[str, object]:
        """For a reader."""
        form = "" if self.table.encoding is None else f", {self.table.encoding}"
        form += "" if self.table.separator is None else f", separated by {self.table.separator!r}"
        group, k = self.bundle.info.template_group, self.settings["k_shot"]
        used = sum(self.counts.values())
        most = "up to " if (used - self.left) < 2 * k * len(self.counts) else ""
        return {
            "rows": f"{len(self.table.records):,}{form}",
            "distinct texts": None
            if used == len(self.table.records)
            else f"{used:,}; repeated ones are left out",
            "text": self.task.text,
            "label": (
                f"{self.task.label}: "
                f"{', '.join(f'{name} {count:,}' for name, count in self.counts.items()):.300}"
            ),
            "backbone": self.bundle.info.backbone,
            "engine": (
                f"{self.choice.engine} on {self.choice.device}, {self.choice.precision} "
                f"({self.choice.reason})"
            ),
            "template": self.task.template(group),
            "label words": ", ".join(self.task.words(group))[:300],
            "split": (
                f"{most}{k} examples per class to search with, as many to choose by, "
                f"{self.left:,} to test on"
            ),
            "budget": f"{self.settings['budget']:,} calls, readout {self.settings['readout']}",
        }

    def script(self) -> list[str]:
        """The commands as one would type them."""
        return [shlex.join(["bbt-accel", *words]) for words in self.commands]


@dataclass(frozen=True)
class Fitted:
    """score: as from `evaluate`; None without test rows, or after an interruption."""

    plan: FitPlan
    run: Run
    score: dict[str, Any] | None


def fit_file(
    file: str | Path,
    output: str | Path,
    *,
    text: str | Sequence[str],
    label: str,
    backbone: str = "demo",
    template: str | None = None,
    label_words: Sequence[str] = (),
    engine: str = "auto",
    precision: PrecisionChoice = "auto",
    readout: ReadoutChoice = "auto",
    budget: int = FIT_BUDGET,
    k_shot: int | None = None,
    balanced: bool = False,
    seed: int = DEFAULTS.seed,
    method: Method = "bbt",
    n_prompt_tokens: int = FIT_PROMPT_TOKENS,
    threads: int | None = None,
    overwrite: bool = False,
    announce: Callable[[FitPlan], object] = lambda _: None,
    progress: bool = True,
) -> Fitted:
    """Tune a classifier on a file of labelled texts, and score it on the rows that the search does
    not use.

    file: CSV, TSV, JSON, JSON lines, Parquet or Excel. text: its column of texts, or several.
    label: its column of labels, of any kind. template: how a row is written for the backbone, e.g.
    "{review} It was {mask} ."; label_words: one for each label, in their sorted order; taken from
    the labels unless given. engine, precision: `auto` for what `doctor` finds. k_shot: as in
    `Settings`; unless given its default, but at most a third of a class's rows.
    balanced: treat all classes as equally frequent; otherwise a fitted readout expects them as
    frequent as in the file.
    overwrite: replace an existing run; otherwise an unfinished or interrupted one is continued, a
    complete one too if the budget is larger, and a complete one of the same search scored again.
    announce: called with the plan before the search.
    Raises DataError for a file that cannot be read, lacks a column, or has missing texts or labels,
    a single class or a class with one row; what `export_bundle`, `optimize_bundle`, `tune` and
    `evaluate` raise.
    """
    output = Path(output)
    if os.path.lexists(output) and not (output / INFO).is_file():
        raise RunError(f"{output} exists already and is no run; choose another -o")
    file, columns = Path(file), [text] if isinstance(text, str) else list(text)
    table = read_table(file)
    counts = check_table(table, file, columns, label)
    chosen = examples_per_class(counts, k_shot) | {
        "budget": budget,
        "seed": seed,
        "readout": readout,
        "hold_out": True,
    }
    if not overwrite and (former := find_info(output)) is not None:
        require_same(former, output, task_name(file), chosen)
    settings, choice = resolve(chosen), choose(engine, precision)
    settings.check_budget()
    with progress_bar(f"preparing {backbone}", progress) as tell:
        bundle = prepared_bundle(backbone, choice, method, n_prompt_tokens, tell, threads=threads)
    shares = [1] * len(counts) if balanced else class_shares(table, label, counts)
    task = make_task(
        task_name(file),
        columns,
        label,
        list(counts),
        bundle,
        template,
        label_words,
        class_shares=shares,
    )
    words = commands(file, output, backbone, bundle, choice, chosen, threads)
    plan = FitPlan(table, counts, choice, bundle, task, chosen, words)
    announce(plan)
    run = tune(
        bundle,
        task,
        data=file,
        engine=choice.engine,
        device=choice.device,
        threads=threads,
        output=output,
        resume=not overwrite,
        overwrite=overwrite,
        settings=chosen,
        progress=progress,
    )
    tested = run.info.status == "done" and plan.left > 0
    return Fitted(plan, run, evaluate(run.path, data=file, threads=threads) if tested else None)


def examples_per_class(counts: Mapping[str, int], k_shot: int | None) -> dict[str, Any]:
    """The settings of how many examples a class gives: the default, or what it has; or exactly
    `k_shot`.

    counts: rows of each class. Raises DataError where one has too few for `k_shot`.
    """
    if k_shot is None:
        return {"k_shot": DEFAULTS.k_shot, "allow_rare_classes": True}
    require_examples(counts, k_shot, None, "lower it or leave it out")
    return {"k_shot": k_shot, "allow_rare_classes": False}


def require_same(former: RunInfo, output: Path, task: str, settings: Mapping[str, object]) -> None:
    """Raises RunError for a run of another search, complete or not, before anything is exported for
    this one.
    """
    wanted = resolve(former.settings.model_dump(), settings)
    if former.task.name != task or former.settings.differences(wanted):
        if hidden(output).exists():
            problem = f"{hidden(output)} is another search, which is unfinished"
            raise RunError(f"{problem}; remove it, use --overwrite or another -o")
        raise RunError(f"{output} is the run of another search; use --overwrite or another -o")


def check_table(table: Table, file: Path, text: Sequence[str], label: str) -> dict[str, int]:
    """Different texts of each class, in the order of their names: numbers by value. Raises
    DataError, in one line.
    """
    if not table.records:
        raise DataError(f"{file} has no rows")
    for column in (*text, label):
        if column not in table.columns:
            raise no_column(column, table.columns, file)
    if not text or label in text or len(set(text)) < len(text):
        raise UsageError(f"--text {','.join(text)} and --label {label} must name different columns")
    for column in (*text, label):
        empty = [
            number
            for number, record in enumerate(table.records, 1)
            if not plain(record.get(column))
        ]
        if empty:
            what = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
            raise DataError(
                f"{file}: {column} is empty in {what}, first in row {empty[0]}; complete or "
                "remove them"
            )
    check_texts(table, file, text)
    counts = count_texts(table, text, label)
    if len(counts) < 2:
        raise DataError(
            f"{file}: {label} is {next(iter(counts))!r} in every row; at least two classes are "
            "needed"
        )
    if unwritable := [name for name in counts if as_utf8(name) != name]:
        raise DataError(
            f"{file}: {label} is {unwritable[0]!r:.50} in a row, which is no text; correct the row"
        )
    rarest, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < 2:
        texts = "1 text" if fewest else "no text"
        problem = (
            f"{file}: {label} has {len(counts)} classes, and {rarest!r:.50} has {texts} of its own"
        )
        raise DataError(f"{problem}; each needs two, one to search with and one to choose by")
    return {name: counts[name] for name in sorted(counts, key=by_value)}


def count_texts(table: Table, text: Sequence[str], label: str) -> Counter[str]:
    """Texts of each class that no row before has, 0 where there are none."""
    counts = Counter(dict.fromkeys((plain(record[label]) for record in table.records), 0))
    rows = distinct(table.records, lambda record: tuple(plain(record[column]) for column in text))
    counts.update(plain(record[label]) for record in rows)
    return counts


def class_shares(table: Table, label: str, classes: Iterable[str]) -> list[int]:
    """Rows of each class, repeated texts included."""
    counts = Counter(plain(record[label]) for record in table.records)
    return [counts[name] for name in classes]


def check_texts(table: Table, file: Path, columns: Sequence[str]) -> None:
    """Raises DataError for a value that is no text, UsageError for a column that a template cannot
    name.
    """
    for column in columns:
        if not can_be_placeholder(column):
            raise UsageError(
                f"--text {column}: a template cannot name a column like that; rename it"
            )
        for number, record in enumerate(table.records, 1):
            if not isinstance(record[column], str):
                raise DataError(
                    f"{file} row {number}: {column} is {record[column]!r:.50}, not text"
                )


def by_value(name: str) -> tuple[float, str]:
    try:
        value = float(name)
    except ValueError:
        value = float("inf")
    return (value if math.isfinite(value) else float("inf")), name  # "nan" and "inf" are texts


def task_name(file: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", file.stem, flags=re.ASCII).strip(".-") or "task"


def make_task(
    name: str,
    text: Sequence[str],
    label: str,
    classes: Sequence[str],
    bundle: Bundle,
    template: str | None = None,
    label_words: Sequence[str | list[str]] = (),
    *,
    class_shares: Sequence[float],
) -> Task:
    """The task of a table, for the template group of a bundle. Raises TaskError.

    Unless given, the template is one of `TEMPLATES`, and the label words come from the names of the
    classes.
    """
    group = bundle.info.template_group
    template = template or TEMPLATES[group].format(
        text=" ".join(f"{{{column}}}" for column in text)
    )
    try:
        words: list[str | list[str]] = [*(label_words or distinct_words(bundle, template, classes))]
        return Task(
            name=name,
            text=list(text),
            label=label,
            classes=list(classes),
            n_classes=len(classes),
            templates={group: template},
            label_words={group: words},
            class_shares=list(map(float, class_shares)),
        )
    except ValidationError as error:
        raise TaskError(f"task {name}: {first_problem(error)}") from None


def commands(
    file: Path,
    output: Path,
    backbone: str,
    bundle: Bundle,
    choice: Choice,
    settings: dict[str, Any],
    threads: int | None,
) -> list[list[str]]:
    """The same as `fit_file` by the other commands. Their run has another name, and the task file
    is in the first.
    """
    info, exported, made = (
        bundle.info,
        f"{output}-exported",
        f"{output}-{choice.engine}-{choice.precision}",
    )
    method = [] if info.method == "bbt" else ["--method", info.method]
    cpu = [] if threads is None else ["--threads", str(threads)]
    steps = [
        [
            "export",
            backbone,
            "-o",
            exported,
            *method,
            "--n-prompt-tokens",
            str(info.n_prompt_tokens),
        ]
    ]
    if choice.target != "onnx":
        flag = [] if choice.precision == "fp32" else [f"--{choice.precision}"]
        steps.append(["optimize", exported, "-o", made, "--target", choice.target, *flag])
    place = [
        "--engine",
        choice.engine,
        *([] if choice.device == "cpu" else ["--device", choice.device]),
    ]
    data = ["--task", f"{output / TASK}", "--data", str(file)]
    chosen = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
        if not isinstance(value, bool)
    ]
    set_ = [f"{name}=true" for name, value in settings.items() if value is True]
    set_ += [] if threads is None else [f"threads={threads}"]
    chosen += [word for assignment in set_ for word in ("--set", assignment)]
    again = f"{output}-again"
    steps.append(
        [
            "tune",
            "--bundle",
            exported if choice.target == "onnx" else made,
            *data,
            *place,
            *chosen,
            "-o",
            again,
        ]
    )
    return [*steps, ["evaluate", again, *cpu]]
