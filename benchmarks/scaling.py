"""What dividing a population among workers costs, and how it scales. Run on an idle machine:

    python -m bbt_accel.benchmarks.scaling BUNDLE -o REPORT

The dummy engine computes next to nothing, so that what is left of a generation is the way to the workers and back.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bbt_accel.benchmarks.markdown import digits
from bbt_accel.benchmarks.report import Part
from bbt_accel.benchmarks.timing import percentiles
from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called, one_line
from bbt_accel.data import few_shot, load_rows
from bbt_accel.display import busy, text
from bbt_accel.doctor import describe_machine, installed_versions
from bbt_accel.encoding import Encoder
from bbt_accel.objective import Float64, Objective
from bbt_accel.run import EngineRecord
from bbt_accel.settings import resolve
from bbt_accel.tasks import load_task
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.space import Space
from bbt_accel.tuning.workers import WorkersEvaluator

SEED = 42


class Row(Part):
    """An engine, and where it ran."""

    engine: str
    """Its name; dummy computes next to nothing."""
    workers: int | None
    """None for the process of the search itself."""
    threads: int
    """Of that process, or of each worker."""
    start_s: float
    """Until the first generation could begin: loading the engine, and Ray with its processes."""
    ms_median: float
    """Milliseconds a generation, without CMA-ES's own part; median."""
    ms_p90: float
    """The 90th percentile of the same."""
    speedup: float
    """The median of the same engine in the process of the search with one thread, over this one."""
    overhead_ms: float | None
    """One worker with one thread alone: its median less that of the process of the search with one thread."""
    same: bool
    """Whether every loss is that of the process of the search with one thread, bit for bit."""


class Report(Part):
    """report.json."""

    created: str
    """When the benchmark ended, UTC, ISO 8601."""
    command: str
    """That made it."""
    cpu: str
    """Model name of the processor."""
    cores: int
    """Logical cores that the process may use."""
    bundle: str
    """Its backbone and method."""
    rows_of_task: int
    """N, rows of the train batch."""
    popsize: int
    """P, candidates a generation."""
    repeats: int
    """Timed generations a row, after one that is not timed."""
    drift: float
    """How far the first row's time had changed when it was measured again at the end; ratios are no better."""
    rows: list[Row]
    """One a configuration."""
    versions: dict[str, str]
    """Of what is installed."""


def measure(
    bundle: Bundle, task_name: str, data: Path | None, engines: Sequence[str], popsize: int, k_shot: int, repeats: int,
    most: int, command: str = "", tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Report:  # fmt: skip
    """Time every engine in this process and in 1 .. `most` workers of one thread, and with `most` threads here.

    command: for the report.
    """
    task = load_task(task_name)
    settings = resolve(task.preset(bundle.info.method), {"popsize": popsize, "k_shot": k_shot, "seed": SEED})
    rows, _ = few_shot(load_rows(task, "train", data), task.n_classes, k_shot, SEED)
    batch = Encoder(bundle, task).encode(rows)
    places = [(None, 1), *((workers, 1) for workers in range(1, most + 1)), (None, most)]
    cases = [(engine, workers, threads) for engine in engines for workers, threads in places]
    found: list[Row] = []
    first: dict[str, tuple[float, Float64]] = {}

    def job(engine: str, threads: int) -> Job:
        record = EngineRecord(name=engine, device="cpu", threads=threads, without=[])
        return Job(bundle, record, settings, Objective(settings.loss, task.metric), batch, batch)

    for number, (engine, workers, threads) in enumerate(cases):
        tell(f"{engine}, {'here' if workers is None else f'{workers} workers'}, threads {threads}", number, len(cases))
        work, started = job(engine, threads), time.perf_counter()
        evaluator: Evaluator
        evaluator = work.evaluator() if workers is None else WorkersEvaluator(workers, "local", work)
        with evaluator:
            space = make_space(evaluator, work)
            start_s = time.perf_counter() - started
            seconds, losses = generations(evaluator, space, work, repeats)
        median, p90, _ = percentiles(seconds)
        alone, wanted = first.setdefault(engine, (median, losses))
        found.append(
            Row(
                engine=engine,
                workers=workers,
                threads=threads,
                start_s=start_s,
                ms_median=median,
                ms_p90=p90,
                speedup=alone / median,
                overhead_ms=median - alone if workers == 1 and threads == 1 else None,
                same=bool((losses == wanted).all()),
            )
        )
    work = job(engines[0], 1)
    with work.evaluator() as evaluator:
        again, _ = generations(evaluator, make_space(evaluator, work), work, repeats)
    machine = describe_machine()
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        cpu=machine["cpu"],
        cores=machine["cores"],
        bundle=f"{Path(bundle.info.backbone).name}, {bundle.info.method}, {bundle.info.precision}",
        rows_of_task=len(batch),
        popsize=popsize,
        repeats=repeats,
        drift=percentiles(again)[0] / found[0].ms_median - 1,
        rows=found,
        versions=installed_versions(),
    )


