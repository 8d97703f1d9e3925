"""Tuning: search a prompt for a task, and keep it as a run folder."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import bbt_accel
from bbt_accel.bundle import Bundle
from bbt_accel.data import few_shot, load_rows
from bbt_accel.display import busy
from bbt_accel.encoding import Encoder
from bbt_accel.engines.registry import place
from bbt_accel.errors import RunError, UsageError
from bbt_accel.history import Generation, History
from bbt_accel.objective import Objective
from bbt_accel.run import EVENTS, HISTORY, BundleRecord, DataRecord, EngineRecord, Run, RunInfo
from bbt_accel.settings import resolve
from bbt_accel.tasks import Task, load_task
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.events import Events
from bbt_accel.tuning.progress import SearchProgress
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
    """Search a soft prompt for `task` by the method that `bundle` was exported for; returns the run.

    url: of the server, for the engine `remote`.
    settings: any of `Settings`; the task's presets hold for what is not given (the stored ones in a resumed run).
    output: the run's folder, ./runs/TASK-METHOD-ENGINE-SEED unless given. It appears when the run is whole.
    resume: continue an interrupted or killed run to the same prompt, bit for bit; start one if there is none, and
        return a run that is done as it is.
    overwrite: replace an existing run, once the new one is whole.
    workers: divide each population among so many processes, each with an engine of its own and `threads`, or its
        share of the cores. ray: the address of a Ray cluster to run them on; this machine unless given.
    progress: on a terminal, show a bar; and say on standard error when a run is interrupted or was done already.

    Ctrl-C ends the search early: the run then holds the best prompt so far and its status is `interrupted`. Before
    the first generation is done nothing is kept, and KeyboardInterrupt rises.
    Raises UsageError, TaskError, DataError, BundleError, EngineError, NonFiniteLoss; RunError when the output exists
    or cannot be resumed.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; choose one")
    if workers is not None and engine == "remote":
        raise UsageError("--workers divide the work among engines of their own; a server divides its own: leave it out")
    if ray is not None and workers is None:
        raise UsageError("--ray says where workers run; say how many by --workers")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
    task = task if isinstance(task, Task) else load_task(task)
    data = Path(data) if data is not None else None
    chosen = resolve(task.preset(bundle.info.method), settings or {})
    name = f"{task.name}-{bundle.info.method}-{engine}-{chosen.seed}"
    space = Workspace(Path(output) if output is not None else Path("runs") / name)
    former = space.found() if resume else None
    if former is not None:
        chosen = resolve(former.settings.model_dump(), settings or {})
    elif not resume:
        space.require_free(overwrite)
    chosen.generations(bundle.info.method, bundle.info.n_layers)  # raises before anything is loaded
    if workers is not None:
        check_workers(workers, chosen.popsize)

    train, dev = few_shot(load_rows(task, "train", data), task.n_classes, chosen.k_shot, chosen.seed)
    encoder = Encoder(bundle, task)
    info = RunInfo(
        task=task,
        label_words=encoder.label_words,
        settings=chosen,
        data=DataRecord.of(data, train, dev),
        bundle=BundleRecord.of(bundle, space.final),
        engine=EngineRecord(
            name=engine,
            device=place(engine, device),
            threads=threads,
            workers=workers,
            without=sorted(without),
            url=url,
        ),
        versions=_versions(),
    )
    if former is not None and (differences := former.differences(info)):
        raise RunError(f"{space.final} cannot be resumed, it was made with other {', '.join(differences)}")
    if former is not None and former.status == "done" and space.is_whole():
        if progress:
            print(f"{space.final} is done already; there is nothing to resume", file=sys.stderr)
        return Run.read(space.final)
    job = Job(
        bundle, info.engine, chosen, Objective(chosen.loss, task.metric), encoder.encode(train), encoder.encode(dev)
    )
    if workers is None:
        evaluator: Evaluator = job.evaluator()
    else:
        with busy(f"starting {workers} workers", progress):
            evaluator = WorkersEvaluator(workers, ray or "local", job, _say if progress else lambda line: None)
    with evaluator:
        info.engine.versions = evaluator.versions()
        space.open(info, resume)
        outcome = _search(space, info, evaluator, bundle, tensorboard, progress)
    run = space.finish(info, outcome)
    if progress and outcome.interrupted:
        print(f"interrupted; {run.path} holds the best prompt so far, --resume goes on from here", file=sys.stderr)
    return run


def _search(
    space: Workspace, info: RunInfo, evaluator: Evaluator, bundle: Bundle, tensorboard: bool, progress: bool
) -> Outcome:
    """The search in the open workspace, watched; leaves no workspace behind when not a generation was done."""
    calls = info.settings.generations(bundle.info.method, bundle.info.n_layers) * info.settings.popsize
    with History(space.folder / HISTORY) as history, SearchProgress(calls, progress) as bar, ExitStack() as stack:
        try:
            events = stack.enter_context(Events(space.folder / EVENTS)) if tensorboard else None

            def observe(generation: Generation) -> None:
                bar(generation)
                if events is not None:
                    events(generation)

            return search(evaluator, bundle.info, info.settings, history, observe)
        except OSError as error:
            raise RunError(f"cannot write {space.folder} ({error.strerror}); free some space, then --resume") from error
        finally:
            if not len(history):
                space.discard()


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("cma", "numpy")}
    return {"bbt-accel": bbt_accel.__version__, **packages, "python": platform.python_version()}
