"""The order of a benchmark: export, time every row between two timings of eager, tune, compare."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.benchmarks import worker
from bbt_accel.benchmarks.accuracy import judge, score, summarize
from bbt_accel.benchmarks.options import SEED, Options
from bbt_accel.benchmarks.plan import EAGER, Case
from bbt_accel.benchmarks.progress import StepProgress
from bbt_accel.benchmarks.report import Baseline, Machine, Report, Row, Workload
from bbt_accel.benchmarks.timing import percentiles, random_prompts
from bbt_accel.benchmarks.workload import compared_rows, save_batch, timed_rows
from bbt_accel.bundle import Bundle
from bbt_accel.doctor import describe_machine, installed_versions
from bbt_accel.encoding import Encoder
from bbt_accel.engines.registry import place
from bbt_accel.errors import BbtError, EngineError, MissingDependency, UsageError
from bbt_accel.savings import SAVINGS, inside
from bbt_accel.settings import resolve
from bbt_accel.tasks import load_task

PLAIN = ("eager", "torch", "dummy")
"""Engines that read the exported bundle; the others read one that was optimized for them."""


@dataclass
class Lane:
    """A row while it is being measured."""

    number: int
    case: Case
    row: Row
    seconds: list[float] = field(default_factory=list)
    """Seconds a candidate, of each timed call."""

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error in the block is the row's status; but without eager, row 0, there is nothing to compare with."""
        try:
            yield
        except BbtError as error:
            if self.number == 0:
                raise EngineError(f"the eager baseline failed: {error}") from None
            self.row.status = "not installed" if isinstance(error, MissingDependency) else "failed"
            self.row.reason = str(error)