def make_space(evaluator: Evaluator, job: Job) -> Space:
    stds = evaluator.layer_stds() if job.bundle.info.method == "bbtv2" else None
    return Space(job.bundle.info, job.settings, stds)


def generations(evaluator: Evaluator, space: Space, job: Job, repeats: int) -> tuple[list[float], Float64]:
    """Seconds of each generation but the first, and the losses of all; in BBTv2 the layers take turns."""
    rng, s = np.random.default_rng(SEED), job.settings
    layers = len(space.stack) or 1
    seconds, losses = [], []
    for number in range(repeats + 1):
        candidates = s.sigma * rng.standard_normal((s.popsize, s.intrinsic_dim))
        layer, start = number % layers, time.perf_counter()
        found, _ = evaluator.train(space, layer, candidates)
        seconds.append(time.perf_counter() - start)
        losses.append(found)
        if len(space.stack):
            space.stack[layer] = space.prompts(layer, candidates[:1])[0]
    return seconds[1:], np.stack(losses)


def markdown(report: Report) -> str:
    header = (
        "| engine | where | threads | start s | ms a generation | p90 | × one thread here | overhead ms | same losses |"
    )
    lines = [header, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for row in report.rows:
        where = "this process" if row.workers is None else f"{row.workers} worker{'s' * (row.workers > 1)}"
        overhead = "–" if row.overhead_ms is None else f"{row.overhead_ms:.1f}"
        cells = [row.engine, where, str(row.threads), f"{row.start_s:.1f}", digits(row.ms_median), digits(row.ms_p90)]
        lines.append(f"| {' | '.join([*cells, f'{row.speedup:.2f}', overhead, 'yes' if row.same else 'no'])} |")
    facts = (
        f"{report.bundle}; {report.rows_of_task} rows, {report.popsize} candidates a generation, {report.repeats} "
        f"generations a row after one to warm up, medians. {report.cpu}, {report.cores} cores. The first row measured "
        f"again at the end: {report.drift:+.1%}. `{report.command}`, {report.created}; {text(report.versions)}"
    )
    legend = "\n".join(
        f"- **{name}**: {' '.join((Row.model_fields[field].description or '').split())}"
        for name, field in (
            ("start s", "start_s"),
            ("ms a generation", "ms_median"),
            ("× one thread here", "speedup"),
            ("overhead ms", "overhead_ms"),
            ("same losses", "same"),
        )
    )
    return "\n\n".join(["# A population divided among workers", "\n".join(lines), facts, "## Columns", legend]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bbt_accel.benchmarks.scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--task", default="demo")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--workers", type=int, default=2, help="at most so many")
    parser.add_argument("--popsize", type=int, default=20)
    parser.add_argument("--k-shot", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    a = parser.parse_args(arguments)
    with one_line(), new_folder(a.output) as folder, busy("measuring") as tell:
        sizes = a.popsize, a.k_shot, a.repeats, a.workers
        command = called("scaling", arguments)
        report = measure(Bundle.read(a.bundle), a.task, a.data, ["dummy", a.engine], *sizes, command, tell)
        (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
