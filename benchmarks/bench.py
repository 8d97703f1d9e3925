"""`bbt-accel bench`: every engine and precision beside the baselines, each in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from bbt_accel import processes
from bbt_accel.batch import Float32
from bbt_accel.benchmarks.bench_report import bench_markdown, draw_bench
from bbt_accel.benchmarks.bundles import Bundles
from bbt_accel.benchmarks.cases import check_names, plan_measurements
from bbt_accel.benchmarks.measurements import (
    BenchReport,
    Drift,
    Measurement,
    TuningScores,
    check_fidelity,
    score,
)
from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.benchmarks.rates import matrix_rates
from bbt_accel.benchmarks.script import record
from bbt_accel.benchmarks.steps import (
    SEED,
    LoadArguments,
    compare,
    compared_rows,
    measure,
    save_batch,
    search,
    timed_rows,
)
from bbt_accel.benchmarks.timing import random_prompts
from bbt_accel.bundle import Bundle
from bbt_accel.encoding import Encoder
from bbt_accel.engine_specs import engine_spec
from bbt_accel.errors import BbtError, EngineError
from bbt_accel.machine import describe_machine, physical_cores
from bbt_accel.progress import StepProgress
from bbt_accel.settings import resolve
from bbt_accel.tasks import load_task

COUNTED = ("eager", "eager-readout", "torch")
"""Engines whose operations PyTorch counts."""


def run_bench(options: BenchOptions, output: str | Path, progress: bool = True) -> BenchReport:
    """Measure the baselines and every engine and precision, and write report.json, report.md and report.png.

    A row that fails is a row of the report. progress: show, on a terminal, what is being done.
    Raises UsageError for unknown names, BbtError when `output` exists, what `export_bundle`, `load_task` and
    `load_rows` raise, and EngineError when the original's forward itself fails.
    """
    output = Path(output)
    check_names(options)

    def run(work: Path, tell: StepProgress) -> BenchReport:
        benchmark = Benchmark(options, work, tell)
        benchmark.run()
        return benchmark.report(options.command_line(output))

    return record(output, run, bench_markdown, draw_bench, progress)


class Benchmark:
    """One benchmark. Its bundles and the files of its processes lie in the folder `work`."""

    rows: Sequence[Measurement] = ()
    drift = Drift()

    def __init__(self, options: BenchOptions, work: Path, tell: StepProgress) -> None:
        self.options = options.model_copy(update={"threads": options.threads or physical_cores()})
        self.work, self.tell = work, tell
        self.task = load_task(options.task)
        exporting = options.model_dump(include={"method", "prompt_mode", "n_prompt_tokens"})
        self.bundles = Bundles(work, options.backbone, exporting, calibrate=options.task, data=options.data)

    def run(self) -> None:
        """Measure everything; `report` then has it, or what there is of it after an interrupt."""
        self.prepare()
        self.tell("measuring the machine")
        rates = processes.call(matrix_rates, device=self.options.device, threads=self.options.threads)
        self.machine = {**describe_machine(), **rates}
        self.time_all()
        self.each("tuning", self.tune, self.tunes)
        self.each("comparing", self.compare)

    @property
    def original(self) -> Measurement:
        """The original's forward: eager in fp32."""
        return self.rows[0]

    def each(
        self, step: str, action: Callable[[Measurement], None], wanted: Callable[[Measurement], bool] = lambda row: True
    ) -> None:
        """Do it with every row that has not failed so far. Raises EngineError if the original's forward fails."""
        for row in filter(wanted, self.rows):
            if row.status != "passed":
                continue
            self.tell(f"{step} {row.label}")
            with row.capture_errors():
                action(row)
            if row is self.original and row.status in ("failed", "not installed"):
                raise EngineError(f"the original's forward ({row.label}) failed: {row.reason}")

    # Preparation ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Export, plan, and write the timed and the compared rows. Raises whatever would make every row fail."""
        options, task = self.options, self.task
        self.tell(f"exporting {options.backbone}")
        timed = timed_rows(task, options.data, options.k_shot, options.rows)
        tested = compared_rows(task, options.data, options.test_rows)
        if options.tune:
            timed_rows(task, options.data, options.k_shot)
        exported = Bundle.read(self.bundles.exported())
        self.info = exported.info
        if options.tune:
            resolve(task.preset(options.method), self.settings(SEED)).generations(options.method, self.info.n_layers)
        self.rows, self.notes = plan_measurements(options, self.info)
        self.tell.expect(4 + 2 * len(self.rows) + (1 + options.seeds) * sum(map(self.tunes, self.rows)))
        encoder = Encoder(exported, task)
        self.timed, self.tested = encoder.encode(timed), encoder.encode(tested)
        save_batch(self.work / "timed.npz", self.timed)
        save_batch(self.work / "tested.npz", self.tested)
        np.save(self.work / "prompt.npy", random_prompts(self.info, 1, SEED)[0])

    def engine(self, row: Measurement) -> LoadArguments:
        """How to load a row's engine; its bundle is made when it is first needed. Raises BbtError."""
        bundle = self.bundles.bundle(engine_spec(row.engine), row.precision, row.without)
        where = self.options.model_dump(include={"device", "threads"})
        return {"bundle": bundle, "name": row.engine, "without": row.without, **where}

    # Speed ----------------------------------------------------------------------------------------------------

    def time_all(self) -> None:
        """Time every row, and the original's forward again at the end: ratios are no better than its drift."""
        self.each("timing", self.time)
        self.tell(f"timing {self.original.label} again")
        first = self.original.set_times(self.original.calls_ms)
        self.drift = Drift(first_ms=first)
        with suppress(BbtError):
            again = self.measure(self.original)["ms"]
            last = self.original.set_times(again)
            self.drift = Drift(first_ms=first, last_ms=last, change=last / first - 1)
            self.original.calls_ms += again

    def time(self, row: Measurement) -> None:
        measured = self.measure(row)
        row.calls_ms, row.flops = measured["ms"], measured["flops"]
        row.peak_mib, row.versions = measured["peak_mib"], measured["versions"]
        row.bundle_mib = Bundle.read(self.engine(row)["bundle"], verify=False).size / 2**20

    def measure(self, row: Measurement) -> dict[str, Any]:
        measured: dict[str, Any] = processes.call(
            measure,
            engine=self.engine(row),
            batch=self.work / "timed.npz",
            # Baselines take their candidates one by one: two give the same time per candidate as twenty.
            popsize=min(self.options.popsize, 2) if row.baseline else self.options.popsize,
            repeats=self.options.repeats,
            flops=row.engine in COUNTED,
        )
        return measured

    # Scores ---------------------------------------------------------------------------------------------------

    def tunes(self, row: Measurement) -> bool:
        """Whether prompts are searched for on this engine: the other baselines compute what the first one does."""
        return self.options.tune and not row.ablation and (not row.baseline or row is self.original)

    def tune(self, row: Measurement) -> None:
        """Search once per seed. The first prompt that eager finds is the one that all rows are compared on."""
        scores, seconds, calls = [], [], 0
        seeds = list(range(SEED, SEED + self.options.seeds))
        for seed in seeds:
            self.tell(f"tuning {row.label}, seed {seed}")
            run = self.work / f"run {row.label} {seed}"
            task, data, settings = self.options.task, self.options.data, self.settings(seed)
            done = processes.call(search, engine=self.engine(row), run=run, task=task, data=data, settings=settings)
            scores.append(score(self.logits(row, run / "prompt.npy"), self.tested.targets, self.task.metric))
            seconds.append(done["seconds"])
            calls = done["calls"]
            if row is self.original and seed == SEED:
                shutil.copy(run / "prompt.npy", self.work / "prompt.npy")
        spread = stdev(scores) if len(scores) > 1 else None
        row.tuned = TuningScores(
            seeds=seeds, budget=calls, scores=scores, mean=fmean(scores), std=spread, seconds=fmean(seconds)
        )

    def settings(self, seed: int) -> dict[str, object]:
        options = self.options
        given = {"popsize": options.popsize, "k_shot": options.k_shot, "budget": options.budget, "seed": seed}
        return {name: value for name, value in given.items() if value is not None}

    def compare(self, row: Measurement) -> None:
        logits = self.logits(row, self.work / "prompt.npy")
        if row is self.original:
            self.reference = logits
        check_fidelity(row, logits, self.reference, self.tested.targets, self.task.metric)

    def logits(self, row: Measurement, prompt: Path) -> Float32:
        """Label logits (N, C) of the test rows for the prompt in a file."""
        found = processes.call(compare, engine=self.engine(row), batch=self.work / "tested.npz", prompt=prompt)
        return np.array(found, np.float32)

    def report(self, command: str) -> BenchReport:
        derive(self.rows, self.machine["fp32_rate"])
        return BenchReport(
            command=command,
            options=self.options,
            task=self.task.name,
            metric=self.task.metric,
            machine=self.machine,
            n_rows=len(self.timed),
            length=self.timed.input_ids.shape[1],
            padding=1 - float(self.timed.attention_mask.mean()),
            n_test_rows=len(self.tested),
            drift=self.drift,
            fastest_baseline=compare_with_fastest(self.rows).label,
            rows=list(self.rows),
            notes=self.notes,
        )


def derive(rows: Sequence[Measurement], fp32_rate: float) -> None:
    """Fill in what follows from the timed calls, and from the original's forward, the first row."""
    for row in rows:
        if not row.calls_ms:
            continue
        median = row.set_times(row.calls_ms)
        row.candidates_per_second = 1000 / median
        row.speedup = (rows[0].ms_median or 0.0) / median
        row.fp32_share = (rows[0].flops or 0) * row.candidates_per_second / (fp32_rate * 1e9)


def compare_with_fastest(rows: Sequence[Measurement]) -> Measurement:
    """Fill in the ratios to the fastest baseline that passed, and return it; the original's forward if none did."""
    baselines = [row for row in rows if row.baseline and row.status == "passed"]
    fastest = max(baselines, key=lambda row: row.speedup or 0.0, default=rows[0])
    for row in rows:
        if row.speedup is not None:
            row.speedup_over_fastest = row.speedup / (fastest.speedup or 1.0)
    return fastest
