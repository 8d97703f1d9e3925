"""`bbt-accel bench`: every engine and precision beside the baselines, each in a process of its
own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, get_args

import numpy as np

from bbt_accel.benchmarks import steps
from bbt_accel.benchmarks.bench_report import BenchReport, Measurement, TuningScores, score
from bbt_accel.benchmarks.ceilings import matrix_rates
from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.benchmarks.script import record
from bbt_accel.benchmarks.steps import SEED, Bundles, LoadArguments
from bbt_accel.core.batch import Float32
from bbt_accel.core.bundle import Bundle, BundleInfo
from bbt_accel.core.engine_specs import (
    EngineSpec,
    Precision,
    engine_spec,
    engine_specs,
    kind_of,
    local_engine,
)
from bbt_accel.core.logits import class_logits
from bbt_accel.core.optimizations import OPTIMIZATIONS, check_optimizations
from bbt_accel.core.settings import PRESETS, resolve
from bbt_accel.errors import BbtError, EngineError, check_known
from bbt_accel.io import processes
from bbt_accel.io.machine import describe_machine, physical_cores
from bbt_accel.io.progress import StepProgress
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import choose_demonstrations
from bbt_accel.tasks.task import load_task

GPU_PRECISIONS = (
    "fp32",
    "fp16",
)  # measured by default there, where int8 bundles do not run in 8 bits
COMPILERS = ("c++", "g++", "clang++")  # one of these must be there for torch.compile


def run_bench(options: BenchOptions, output: str | Path, progress: bool = True) -> BenchReport:
    """Measure the baselines and every engine and precision, and write report.json, report.md and
    report.png.

    A row that fails is a row of the report. progress: show, on a terminal, what is being done.
    Raises UsageError for unknown names, BbtError when `output` exists, what `export_bundle`,
    `load_task` and `load_rows` raise, and EngineError when the original's forward itself fails.
    """
    for name in options.engines:
        local_engine(name, "bench")
    for name in options.precisions:
        check_known("precision", name, get_args(Precision))
    check_optimizations(options.without)
    command = options.command_line(Path(output))
    return record(
        Path(output), lambda work, tell: Benchmark(options, command, work, tell).run(), progress
    )


class Benchmark:
    """One benchmark. Its bundles and the files of its processes lie in the folder `work`."""

    rows: Sequence[Measurement] = ()
    drift: float | None = None

    def __init__(self, options: BenchOptions, command: str, work: Path, tell: StepProgress) -> None:
        self.options = options.model_copy(update={"threads": options.threads or physical_cores()})
        self.command, self.work, self.tell = command, work, tell
        self.task = load_task(options.task)
        exporting = options.model_dump(include={"method", "prompt_mode", "n_prompt_tokens"})
        self.bundles = Bundles(
            work, options.backbone, exporting, calibrate=options.task, data=options.data
        )

    def run(self) -> BenchReport:
        """Measure everything. After an interrupt `report` has what there is."""
        self.prepare()
        self.tell("measuring the machine")
        rates = processes.call(
            matrix_rates, device=self.options.device, threads=self.options.threads
        )
        self.machine = {**describe_machine(), **rates}
        self.each("timing", self.time, self.rows)
        self.time_again()
        self.each("tuning", self.tune, filter(self.tunes, self.rows))
        self.each("comparing", self.compare, self.rows)
        return self.report()

    @property
    def original(self) -> Measurement:
        """The original's forward: eager in fp32."""
        return self.rows[0]

    def each(
        self, step: str, action: Callable[[Measurement], None], rows: Iterable[Measurement]
    ) -> None:
        """Do it with every row that has not failed so far. Raises EngineError if the original's
        forward fails.
        """
        for row in (row for row in rows if row.status == "passed"):
            self.tell(f"{step} {row.label}")
            with row.capture_errors():
                action(row)
            if row is self.original and row.status in ("failed", "not installed"):
                raise EngineError(f"the original's forward ({row.label}) failed: {row.reason}")

    def prepare(self) -> None:
        """Export, plan, and write the timed and the compared rows. Raises whatever would make every
        row fail.
        """
        options, task = self.options, self.task
        settings = resolve(task.preset(options.method), self.settings(SEED) if options.tune else {})
        if options.tune:
            steps.timed_rows(task, options.data, options.k_shot)
            settings.check_budget()
        self.tell(f"exporting {options.backbone}")
        timed = steps.timed_rows(task, options.data, options.k_shot, options.rows)
        self.test_rows = steps.compared_rows(task, options.data, options.test_rows)
        self.exported = exported = Bundle.read(self.bundles.exported())
        if options.tune:
            settings.generations(exported.info.searched_layers)
        self.rows, self.notes = plan_measurements(options, exported.info)
        self.tell.expect(
            4 + 2 * len(self.rows) + (1 + options.seeds) * sum(map(self.tunes, self.rows))
        )
        shown: list[Row] = []
        if exported.info.causal and settings.demonstrations:
            few = steps.timed_rows(task, options.data, options.k_shot)
            shown = choose_demonstrations(few, task.n_classes, settings.demonstrations, SEED)[0]
        encoder = Encoder(exported, task, shown)
        self.classes = encoder.classes
        self.timed, self.tested = encoder.encode(timed), encoder.encode(self.test_rows)
        steps.save_batch(self.work / "timed.npz", self.timed)
        steps.save_batch(self.work / "tested.npz", self.tested)
        np.save(self.work / "prompt.npy", steps.random_prompts(exported.info, 1, SEED)[0])

    def engine(self, row: Measurement) -> LoadArguments:
        """How to load a row's engine; its bundle is made when it is first needed. Raises
        BbtError.
        """
        bundle = self.bundles.bundle(engine_spec(row.engine), row.precision, row.without)
        where = self.options.model_dump(include={"device", "threads"})
        return {"bundle": bundle, "name": row.engine, "without": row.without, **where}

    def time(self, row: Measurement) -> None:
        measured = self.measure(row)
        row.calls_ms, row.flops = measured["ms"], measured["flops"]
        row.peak_mib, row.versions = measured["peak_mib"], measured["versions"]
        row.graph_share, row.call_overhead = measured["graph_share"], measured["call_overhead"]
        row.bundle_mib = Bundle.read(self.engine(row)["bundle"], verify=False).size / 2**20

    def time_again(self) -> None:
        """Time the original's forward again after all other rows: ratios are no better than its
        drift.
        """
        self.tell(f"timing {self.original.label} again")
        with suppress(BbtError):
            again = self.measure(self.original)["ms"]
            self.drift = median(again) / median(self.original.calls_ms) - 1
            self.original.calls_ms += again

    def measure(self, row: Measurement) -> dict[str, Any]:
        measured: dict[str, Any] = processes.call(
            steps.measure,
            engine=self.engine(row),
            batch=self.work / "timed.npz",
            # Baselines take their candidates one by one: two give the same time per candidate as
            # twenty.
            popsize=min(self.options.popsize, 2) if row.baseline else self.options.popsize,
            repeats=self.options.repeats,
            flops=engine_spec(row.engine).counts_flops,
        )
        return measured

    def tunes(self, row: Measurement) -> bool:
        """Whether prompts are searched for on this engine: the other baselines compute what the
        first one does.
        """
        return self.options.tune and not row.ablation and (not row.baseline or row is self.original)

    def tune(self, row: Measurement) -> None:
        """Search once per seed. The first prompt that eager finds is the one that all rows are
        compared on.
        """
        scores, done = [], []
        seeds = list(range(SEED, SEED + self.options.seeds))
        for seed in seeds:
            self.tell(f"tuning {row.label}, seed {seed}")
            run = self.work / f"run {row.label} {seed}"
            asked = {
                "task": self.options.task,
                "data": self.options.data,
                "settings": self.settings(seed),
            }
            done.append(processes.call(steps.search, engine=self.engine(row), run=run, **asked))
            tested = self.work / f"tested {seed}.npz"
            if (
                not tested.exists()
            ):  # behind the demonstrations that the seed draws, for every engine the same
                shown = Run.read(run).info.demonstrations
                steps.save_batch(
                    tested, Encoder(self.exported, self.task, shown).encode(self.test_rows)
                )
            scores.append(
                score(
                    self.logits(row, run / "prompt.npy", tested),
                    self.tested.targets,
                    self.task.metric,
                )
            )
            if row is self.original and seed == SEED:
                shutil.copy(run / "prompt.npy", self.work / "prompt.npy")
        mean, std = fmean(scores), stdev(scores) if len(scores) > 1 else None
        cost = {"budget": done[-1]["calls"], "seconds": fmean(each["seconds"] for each in done)}
        row.tuned = TuningScores(seeds=seeds, scores=scores, mean=mean, std=std, **cost)

    def settings(self, seed: int) -> dict[str, object]:
        """The original program's search: engines are compared by what it finds."""
        given = self.options.model_dump(include={"popsize", "k_shot", "budget"}, exclude_none=True)
        return {**PRESETS["paper"], "seed": seed, **given}

    def compare(self, row: Measurement) -> None:
        logits = self.logits(row, self.work / "prompt.npy", self.work / "tested.npz")
        if row is self.original:
            self.reference = logits
        row.compare(logits, self.reference, self.tested.targets, self.task.metric)

    def logits(self, row: Measurement, prompt: Path, tested: Path) -> Float32:
        """Class logits (N, C) of the test rows for the prompt in a file, by the label words."""
        found = processes.call(steps.compare, engine=self.engine(row), batch=tested, prompt=prompt)
        return class_logits(found, self.classes).astype(np.float32)

    def report(self) -> BenchReport:
        return BenchReport(
            command=self.command,
            options=self.options,
            task=self.task.name,
            metric=self.task.metric,
            machine=self.machine,
            n_rows=len(self.timed),
            length=self.timed.input_ids.shape[1],
            padding=1 - float(self.timed.attention_mask.mean()),
            n_test_rows=len(self.tested),
            drift=self.drift,
            fastest_baseline=self.derive().label,
            rows=list(self.rows),
            notes=self.notes,
        )

    def derive(self) -> Measurement:
        """Fill in what follows from the timed calls; returns the fastest baseline that passed, else
        the original.
        """
        timed = [(row.set_times(row.calls_ms), row) for row in self.rows if row.calls_ms]
        passed = [(ms, row) for ms, row in timed if row.baseline and row.status == "passed"]
        least, fastest = min(passed, key=lambda pair: pair[0], default=timed[0])
        for ms, row in timed:
            row.calls_per_second = 1000 / ms
            row.speedup, row.speedup_over_fastest = timed[0][0] / ms, least / ms
            row.fp32_share = (self.original.flops or 0) / ms / (1e6 * self.machine["fp32_rate"])
        return fastest


