"""Where the time of a search goes: the model, CMA-ES, the projection, the loss, and the rest.

python -m bbt_accel.benchmarks.overhead BUNDLE --task demo --engine ort -o REPORT
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel

from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called, one_line
from bbt_accel.cores import physical_cores
from bbt_accel.data import few_shot, load_rows
from bbt_accel.display import markdown_table
from bbt_accel.doctor import describe_machine
from bbt_accel.encoding import Encoder
from bbt_accel.engines import base
from bbt_accel.engines.registry import load_engine
from bbt_accel.history import History
from bbt_accel.objective import Objective
from bbt_accel.settings import resolve
from bbt_accel.tasks import load_task
from bbt_accel.tuning.cma import Cma
from bbt_accel.tuning.evaluator import LocalEvaluator
from bbt_accel.tuning.search import search
from bbt_accel.tuning.space import Space


class Overhead(BaseModel):
    """overhead.json."""

    command: str
    machine: dict[str, Any]
    backbone: str
    method: str
    precision: str
    engine: str
    threads: int
    rows: int
    popsize: int
    generations: int
    ms_generation: float
    """Milliseconds a generation, all in all, scores on the dev rows included."""
    ms: dict[str, float]
    """What each part has of it, milliseconds a generation."""
    outside: float
    """The share that is not the model's."""


@contextmanager
def timing(spent: dict[str, float], part: str, owner: Any, name: str) -> Iterator[None]:
    """Add the seconds of every call of `owner.name` to `spent[part]`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(bundle: Bundle, task_name: str, engine: str, threads: int, generations: int, command: str) -> Overhead:
    task = load_task(task_name)
    settings = resolve(task.preset(bundle.info.method), {})
    settings = settings.model_copy(update={"budget": generations * settings.popsize})
    train, dev = few_shot(load_rows(task, "train", None), task.n_classes, settings.k_shot, settings.seed)
    encoder = Encoder(bundle, task)
    spent: dict[str, float] = {}
    with ExitStack() as stack:
        loaded = stack.enter_context(load_engine(bundle, engine, threads=threads))
        objective = Objective(settings.loss, task.metric)
        evaluator = LocalEvaluator(loaded, encoder.encode(train), encoder.encode(dev), objective)
        stack.enter_context(evaluator)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        history = stack.enter_context(History(folder / "history.jsonl"))
        for part, owner, name in (
            ("model", loaded, "run"), ("CMA-ES", Cma, "ask"), ("CMA-ES", Cma, "tell"),
            ("projection", Space, "prompts"), ("loss", base, "tally"), ("loss", Objective, "of"),
        ):  # fmt: skip
            stack.enter_context(timing(spent, part, owner, name))
        start = time.perf_counter()
        search(evaluator, bundle.info, settings, history)
        total = time.perf_counter() - start
    spent["the rest"] = total - sum(spent.values())
    return Overhead(
        command=command,
        machine=dict(describe_machine()),
        backbone=bundle.info.backbone,
        method=bundle.info.method,
        precision=bundle.info.precision,
        engine=engine,
        threads=threads,
        rows=len(train),
        popsize=settings.popsize,
        generations=generations,
        ms_generation=1000 * total / generations,
        ms={part: 1000 * seconds / generations for part, seconds in spent.items()},
        outside=1 - spent["model"] / total,
    )


def table(found: Overhead) -> str:
    parts = [[part, f"{ms:.2f}", f"{ms / found.ms_generation:.1%}"] for part, ms in found.ms.items()]
    whole = ["all", f"{found.ms_generation:.2f}", f"{found.outside:.1%} outside the model"]
    lines = [
        f"# Where a generation's time goes: {found.backbone}, {found.method}, {found.engine} {found.precision}",
        "",
        f"{found.rows} rows, {found.popsize} candidates, mean of {found.generations} generations with their scores on "
        f"the dev rows; {found.threads} threads. `{found.command}`",
        "",
        markdown_table(["part", "ms a generation", "share"], [*parts, whole]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="overhead", description="Where the time of a search goes.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new folder")
    given = parser.parse_args()
    command = called("overhead")
    with one_line():
        with new_folder(given.output) as folder:
            bundle = Bundle.read(given.bundle)
            found = measure(bundle, given.task, given.engine, given.threads, given.generations, command)
            (folder / "overhead.json").write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
            (folder / "overhead.md").write_text(table(found), encoding="utf-8")
        print(table(found))


if __name__ == "__main__":
    main()
