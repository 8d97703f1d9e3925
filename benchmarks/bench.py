"""`bbt-accel bench`: every engine and precision against eager PyTorch, each in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bbt_accel.benchmarks.harness import Harness
from bbt_accel.benchmarks.markdown import markdown
from bbt_accel.benchmarks.options import Options
from bbt_accel.benchmarks.plan import plan
from bbt_accel.benchmarks.plot import draw_report
from bbt_accel.benchmarks.progress import StepProgress
from bbt_accel.benchmarks.report import Report
from bbt_accel.bundle import Method, PromptMode, new_folder
from bbt_accel.cores import physical_cores

JSON, TABLE, PLOT = "report.json", "report.md", "report.png"


def run_bench(
    *,
    backbone: str,
    task: str,
    output: str | Path,
    tune: bool = False,
    data: str | Path | None = None,
    without: Sequence[str] = (),
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    seeds: int | None = None,
    popsize: int | None = None,
    rows: int | None = None,
    repeats: int | None = None,
    method: Method | None = None,
    prompt_mode: PromptMode | None = None,
    n_prompt_tokens: int | None = None,
    k_shot: int | None = None,
    budget: int | None = None,
    test_rows: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    threads: int | None = None,
    savings: bool = False,
    progress: bool = True,
) -> Report:
    """Export `backbone`, hold every engine and precision to eager PyTorch, and write report.json, .md and .png.

    Defaults are those of `Options`; threads: one a physical core. engines, precisions: those of `plan.USUAL` unless
    given. without: savings that are off in every row but eager's. rows: rows of the timed batch instead of k_shot a
    class. test_rows: at most so many are compared. tune: also search a prompt on every row's engine, `seeds` times.
    savings: also measure what each saving brings. progress: show, on a terminal, what is being done.

    A row that fails is a row of the report. Raises what `export_bundle`, `load_task` and `load_rows` raise, UsageError
    for arguments that cannot be, EngineError when the eager baseline itself fails, BbtError when `output` exists.
    """
    given: dict[str, Any] = {
        "data": None if data is None else Path(data),
        "method": method,
        "prompt_mode": prompt_mode,
        "n_prompt_tokens": n_prompt_tokens,
        "rows": rows,
        "k_shot": k_shot,
        "test_rows": test_rows,
        "popsize": popsize,
        "repeats": repeats,
        "seeds": seeds,
        "budget": budget,
        "device": device,
        "threads": physical_cores() if threads is None else threads,
        "engines": engines,
        "precisions": precisions,
    }
    given = {name: value for name, value in given.items() if value is not None}
    options = Options(backbone=backbone, task=str(task), tune=tune, without=tuple(without), savings=savings, **given)
    cases = plan(options.engines, options.precisions, options.without, savings, options.method)
    with new_folder(Path(output)) as folder:
        work = folder / "work"  # bundles and files of the processes: removed with the folder, whatever happens
        work.mkdir()
        with StepProgress(progress) as tell:
            report = Harness(options, cases, work, tell).run(options.command_line(Path(output)))
        shutil.rmtree(work)
        (folder / JSON).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / TABLE).write_text(markdown(report, PLOT), encoding="utf-8")
        draw_report(folder / PLOT, report)
    return report
