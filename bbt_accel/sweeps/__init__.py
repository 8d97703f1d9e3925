"""Sweeps: tasks × bundles × engines × seeds, tuned, scored on the test rows, and put into one table."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbt_accel.display import busy
from bbt_accel.engines.registry import place
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.run import write_whole
from bbt_accel.sweeps.markdown import markdown
from bbt_accel.sweeps.plan import FOLDER, Sweep, Trial, absolute, preset_names, read_sweep
from bbt_accel.sweeps.plot import draw_sweep
from bbt_accel.sweeps.pools import Pool, Processes, RayTasks
from bbt_accel.sweeps.progress import SweepProgress
from bbt_accel.sweeps.report import Report, make_report
from bbt_accel.sweeps.trial import Result, read_result

SWEEP, TRIALS, JSON, TABLE, PLOT = "sweep.json", "trials", "report.json", "report.md", "report.png"


def run_sweep(
    output: str | Path,
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """Tune and score every combination, and write report.json, report.md and report.png into the folder `output`.

    config: a TOML file of `Sweep`; or preset: the name of one that is shipped. given: fields of `Sweep` that replace
        what the file says. resume: go on with the sweep in `output`: what is done is not run again, what was begun is
        continued; without config and preset it is the same sweep as before, apart from what is given.
    jobs: trials at a time, one unless given. threads: CPU threads of each, its share of the cores unless given.
    ray: the address of a Ray cluster to run on, or `local`; each trial asks for its CPUs, or for a GPU.
    progress: show a bar on a terminal.

    A trial that fails is a row of the report. Ctrl-C ends the sweep early: the report then holds what is done.
    Raises UsageError, TaskError and BundleError for what cannot be, BbtError when `output` exists or is no sweep.
    """
    folder = Path(output)
    sweep = absolute(read_sweep(_source(folder, config, preset, resume), given or {}))
    trials = sweep.trials()
    device = "cuda" if any(place(name, sweep.device) == "cuda" for name in sweep.engines) else "cpu"
    with _pool(ray, jobs, threads, device, progress) as pool:
        try:
            (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BbtError(f"cannot write to {folder} ({error.strerror}); choose another -o") from None
        write_whole(folder / SWEEP, sweep.model_dump_json(indent=1).encode() + b"\n")
        return _run(folder.absolute(), sweep, trials, pool, progress)


def _pool(ray: str | None, jobs: int | None, threads: int | None, device: str, progress: bool) -> Pool:
    if ray is None:
        return Processes(jobs, threads)
    with busy("connecting to Ray", progress):
        return RayTasks(ray, jobs, threads, device)


def _source(folder: Path, config: str | Path | None, preset: str | None, resume: bool) -> Path | None:
    """The file that says what to do, if one does."""
    if config is not None and preset is not None:
        raise UsageError("--config and --preset exclude each other; choose one")
    if preset is not None and preset not in preset_names():
        raise UsageError(f"there is no preset {preset!r}; they are {', '.join(preset_names())}")
    stored = folder / SWEEP
    if folder.exists() and not (resume and stored.is_file()):
        hint = "it is no sweep" if not stored.is_file() else "use --resume to go on with it"
        raise BbtError(f"{folder} exists already and {hint}; or choose another -o")
    if config is not None:
        return Path(config)
    if preset is not None:
        return FOLDER / f"{preset}.toml"
    return stored if stored.is_file() else None


def _run(folder: Path, sweep: Sweep, trials: list[Trial], pool: Pool, progress: bool) -> Report:
    places = {trial.name: folder / TRIALS / trial.name for trial in trials}
    found = {trial.name: read_result(trial, places[trial.name]) for trial in trials}
    results = {name: result for name, result in found.items() if result is not None}
    failures: dict[str, str] = {}
    waiting = deque(trial for trial in trials if trial.name not in results)
    interrupted = False
    running = 0
    with SweepProgress(len(trials), len(results), progress) as bar:
        try:
            while waiting or running:
                while waiting and running < pool.jobs:
                    trial = waiting.popleft()
                    places[trial.name].mkdir(exist_ok=True)
                    arguments = {"trial": trial.model_dump(mode="json"), "folder": str(places[trial.name])}
                    pool.start(trial.name, {**arguments, "threads": pool.threads})
                    running += 1
                    bar.start(trial.name)
                name, answer = pool.wait()
                running -= 1
                if "error" in answer:
                    failures[name] = " ".join(answer["message"].split())
                else:
                    results[name] = Result.model_validate(answer["value"])
                bar.end(name, name in failures)
                _write(folder, make_report(sweep, trials, results, failures), plot=False)
        except KeyboardInterrupt:
            interrupted = True
    report = make_report(sweep, trials, results, failures, interrupted)
    _write(folder, report, plot=True)
    return report


def _write(folder: Path, report: Report, plot: bool) -> None:
    if plot:
        draw_sweep(folder / f".{PLOT}", report)
        (folder / f".{PLOT}").replace(folder / PLOT)
    write_whole(folder / JSON, report.model_dump_json(indent=1).encode() + b"\n")
    write_whole(folder / TABLE, markdown(report, PLOT if plot else None).encode())
