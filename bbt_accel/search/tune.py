"""Tuning: search for a soft prompt for a task, and save it as a run folder."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np

import bbt_accel
from bbt_accel.core.batch import Float32
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, engine_spec
from bbt_accel.core.logits import scores_without_search
from bbt_accel.core.objective import Objective
from bbt_accel.core.option_types import check_threads
from bbt_accel.core.settings import PRESETS, Preset, Settings, as_given, check_given, resolve
from bbt_accel.errors import DataError, RunError, UsageError, check_known
from bbt_accel.io.progress import note, progress_bar
from bbt_accel.search.callbacks import Callback, Callbacks, tracker
from bbt_accel.search.evaluator import Evaluator, Job
from bbt_accel.search.history import AGAIN, Generation
from bbt_accel.search.loop import SearchOutcome, search
from bbt_accel.search.progress import SearchProgress
from bbt_accel.search.readout import Readout
from bbt_accel.search.readout_search import ReadoutSearch
from bbt_accel.search.run import (
    Baselines,
    BundleRecord,
    DataRecord,
    EngineRecord,
    ReadoutRecord,
    Run,
    RunInfo,
)
from bbt_accel.search.workers import WorkersEvaluator, check_workers
from bbt_accel.search.workspace import Workspace, find_info
from bbt_accel.tasks.data import rows_digest
from bbt_accel.tasks.encoding import Encoder, encoder_with_demonstrations
from bbt_accel.tasks.splits import FewShot, has_test_rows, load_split
from bbt_accel.tasks.task import Task, load_task

NO_TEST_ROWS = (
    "{} has no test rows, so there will be no test score; --set hold_out=true keeps "
    "the rows that are left over"
)


def tune(
    bundle: str | Path | Bundle,
    task: str | Path | Task,
    *,
    data: str | Path | None = None,
    engine: str = DEFAULT_ENGINE,
    device: str = "cpu",
    threads: int | None = None,
    without: Sequence[str] = (),
    workers: int | None = None,
    ray: str | None = None,
    url: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    track: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    preset: Preset | None = None,
    settings: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Run:
    """Search for a soft prompt for `task` by the method that `bundle` was exported for; returns the
    run.

    bundle: a folder or `Bundle`. task: a built-in name, the path of a task.toml, or a `Task`.
    data: a file of rows, or a folder with train.jsonl (or csv, parquet, …); the task's own data set
    unless given.
    engine, device, threads, without, url: as in `load_engine`.
    settings: any of `Settings`; what is not given comes from `preset`, then from the task's preset,
        in a resumed run from that run. preset: `paper` for the original program's search, whose
        readout is the verbalizer.
    output: the run's folder, ./runs/TASK-METHOD-ENGINE-SEED unless given. It appears when the run
    is complete.
    resume: continue an interrupted or killed run to the same prompt, bit for bit with as many
        threads, or a complete one to a larger budget, as if it had been given at first (else return
        it as it is); start one if there is none.
    overwrite: replace an existing run once the new one is complete; --resume continues one that was
    interrupted.
    workers: evaluate each population in N processes, each with an engine of its own and `threads`
        threads, or an equal share of the cores. ray: address of the Ray cluster to run them on;
        this machine unless given.
    track: trackers that get every generation, by the names in `callbacks.TRACKERS`.
    callbacks: further observers of the search.
    progress: show a progress bar on a terminal, and say on standard error when a run is interrupted
    or was complete.

    Ctrl-C ends the search early, as does SIGTERM where it raises KeyboardInterrupt: the run then
    holds the best prompt so far, and its status is `interrupted`. Before there is one (of the first
    generation, or without a search where the readout is fitted) nothing is saved, and
    KeyboardInterrupt is raised; so it is where `overwrite` leaves the former run. A loss that is
    not finite ends the search likewise, and is then raised. Raises UsageError, TaskError,
    DataError, BundleError, EngineError, NonFiniteLoss, MissingDependency; RunError when the output
    exists or cannot be resumed.
    """
    _check(resume, overwrite, engine, threads, workers, ray, preset)
    told = [*map(tracker, dict.fromkeys(track)), *callbacks]
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
    task = task if isinstance(task, Task) else load_task(task)
    place = engine_spec(engine).device(device)
    record = EngineRecord(
        name=engine,
        device=place,
        threads=threads,
        workers=workers,
        without=sorted(without),
        url=url,
    )
    given = as_given(settings, preset)
    with ExitStack() as held:
        workspace, former, chosen = _resolve(
            held, bundle, task, record, output, resume, overwrite, given
        )
        job, info, notes = _prepare(bundle, task, data, record, chosen, workspace)
        if _continue(former, info, workspace):
            _say("\n".join([*notes, *_other_threads(former, info)]), progress)
            return _run(job, info, workspace, resume, ray, told, progress)
        _say(f"{workspace.final} is complete already; nothing to resume", progress)
        return Run.read(workspace.final)


def _check(
    resume: bool,
    overwrite: bool,
    engine: str,
    threads: int | None,
    workers: int | None,
    ray: str | None,
    preset: str | None,
) -> None:
    """Raises UsageError for arguments that exclude each other or are out of range, and for an
    unknown preset.
    """
    check_threads(threads)
    if preset is not None:
        check_known("preset", preset, PRESETS)
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; choose one")
    if ray is not None and workers is None:
        raise UsageError("--ray is for --workers; give their number with --workers N")
    if workers is not None and engine_spec(engine).remote:
        raise UsageError(f"--workers starts engines of its own; omit it with --engine {engine}")


def _resolve(
    held: ExitStack,
    bundle: Bundle,
    task: Task,
    engine: EngineRecord,
    output: str | Path | None,
    resume: bool,
    overwrite: bool,
    given: Mapping[str, object],
) -> tuple[Workspace, RunInfo | None, Settings]:
    """Where the run is saved, run.json of the one to resume, and the settings; nothing is loaded or
    written yet.

    held: keeps the run's name for this process.
    """
    method = bundle.info.method
    settings = resolve(task.preset(method), given)
    if task.prompt is not None and bundle.info.prompt_init != task.prompt.init:
        raise UsageError(
            f"task {task.name} starts from a text; export the bundle with --prompt-init and the "
            "task file"
        )
    place = Path(output or f"runs/{task.name}-{method}-{engine.name}-{settings.seed}")
    workspace = held.enter_context(Workspace(place))
    former = find_info(workspace.final) if resume else None
    if former is not None:
        settings = resolve(former.settings.model_dump(), given)
    elif not resume:
        workspace.require_free(overwrite)
    check_given(settings, given, bundle.info)
    if settings.fitted:  # whatever the task's preset says
        settings = settings.model_copy(update={"loss": "ce"})
    settings.generations(bundle.info.searched_layers)  # raises before anything is loaded
    if engine.workers is not None:
        check_workers(engine.workers, settings.popsize)
    return workspace, former, settings


def _continue(former: RunInfo | None, info: RunInfo, workspace: Workspace) -> bool:
    """Whether there is anything to do; if so, `info` takes over the choice of the readout, and the
    seconds so far.

    Raises RunError for a run to resume that was of other settings, rows, bundle or engine.
    """
    if former is None:
        return True
    if differences := former.differences(info):
        changed, hint = (
            f"cannot be resumed with another {', '.join(differences)}",
            "tune again with --overwrite",
        )
        if not (workspace.folder.exists() and workspace.final.exists()):
            raise RunError(f"{workspace.final} {changed}; choose another -o, or {hint}")
        found = f"{workspace.folder}, a search that is to replace {workspace.final},"
        raise RunError(f"{found} {changed}; remove it, choose another -o, or {hint}")
    info.readout = ReadoutRecord(name=former.readout.name, tried=former.readout.tried)
    info.seconds = former.seconds
    killed = workspace.folder.exists()  # before the rename
    return (
        former.status != "done" or killed or former.settings != info.settings
    )  # whose budget is larger


def _other_threads(former: RunInfo | None, info: RunInfo) -> list[str]:
    """A note where the rest of a search is computed by other numbers of threads and workers than
    its beginning.
    """
    if former is None:
        return []
    was, now = (
        {"threads": run.engine.threads, "workers": run.engine.workers} for run in (former, info)
    )
    changed = [option for option in was if was[option] != now[option]]
    so_far, then = (" and ".join(f"{o} {of[o] or 'unset'}" for o in changed) for of in (was, now))
    result = "the last bits of a loss may depend on that, and with them the result"
    return [f"so far the search ran with {so_far}, now with {then}; {result}"] if changed else []


def _prepare(
    bundle: Bundle,
    task: Task,
    data: str | Path | None,
    engine: EngineRecord,
    settings: Settings,
    workspace: Workspace,
) -> tuple[Job, RunInfo, list[str]]:
    """Load and encode the rows, and describe the run; and what its user should know before it
    begins.
    """
    folder = None if data is None else Path(data).absolute()
    split = load_split(task, folder, settings)
    digest, dev = rows_digest([*split.train, *split.dev]), split.dev
    encoder, train = encoder_with_demonstrations(bundle, task, split.train, settings)
    packages = {name: version(name) for name in ("cma", "numpy")}
    info = RunInfo(
        task=task,
        label_words=encoder.label_words,
        settings=settings,
        data=DataRecord(
            path=str(folder) if folder else None,
            digest=digest,
            train_rows=len(train),
            dev_rows=len(dev),
        ),
        demonstrations=encoder.demonstrations,
        bundle=BundleRecord.of(bundle, workspace.final),
        engine=engine,
        versions={
            "bbt-accel": bbt_accel.__version__,
            **packages,
            "python": platform.python_version(),
        },
    )
    missing = set(range(task.n_classes)) - {row.label for row in train}
    if settings.fitted and missing:
        shown = len(encoder.demonstrations)
        hint = (
            "add rows or lower demonstrations" if settings.allow_rare_classes else "raise --k-shot"
        )
        raise DataError(
            f"demonstrations={shown} leaves class {min(missing)} without a train row; {hint}"
        )
    objective = Objective(settings.loss, task.metric, task.class_shares)
    rows = encoder.encode([*train, *dev])
    wide = np.concatenate([encoder.label_token_ids, encoder.feature_token_ids(settings.seed)])
    batches = encoder.encode(train), encoder.encode(dev), replace(rows, label_token_ids=wide)
    notes = [] if has_test_rows(folder, settings) else [NO_TEST_ROWS.format(folder)]
    notes += _notes(task, settings, split, encoder)
    return Job(bundle, engine, settings, objective, *batches, encoder.classes), info, notes


def _notes(task: Task, settings: Settings, split: FewShot, encoder: Encoder) -> list[str]:
    """What is assumed of the rows and the label words, where that may be wrong."""
    notes = [
        f"label word {word!r} has several tokens, of which the first, {piece!r}, is read; a word "
        "of one says more"
        for word, piece in encoder.partial_words.items()
    ]
    if split.repeated:
        rows = sum(map(len, split[:3])) + split.repeated
        notes.append(
            f"{split.repeated:,} of {rows:,} rows repeat the text of another and are left out"
        )
    unequal = len({*Counter(row.label for row in split.dev).values()}) > 1
    if settings.fitted and task.class_shares is None and (task.metric == "f1" or unequal):
        what = "classes are assumed as frequent as in the few-shot rows"
        notes.append(f"{what}; if they are not, set the task's class_shares")
    return notes


def _run(
    job: Job,
    info: RunInfo,
    workspace: Workspace,
    resume: bool,
    ray: str | None,
    told: Sequence[Callback],
    progress: bool,
) -> Run:
    """Search, and tell the callbacks, which are closed last."""
    with Callbacks(told) as callbacks:
        run, outcome = _search(job, info, workspace, resume, ray, callbacks, progress)
        if outcome.error:
            held = (
                f"the best prompt of {run.info.calls} calls"
                if run.history
                else "the readout without a search"
            )
            _say(f"{run.path} holds {held}", progress)
            raise outcome.error
        callbacks.end(run)
    if outcome.interrupted:
        _say(
            f"interrupted; {run.path} holds the best prompt so far; {AGAIN} continues the search",
            progress,
        )
    return run


def _search(
    job: Job,
    info: RunInfo,
    workspace: Workspace,
    resume: bool,
    ray: str | None,
    callbacks: Callbacks,
    progress: bool,
) -> tuple[Run, SearchOutcome]:
    """Load the engine, search in the workspace, and complete the run."""
    settings, bundle = job.settings, job.bundle
    calls = settings.calls(settings.generations(bundle.info.searched_layers))
    with ExitStack() as stack:
        evaluator = stack.enter_context(_evaluator(job, ray, progress))
        info.engine.versions = evaluator.versions()
        history = stack.enter_context(workspace.open(info, resume))
        bar = stack.enter_context(SearchProgress(calls, progress))
        callbacks.start(info, workspace.folder)

        def observe(generation: Generation) -> None:
            bar(generation)
            callbacks(generation)

        start = bundle.start_prompt()
        if settings.fitted:
            started = perf_counter()
            readouts = ReadoutSearch(evaluator, job, start, info.readout)
            info.readout = ReadoutRecord(name=readouts.name, tried=readouts.tried)
            workspace.update(info)  # a search that is killed goes on with this readout
            info.baselines = _baselines(
                job, readouts.at_start.outputs["label_logits"][len(job.train) :]
            )
            outcome = search(
                evaluator, bundle, settings, history, observe, readouts.dev, readouts.start
            )
            found = readouts.finish(outcome, searched=bool(len(history)))
            info.seconds += perf_counter() - started
        else:
            info.baselines = _baselines(job, evaluator.dev_logits(start))
            outcome = search(evaluator, bundle, settings, history, observe)
            found = outcome, Readout("verbalizer", job.classes), ReadoutRecord()
        if outcome.interrupted and workspace.keeps_former(info, history):
            again = (
                f"{AGAIN} continues the new search"
                if len(history)
                else "nothing is saved of the new search"
            )
            _say(
                f"{workspace.final} is still the former run{'' if outcome.error else f'; {again}'}",
                progress,
            )
            workspace.update(info)
            raise outcome.error or KeyboardInterrupt
    return workspace.finish(info, *found, lambda line: _say(line, progress)), outcome


def _baselines(job: Job, label_logits: Float32) -> Baselines:
    """Of the dev rows, from their label logits (N, M or more) without a prompt."""
    scores = scores_without_search(label_logits, job.classes)
    return Baselines.of(scores, job.dev.targets, job.objective.metric)


def _evaluator(job: Job, ray: str | None, progress: bool) -> Evaluator:
    if (workers := job.engine.workers) is None:
        return job.evaluator()
    with progress_bar(f"starting {workers} workers", progress):
        return WorkersEvaluator(workers, ray or "local", job, lambda line: _say(line, progress))


def _say(line: str, progress: bool) -> None:
    if progress and line:
        note(line)
