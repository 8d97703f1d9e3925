"""Accuracy per forward pass: every readout, the searches, and training by gradients, on the same
few rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bbt_accel import __version__
from bbt_accel.benchmarks import steps
from bbt_accel.benchmarks.compare_report import (
    ENSEMBLE,
    CompareReport,
    Score,
    draw,
    make_report,
    markdown,
)
from bbt_accel.benchmarks.options import (
    DECISIVE,
    REFERENCES,
    SEARCHES,
    CompareOptions,
    bundle_of,
    check_reference,
    method_of,
    naming,
    parse_contender,
    readout_of,
)
from bbt_accel.benchmarks.sweep.grid import check_names
from bbt_accel.core.backbone_names import backbone_digest
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import engine_spec, kind_of, local_engine
from bbt_accel.core.objective import Objective, most_frequent
from bbt_accel.core.settings import FITTED, check_given, resolve
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io.files import (
    fingerprint,
    remove_leftovers,
    reserved,
    reserved_folder,
    write_atomically,
)
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.pools import Pool, PoolJob, open_pool
from bbt_accel.io.reporting import now, write_report
from bbt_accel.predict.inference import class_scores, scores_before
from bbt_accel.search.run import Run
from bbt_accel.search.tune import tune
from bbt_accel.tasks.data import labels, rows_digest, task_folders
from bbt_accel.tasks.encoding import Encoder, encoder_with_demonstrations
from bbt_accel.tasks.splits import check_rows, load_few_shot
from bbt_accel.tasks.task import Task, absolute_file, load_task

TRIALS, BUNDLES, RUNS = (
    "trials",
    "bundles",
    "runs",
)  # folders: of finished trials, of bundles, of runs


def run_compare(
    tasks: Sequence[str],
    output: str | Path,
    options: CompareOptions,
    *,
    ray: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> CompareReport:
    """Compare contenders on tasks, and write report.json, report.md and report.png into the folder
    `output`.

    resume: keep the trials that are there. ray: address of a Ray cluster to run the trials on.
    A trial that fails is a line of the report, which is written after each, and also when Ctrl-C
    ends the comparison. Raises UsageError, TaskError and DataError for what does not exist,
    BbtError when `output` exists.
    """
    folder = Path(output).absolute()
    if len(set(tasks)) < len(tasks):
        raise UsageError("a task is listed twice; list each once")
    for contender in options.contenders:
        parse_contender(contender)
    if options.reference is not None:
        check_reference(options.reference, options.contenders)
    local_engine(options.engine, "compare").target(options.precision)
    found = {path: load_task(path) for path in tasks}
    check_names("tasks", {path: task.name for path, task in found.items()})
    named = {
        task.name: absolute_file(path) for path, task in found.items()
    }  # a trial on Ray runs elsewhere
    folders = task_folders(options.data, list(named))
    for task in found.values():  # fail before the bundles are exported, not in every trial
        check_searches(task, options)
        if (data := folders[task.name]) is not None:
            check_rows(task, Path(data), resolve({"k_shot": options.k_shot}))
    with reserved(folder):
        device = kind_of(engine_spec(options.engine).device("cpu"))
        with closing(open_pool(ray, options.jobs, options.threads, device, progress)) as pool:
            _open(folder, options, resume)
            jobs = list(
                _jobs(
                    folder,
                    named,
                    folders,
                    options,
                    prepare(folder / BUNDLES, options),
                    pool.threads,
                )
            )
            facts = {
                "command": options.command_line(tasks, Path(output)),
                "machine": describe_machine()["cpu"],
            }
            return _run(folder, jobs, pool, progress, facts, options.reference or "auto")


def _run(
    folder: Path,
    jobs: Sequence[PoolJob],
    pool: Pool,
    progress: bool,
    facts: dict[str, str],
    reference: str,
) -> CompareReport:
    """The report of all trials, those that were done before included."""
    folders = {job.arguments["data"] for job in jobs}
    rows = {data: "the task's own" if data is None else fingerprint(data) for data in folders}
    wanted = {job.name: asked(job, rows[job.arguments["data"]]) for job in jobs}
    done = {
        name: found
        for name, what in wanted.items()
        if (found := read_trial(folder, name, what)) is not None
    }
    failures = dict[str, str]()

    def write(plot: bool) -> CompareReport:
        scores = [score for job in jobs for score in done.get(job.name, [])]
        report = make_report(scores, failures, facts | {"date": now()}, reference)
        drawn = partial(draw, report=report) if scores and plot else None
        write_report(folder, report, markdown(report, drawn is not None), drawn)
        return report

    try:
        for name, reply in pool.run(
            [job for job in jobs if job.name not in done], len(done), progress
        ):
            if "error" in reply:
                failures[name] = " ".join(reply["message"].split())
            else:
                done[name] = [Score.model_validate(value) for value in reply["value"]]
                content = {"asked": wanted[name], "scores": reply["value"]}
                write_atomically(
                    folder / TRIALS / f"{name}.json", json.dumps(content, indent=1).encode() + b"\n"
                )
            write(plot=False)
    except KeyboardInterrupt:
        write(plot=True)
        raise
    return write(plot=True)


def _open(folder: Path, options: CompareOptions, resume: bool) -> None:
    """Make the folder with its bundles in one step, so that whatever is left of a comparison can be
    resumed.
    """
    if not folder.exists():
        with reserved_folder(folder) as new:
            (new / TRIALS).mkdir()
            prepare(new / BUNDLES, options)
    elif not (folder / TRIALS).is_dir():
        raise BbtError(f"{folder} exists already and is not a comparison; choose another -o")
    elif not resume:
        raise BbtError(f"{folder} exists already; use --resume or choose another -o")
    for place in (folder, folder / TRIALS):
        remove_leftovers(place)


def _jobs(
    folder: Path,
    tasks: Mapping[str, str],
    data: Mapping[str, str | None],
    options: CompareOptions,
    bundles: dict[str, str],
    threads: int,
) -> Iterator[PoolJob]:
    """A job for each task, contender and seed. tasks: name → what `load_task` takes. data: name →
    its rows.
    """
    shared = {
        "options": options.model_dump(mode="json"),
        "threads": threads,
        "work": str(folder / RUNS),
    }
    for (name, task), contender, seed in product(tasks.items(), options.contenders, options.seeds):
        own = {
            "contender": contender,
            "bundle": bundles[bundle_of(contender)],
            "task": task,
            "data": data[name],
            "seed": seed,
        }
        yield PoolJob(f"{name}-{contender.replace(':', ',')}-{seed}", contend, own | shared)


def prepare(work: Path, options: CompareOptions) -> dict[str, str]:
    """The bundles that the contenders read, by `bundle_of`: in the engine's precision, or as
    exported.
    """
    spec, paths = engine_spec(options.engine), dict[str, str]()
    checkpoint = f"{Path(options.backbone).name}-{backbone_digest(options.backbone)[:8]}"
    for name in map(bundle_of, options.contenders):
        method = name.split()[0]
        place = work / f"{checkpoint}-{options.n_prompt_tokens}" / method
        place.mkdir(parents=True, exist_ok=True)
        made = steps.Bundles(
            place, options.backbone, {"method": method, "n_prompt_tokens": options.n_prompt_tokens}
        )
        paths[name] = str(
            made.bundle(spec, options.precision) if name == method else made.exported()
        )
    return paths


def check_searches(task: Task, options: CompareOptions) -> None:
    """Raises UsageError for settings that exclude each other, and for a search that no budget pays
    for.
    """
    for contender in options.contenders:
        name, given = parse_contender(contender)
        if name in SEARCHES:
            method = method_of(name)
            largest = {"readout": readout_of(name), "budget": max(options.budgets)}
            settings = resolve(task.preset(method), given, largest)
            with naming(contender):
                check_given(settings, given)
            settings.check_budget()


def asked(job: PoolJob, data: str) -> dict[str, Any]:
    """What decides the scores of a trial: options, what the files that it reads hold, and the
    version of bbt-accel.

    data: fingerprint of the rows.
    """
    given, task = job.arguments, load_task(job.arguments["task"])
    searches = parse_contender(given["contender"])[0] in SEARCHES
    options = {
        name: given["options"][name] for name in (*DECISIVE, *(["budgets"] if searches else []))
    }
    own = {
        "contender": given["contender"],
        "seed": given["seed"],
        "task": task.model_dump(mode="json"),
    }
    bundle = Bundle.read(given["bundle"], verify=False).digest
    return options | own | {"version": __version__, "data": data, "bundle": bundle}


def read_trial(folder: Path, name: str, wanted: dict[str, Any]) -> list[Score] | None:
    """The scores of a trial that was asked for the same; None where there is none, or its file is
    damaged.
    """
    file = folder / TRIALS / f"{name}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return (
            [Score.model_validate(value) for value in found["scores"]]
            if found["asked"] == wanted
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def contend(
    contender: str,
    task: str,
    data: str | None,
    seed: int,
    work: str,
    bundle: str,
    options: dict[str, Any],
    threads: int,
) -> list[dict[str, Any]]:
    """One contender on one task and seed: its scores at every budget, as JSON.

    work: folder of its runs. bundle: that of `bundle_of`.
    """
    trial = CompareTrial(
        task, data, seed, Path(work), bundle, CompareOptions.model_validate(options), threads
    )
    if contender == "readouts":
        scores = trial.readouts()
    else:
        scores = trial.reference(contender) if contender in REFERENCES else trial.search(contender)
    return [score.model_dump(mode="json") for score in scores]


class CompareTrial:
    """The rows of a task and a seed, and how each contender is scored on them."""

    def __init__(
        self,
        task: str,
        data: str | None,
        seed: int,
        work: Path,
        bundle: str,
        options: CompareOptions,
        threads: int,
    ) -> None:
        self.task, self.data, self.seed, self.bundle = load_task(task), data, seed, bundle
        self.work, self.options, self.threads = work, options, threads
        self.objective = Objective("ce", self.task.metric, self.task.class_shares)
        folder = None if data is None else Path(data)
        self.test = steps.compared_rows(self.task, folder, options.test_rows)
        self.test_digest = rows_digest(self.test)
        self.settings = resolve(self.task.preset("bbt"), {"k_shot": options.k_shot, "seed": seed})
        self.train, self.dev = load_few_shot(self.task, folder, self.settings)

    def readouts(self) -> list[Score]:
        """Every readout without a search; what takes no labels; and the most frequent class of the
        test rows.
        """
        with load_engine(self.bundle, self.options.engine, threads=self.threads) as engine:
            encoder, _ = encoder_with_demonstrations(
                engine.bundle, self.task, self.train, self.settings
            )
            plain, batch_calibrated = scores_before(engine, encoder, self.test)
        frequent = most_frequent(labels(self.test), self.task.n_classes, self.task.metric)
        majority = np.eye(self.task.n_classes)[frequent]
        found = [self.measured("majority class", 0, np.tile(majority, (len(self.test), 1)), 0.0)]
        found.append(self.measured("without_prompt", 0, plain, 0.0))
        found.append(self.measured("batch_calibrated", 0, batch_calibrated, 0.0))
        return found + [
            self.score(name, *self.tune(f"readouts:{name}", name, 1)) for name in FITTED
        ]

    def search(self, contender: str) -> list[Score]:
        """For each budget that it can spend: the original search by a method, or one with a fitted
        readout.

        One search: with each budget it continues where the one before it ended. Its seconds are
        those from the start.
        """
        name, given = parse_contender(contender)
        readout = readout_of(name)
        info = Bundle.read(self.bundle, verify=False).info
        scores, total = list[Score](), 0.0
        for budget in sorted({*([1] if name == "auto" else []), *self.options.budgets}):
            settings = resolve(
                self.task.preset(info.method), given, {"readout": readout, "budget": budget}
            )
            turn = settings.turn(info.searched_layers)
            if settings.fitted or budget >= turn:
                run, seconds = self.tune(contender, readout, budget, given, resume=bool(scores))
                total += seconds
                scores.append(self.score(contender, run, total, budget))
        if not scores:
            raise UsageError(
                f"{contender} needs {turn} calls for one generation per layer; give larger "
                "--budgets"
            )
        return scores

    def reference(self, contender: str) -> list[Score]:
        import torch

        from bbt_accel.benchmarks import references

        torch.set_num_threads(self.threads)
        if contender == "embeddings":
            split = references.Split(self.train, self.dev, self.test)
            one = references.embeddings(split, self.task, self.seed, self.objective)
            return [self.measured(contender, one.calls, one.scores, one.seconds)]
        bundle = Bundle.read(self.bundle)
        encoder, train = encoder_with_demonstrations(bundle, self.task, self.train, self.settings)
        started = perf_counter()
        split = references.Split(train, self.dev, self.test)
        trainer = references.Trainer(bundle, encoder, split, self.seed, self.objective)
        loading = perf_counter() - started
        scores = list[Score]()
        for found in references.TRAINED[contender](trainer):
            calls, seconds = found.calls, loading + found.seconds
            scores.append(self.measured(contender, calls, found.scores, seconds, budget=calls))
            fitted, seconds = found.ensemble, seconds + found.fitting
            scores.append(
                self.measured(f"{contender}{ENSEMBLE}", calls + 1, fitted, seconds, budget=calls)
            )
        return scores

    def tune(
        self,
        contender: str,
        readout: str,
        budget: int,
        given: Mapping[str, str] = {},
        resume: bool = False,
    ) -> tuple[Run, float]:
        """A run, and its seconds. given: further settings. resume: continue the contender's run."""
        own = {
            "seed": self.seed,
            "k_shot": self.options.k_shot,
            "readout": readout,
            "budget": budget,
        }
        place = self.work / f"{self.task.name}-{contender.replace(':', ',')}-{self.seed}"
        started = perf_counter()
        where: dict[str, Any] = {
            "engine": self.options.engine,
            "threads": self.threads,
            "data": self.data,
        }
        again: dict[str, Any] = {"resume": resume, "overwrite": not resume, "progress": False}
        run = tune(
            self.bundle, self.task, output=place, settings={**given, **own}, **where, **again
        )
        return run, perf_counter() - started

    def score(self, name: str, run: Run, seconds: float, budget: int | None = None) -> Score:
        with load_engine(run.open_bundle(), self.options.engine, threads=self.threads) as engine:
            encoder = Encoder(engine.bundle, self.task, run.info.demonstrations)
            scores = class_scores(engine, encoder, self.test, run)
        readout = run.info.readout
        chosen = readout.name + (", searched" if readout.searched else "")
        return self.measured(
            name, run.info.calls, scores, seconds, budget, chosen if readout.tried else None
        )

    def measured(
        self,
        name: str,
        calls: int,
        scores: Any,
        seconds: float,
        budget: int | None = None,
        chosen: str | None = None,
    ) -> Score:
        _, metric = self.objective.score(scores[None], labels(self.test))
        return Score(
            contender=name,
            task=self.task.name,
            metric=self.task.metric,
            seed=self.seed,
            budget=budget,
            calls=calls,
            score=float(metric[0]),
            seconds=seconds,
            peak_mib=steps.peak_mib(),
            chosen=chosen,
            test_rows=self.test_digest,
        )
