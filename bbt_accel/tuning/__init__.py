"""Tuning: search for a soft prompt for a task, and save it as a run folder."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import bbt_accel
from bbt_accel.bundle import Bundle
from bbt_accel.data import load_few_shot
from bbt_accel.encoding import Encoder
from bbt_accel.engine_specs import engine_spec
from bbt_accel.errors import RunError, UsageError
from bbt_accel.history import Generation
from bbt_accel.objective import Objective
from bbt_accel.progress import SearchProgress, progress_bar
from bbt_accel.run import EVENTS, BundleRecord, DataRecord, EngineRecord, Run, RunInfo
from bbt_accel.settings import Settings, resolve
from bbt_accel.tasks import Task, load_task
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.events import Events
from bbt_accel.tuning.search import Outcome, search
from bbt_accel.tuning.workers import WorkersEvaluator, check_workers
from bbt_accel.tuning.workspace import Workspace


def tune(
    bundle: str | Path | Bundle,
    task: str | Path | Task,
    *,
    data: str | Path | None = None,
    engine: str = "ort",
    device: str = "cpu",
    threads: int | None = None,
    without: Sequence[str] = (),
    workers: int | None = None,
    ray: str | None = None,
    url: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    settings: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Run:
    """Search for a soft prompt for `task` by the method that `bundle` was exported for; returns the run.

    data: a folder with train.jsonl (or csv, parquet); the task's own data set unless given.
    engine, device, threads, without, url: as in `load_engine`.
    settings: any of `Settings`; what is not given comes from the task's preset, in a resumed run from that run.
    output: the run's folder, ./runs/TASK-METHOD-ENGINE-SEED unless given. It appears when the run is complete.
    resume: continue an interrupted or killed run to the same prompt, bit for bit; start one if there is none, and
        return a complete run as it is.
    overwrite: replace an existing run once the new one is complete.
    workers: evaluate each population in N processes, each with an engine of its own and `threads` threads, or an equal
        share of the cores. ray: address of the Ray cluster to run them on; this machine unless given.
    progress: show a progress bar on a terminal, and say on standard error when a run is interrupted or was complete.

    Ctrl-C ends the search early: the run then holds the best prompt so far, and its status is `interrupted`. Before
    the first generation has ended nothing is saved, and KeyboardInterrupt is raised.
    Raises UsageError, TaskError, DataError, BundleError, EngineError, NonFiniteLoss; RunError when the output exists
    or cannot be resumed.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; choose one")
    if ray is not None and workers is None:
        raise UsageError("--ray is for --workers; give their number with --workers N")
    place = engine_spec(engine).device(device)
    record = EngineRecord(name=engine, device=place, threads=threads, workers=workers, without=sorted(without), url=url)
    plan = _resolve(bundle, task, data, record, output, resume, overwrite, settings or {})
    job, info = _prepare(plan)
    if plan.former is not None and plan.former.status == "done" and plan.workspace.is_complete():
        if progress:
            print(f"{plan.workspace.final} is complete already; nothing to resume", file=sys.stderr)
        return Run.read(plan.workspace.final)
    return _run(plan, job, info, ray, tensorboard, progress)


@dataclass(frozen=True)
class _Plan:
    """A resolved search: its inputs, and where it is saved; nothing is loaded or written yet."""

    bundle: Bundle
    task: Task
    data: Path | None
    engine: EngineRecord
    settings: Settings
    workspace: Workspace
    former: RunInfo | None
    """Of the run to resume; None for a new run."""
    resume: bool


def _resolve(
    bundle: str | Path | Bundle,
    task: str | Path | Task,
    data: str | Path | None,
    engine: EngineRecord,
    output: str | Path | None,
    resume: bool,
    overwrite: bool,
    settings: Mapping[str, object],
) -> _Plan:
    """Read bundle and task, find the run to resume, and validate the settings."""
    if engine.workers is not None and engine.name == "remote":
        raise UsageError("--workers starts engines of its own; omit it with --engine remote")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
    task = task if isinstance(task, Task) else load_task(task)
    method = bundle.info.method
    chosen = resolve(task.preset(method), settings)
    default = Path("runs") / f"{task.name}-{method}-{engine.name}-{chosen.seed}"
    workspace = Workspace(default if output is None else Path(output))
    former = workspace.find() if resume else None
    if former is not None:
        chosen = resolve(former.settings.model_dump(), settings)
    elif not resume:
        workspace.require_free(overwrite)
    chosen.generations(method, bundle.info.n_layers)  # raises before anything is loaded
    if engine.workers is not None:
        check_workers(engine.workers, chosen.popsize)
    return _Plan(bundle, task, None if data is None else Path(data), engine, chosen, workspace, former, resume)


def _prepare(plan: _Plan) -> tuple[Job, RunInfo]:
    """Load and encode the rows, and describe the run. Raises RunError when the former run was another."""
    settings, task = plan.settings, plan.task
    train, dev = load_few_shot(task, plan.data, settings)
    encoder = Encoder(plan.bundle, task)
    info = RunInfo(
        task=task,
        label_words=encoder.label_words,
        settings=settings,
        data=DataRecord.of(plan.data, train, dev),
        bundle=BundleRecord.of(plan.bundle, plan.workspace.final),
        engine=plan.engine,
        versions=_versions(),
    )
    if plan.former is not None and (differences := plan.former.differences(info)):
        raise RunError(f"{plan.workspace.final} cannot be resumed with another {', '.join(differences)}")
    objective = Objective(settings.loss, task.metric)
    return Job(plan.bundle, plan.engine, settings, objective, encoder.encode(train), encoder.encode(dev)), info


def _run(plan: _Plan, job: Job, info: RunInfo, ray: str | None, tensorboard: bool, progress: bool) -> Run:
    """Load the engine, search, and complete the run."""
    with _evaluator(job, ray, progress) as evaluator:
        info.engine.versions = evaluator.versions()
        outcome = _search(plan, info, evaluator, tensorboard, progress)
    run = plan.workspace.finish(info, outcome)
    if progress and outcome.interrupted:
        print(f"interrupted; {run.path} holds the best prompt so far, --resume continues the search", file=sys.stderr)
    return run


def _evaluator(job: Job, ray: str | None, progress: bool) -> Evaluator:
    workers = job.engine.workers
    if workers is None:
        return job.evaluator()

    def report(line: str) -> None:
        if progress:
            print(line, file=sys.stderr)

    with progress_bar(f"starting {workers} workers", progress):
        return WorkersEvaluator(workers, ray or "local", job, report)


def _search(plan: _Plan, info: RunInfo, evaluator: Evaluator, tensorboard: bool, progress: bool) -> Outcome:
    """The search, in the workspace, with a progress bar and TensorBoard events."""
    settings, bundle = info.settings, plan.bundle.info
    calls = settings.generations(bundle.method, bundle.n_layers) * settings.popsize
    with (
        plan.workspace.open(info, plan.resume) as history,
        SearchProgress(calls, progress) as bar,
        ExitStack() as stack,
    ):
        events = stack.enter_context(Events(plan.workspace.folder / EVENTS)) if tensorboard else None

        def observe(generation: Generation) -> None:
            bar(generation)
            if events is not None:
                events(generation)

        return search(evaluator, bundle, settings, history, observe)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("cma", "numpy")}
    return {"bbt-accel": bbt_accel.__version__, **packages, "python": platform.python_version()}