def plan_measurements(
    options: BenchOptions, info: BundleInfo
) -> tuple[list[Measurement], list[str]]:
    """The rows of a benchmark in their order, and notes on what this machine leaves out by
    default.
    """
    gpu = kind_of(options.device) == "cuda"
    bf16 = gpu or "bf16" in describe_machine()["features"]
    compiles = any(map(shutil.which, COMPILERS))
    notes = []
    if not bf16:
        wish = (
            ""
            if "bf16" in options.precisions
            else "; --precisions bf16 measures the engines anyway"
        )
        notes.append(f"no bf16 baselines: this processor has neither AVX512_BF16 nor AMX{wish}")
    if not compiles:
        notes.append(f"no torch.compile: there is no C++ compiler ({', '.join(COMPILERS)})")
    half = [*(["fp16"] if gpu else []), *(["bf16"] if bf16 else [])]
    baselines = [
        Measurement(engine=spec.name, precision=precision, baseline=True)
        for spec in engine_specs().values()
        if spec.baseline
        and kind_of(options.device) in spec.backends
        and (compiles or spec.name != "compiled")
        for precision in spec.benched
        if precision in ("fp32", *half)
    ]
    return [*baselines, *_engine_rows(options, info, bf16)], notes


def _engine_rows(options: BenchOptions, info: BundleInfo, bf16: bool) -> Iterator[Measurement]:
    """The rows after the baselines. A pair that does not exist is a row if engine and precision
    were both asked for.
    """
    specs = list(map(engine_spec, dict.fromkeys(options.engines))) or engine_specs().values()
    off = sorted(options.without)
    for spec in specs:
        if spec.baseline or not (spec.benched or options.engines):
            continue
        benched = (
            GPU_PRECISIONS if kind_of(options.device) == "cuda" else spec.benched or spec.precisions
        )
        default = [name for name in benched if name in spec.precisions and (bf16 or name != "bf16")]
        wanted = dict.fromkeys(options.precisions or default)
        rows = [
            _row(spec, name, off, options)
            for name in wanted
            if options.engines or name in spec.precisions
        ]
        yield from rows
        if options.ablate and rows and rows[0].status == "passed":
            for names in ablations(info, off):
                yield rows[0].model_copy(update={"without": names, "ablation": True})


def _row(spec: EngineSpec, precision: str, off: list[str], options: BenchOptions) -> Measurement:
    row = Measurement(engine=spec.name, precision=precision, without=off)
    if precision not in spec.precisions:
        row.status, row.reason = "failed", f"{spec.name} runs in {', '.join(spec.precisions)}"
    elif kind_of(options.device) not in spec.backends:
        other = " or ".join(f"--device {name}" for name in spec.backends)
        row.status, row.reason = "failed", f"{spec.name} needs {other}, for the baselines too"
    return row


def ablations(info: BundleInfo, off: list[str]) -> list[list[str]]:
    """Each optimization that applies to the backbone, then all of them, on top of those that are
    off anyway.
    """
    names = [
        name
        for name, optimization in OPTIMIZATIONS.items()
        if name not in off and optimization.applies(info)
    ]
    each = [[*off, name] for name in names]
    return [*each, [*off, *names]] if len(names) > 1 else each