class Harness:
    """One benchmark. Bundles, and the files by which its processes hand on arrays, lie in the folder `work`."""

    def __init__(self, options: Options, cases: list[Case], work: Path, tell: StepProgress) -> None:
        self.options, self.work, self.tell = options, work, tell
        self.task = load_task(options.task)
        self.lanes = [
            Lane(number, case, Row(engine=case.engine, precision=case.precision, without=list(case.without)))
            for number, case in enumerate([EAGER, *cases])
        ]
        self.bundles: dict[str, Path | BbtError] = {}
        self.naive_flops = 0
        self.expect()

    def expect(self) -> None:
        """Tell the progress bar how many steps there are."""
        tuned = sum(not lane.case.saving for lane in self.lanes)
        self.tell.expect(3 + 2 * len(self.lanes) + tuned * len(self.options.tuning_seeds))

    def run(self, command: str) -> Report:
        """Measure everything. `command` is what the report names as its command line."""
        self.prepare()
        self.tell("measuring the machine")
        rates = worker.call("rates", device=self.options.device, threads=self.options.threads)
        machine = Machine(**describe_machine(), **rates)
        steady = self.time_all()
        for lane in self.lanes:
            set_speed(lane, self.lanes[0].seconds, self.naive_flops, machine.fp32_rate)
        for lane in self.running() if self.options.tune else ():
            if not lane.case.saving:
                with lane.noting():
                    self.tune(lane)
        for lane in self.running():
            self.tell(f"comparing {lane.row.label}")
            with lane.noting():
                self.compare(lane)
        return self.report(command, machine, steady)

    def running(self) -> list[Lane]:
        """Lanes that have not failed so far."""
        return [lane for lane in self.lanes if lane.row.status == "passed"]

    def prepare(self) -> None:
        """Export, and write the timed and the compared rows. Raises what would make every row fail."""
        options, task = self.options, self.task
        self.tell(f"exporting {options.backbone}")
        timed = timed_rows(task, options.data, options.k_shot, options.rows, SEED)
        tested = compared_rows(task, options.data, options.test_rows, SEED)
        if options.tune:
            timed_rows(task, options.data, options.k_shot, None, SEED)
        self.exported = Bundle.read(self.export(()))
        self.drop_savings_of_other_families()
        if options.tune:
            settings = resolve(task.preset(options.method), self.settings(SEED))
            settings.generations(options.method, self.exported.info.n_layers)
        encoder = Encoder(self.exported, task)
        self.timed, self.tested = encoder.encode(timed), encoder.encode(tested)
        save_batch(self.work / "timed.npz", self.timed)
        save_batch(self.work / "tested.npz", self.tested)
        np.save(self.work / "prompt.npy", random_prompts(self.exported.info, 1, SEED)[0])

    def export(self, without: tuple[str, ...]) -> Path:
        """The bundle whose graphs do without these savings; exported when it is first needed."""
        output = self.work / "-".join(["exported", *without])
        if not output.exists():
            options = self.options
            worker.call(
                "export",
                backbone=options.backbone,
                output=output,
                method=options.method,
                prompt_mode=options.prompt_mode,
                n_prompt_tokens=options.n_prompt_tokens,
                without=without,
            )
        return output

    def drop_savings_of_other_families(self) -> None:
        """Rows that would measure a saving which this backbone does not have anyway."""
        info = self.exported.info
        kept: dict[tuple[str, str, tuple[str, ...]], Lane] = {}
        for lane in self.lanes:
            case = lane.case
            names = tuple(n for n in case.without if SAVINGS[n].applies(info)) if case.saving else case.without
            lane.case, lane.row.without = replace(case, without=names), list(names)
            kept.setdefault((case.engine, case.precision, names), lane)
        self.lanes = list(kept.values())
        for number, lane in enumerate(self.lanes):
            lane.number = number
        self.expect()

    def engine(self, case: Case) -> dict[str, Any]:
        """How to load a row's engine; its bundle is made when it is first needed. Raises BbtError."""
        if case.problem is not None:
            raise UsageError(case.problem)
        if place(case.engine, self.options.device) != self.options.device:
            raise UsageError(f"{case.engine} runs on a GPU: add --device cuda, so that eager runs there too")
        off = tuple(inside(case.without))
        bundle = self.exported.path if case.engine in PLAIN else self.optimized(case.engine, case.precision, off)
        options = self.options
        return {
            "bundle": str(bundle),
            "name": case.engine,
            "device": options.device,
            "threads": options.threads,
            "without": case.without,
        }

    def optimized(self, target: str, precision: str, without: tuple[str, ...]) -> Path:
        name = "-".join([target, precision, *without])
        if name not in self.bundles:
            self.bundles[name] = self.work / name
            try:
                worker.call(
                    "optimize",
                    source=self.export(without),
                    output=self.work / name,
                    precision=precision,
                    target=target,
                    calibrate=self.options.task,
                    data=self.options.data,
                )
            except BbtError as error:
                self.bundles[name] = error  # the other rows of this bundle fail by the same error
        found = self.bundles[name]
        if isinstance(found, BbtError):
            raise found
        return found

    def time_all(self) -> Baseline:
        """Time every row, and eager once more at the end, so that ratios stand beside the machine's own drift."""
        for lane in self.lanes:
            self.tell(f"timing {lane.row.label}")
            with lane.noting():
                self.time(lane)
        eager = self.lanes[0]
        first, last = percentiles(eager.seconds)[0], None
        self.tell("timing eager once more")
        with suppress(BbtError):
            again = self.measure(eager)["seconds"]
            last = percentiles(again)[0]
            eager.seconds += again
        return Baseline(first_ms=first, last_ms=last, drift=None if last is None else last / first - 1)

    def time(self, lane: Lane) -> None:
        measured, row = self.measure(lane), lane.row
        lane.seconds = measured["seconds"]
        row.peak_mib, row.versions = measured["peak_mib"], measured["versions"]
        row.bundle_mib = Bundle.read(self.engine(lane.case)["bundle"], verify=False).size / 2**20
        if measured["flops"] is not None:
            self.naive_flops = measured["flops"]

    def measure(self, lane: Lane) -> dict[str, Any]:
        measured: dict[str, Any] = worker.call(
            "measure",
            engine=self.engine(lane.case),
            batch=self.work / "timed.npz",
            # Eager takes its candidates one after the other, so that two of them take as long each as twenty.
            popsize=min(self.options.popsize, 2) if lane.case.engine == "eager" else self.options.popsize,
            repeats=self.options.repeats,
            seed=SEED,
            flops=lane.number == 0,
        )
        return measured

    def tune(self, lane: Lane) -> None:
        """Tuning runs on the row's engine. The first prompt that eager finds is the one that all rows share."""
        scores, seconds, calls = [], [], 0
        for seed in self.options.tuning_seeds:
            self.tell(f"tuning {lane.row.label}, seed {seed}")
            name = f"{lane.number}-{seed}"
            first = lane.number == 0 and seed == SEED
            done = worker.call(
                "tune",
                engine=self.engine(lane.case),
                run=self.work / f"run-{name}",
                prompt=self.work / ("prompt.npy" if first else f"prompt-{name}.npy"),
                batch=self.work / "tested.npz",
                logits=self.work / f"tuned-{name}.npy",
                task=self.options.task,
                data=self.options.data,
                settings=self.settings(seed),
            )
            scores.append(score(np.load(self.work / f"tuned-{name}.npy"), self.tested.targets, self.task.metric))
            seconds.append(done["seconds"])
            calls = done["calls"]
        lane.row.tuned = summarize(self.options.tuning_seeds, calls, scores, seconds)

    def settings(self, seed: int) -> dict[str, object]:
        options = self.options
        given = {"popsize": options.popsize, "k_shot": options.k_shot, "budget": options.budget, "seed": seed}
        return {name: value for name, value in given.items() if value is not None}

    def compare(self, lane: Lane) -> None:
        """The test rows with the shared prompt: logits, predictions and score against eager's."""
        file = self.work / f"logits-{lane.number}.npy"
        worker.call(
            "compare",
            engine=self.engine(lane.case),
            batch=self.work / "tested.npz",
            prompt=self.work / "prompt.npy",
            logits=file,
        )
        eager = np.load(self.work / "logits-0.npy")
        judge(lane.row, np.load(file), eager, self.tested.targets, self.task.metric)

    def report(self, command: str, machine: Machine, steady: Baseline) -> Report:
        options, info = self.options, self.exported.info
        return Report(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            backbone=options.backbone,
            family=info.family,
            method=info.method,
            prompt_mode=info.prompt_mode,
            n_prompt_tokens=info.n_prompt_tokens,
            task=self.task.name,
            metric=self.task.metric,
            machine=machine,
            workload=Workload(
                rows=len(self.timed),
                length=self.timed.input_ids.shape[1],
                padding=1 - float(self.timed.attention_mask.mean()),
                popsize=options.popsize,
                repeats=options.repeats,
                naive_flops=self.naive_flops,
                device=options.device,
                threads=options.threads,
                k_shot=options.k_shot,
                test_rows=len(self.tested),
                prompt="tuned" if options.tune else "random",
                seed=SEED,
            ),
            baseline=steady,
            rows=[lane.row for lane in self.lanes],
            versions=installed_versions(),
        )


def set_speed(lane: Lane, eager: list[float], naive_flops: int, fp32_rate: float) -> None:
    """Fill in what follows from the timed calls."""
    if not lane.seconds:
        return
    row = lane.row
    row.ms_median, row.ms_p90, row.ms_p99 = percentiles(lane.seconds)
    row.candidates_per_second = 1000 / row.ms_median
    row.speedup = percentiles(eager)[0] / row.ms_median
    row.matrix_share = naive_flops * row.candidates_per_second / (fp32_rate * 1e9)
