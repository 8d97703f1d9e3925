"""Running a sweep: every trial that is not done yet, then the cross-evaluation; the report after
each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bbt_accel.benchmarks.sweep.cross_evaluation import cross_evaluate
from bbt_accel.benchmarks.sweep.grid import PRESETS, RUN, Sweep, Trial, preset_names, read_sweep
from bbt_accel.benchmarks.sweep.rendering import draw, markdown
from bbt_accel.benchmarks.sweep.report import SweepReport, TrialResult, make_report
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import engine_spec, index_of, kind_of
from bbt_accel.core.settings import without_effect
from bbt_accel.errors import BbtError, RunError, UsageError, check_known
from bbt_accel.io.files import remove_leftovers, reserved, reserved_folder, write_atomically
from bbt_accel.io.pools import Pool, PoolJob, open_pool
from bbt_accel.io.reporting import write_report
from bbt_accel.predict.inference import evaluate
from bbt_accel.search.tune import tune
from bbt_accel.tasks.splits import check_rows

SWEEP, TRIALS, SCORE = "sweep.json", "trials", "score.json"


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
) -> SweepReport:
    """Tune and score every combination, and write report.json, report.md and report.png into the
    folder `output`.

    config: a TOML file of `Sweep`; or preset: the name of a shipped one. given: fields of `Sweep`
        that override the file's. resume: continue the sweep in `output`: finished trials are kept,
        interrupted ones resumed; without config and preset it is the same sweep as before, apart
        from `given`.
    jobs: trials at a time (default 1). threads: CPU threads of each (default: its share of the
    cores).
    ray: address of a Ray cluster to run on, or `local`; each trial requests its CPUs, and a GPU for
    the device cuda.
    progress: show a bar on a terminal.

    A trial that fails is a row of the report. Ctrl-C ends the sweep early, with a report of the
    finished trials. Raises UsageError, TaskError and BundleError for an invalid sweep, DataError
    for missing rows, and BbtError when `output` exists or is not a sweep.
    """
    folder = Path(output).absolute()
    with reserved(folder):
        source = _source(folder, config, preset, resume)
        if resume and source is None and not any((given or {}).values()):
            raise BbtError(
                f"{folder} does not exist, so --resume has nothing to continue; choose another -o"
            )
        sweep = read_sweep(source, given or {}).absolute()
        if ray is not None and index_of(sweep.device):
            raise UsageError(
                f"--device {sweep.device}: a trial on Ray gets a GPU of its own; use --device cuda"
            )
        trials = sweep.trials()
        for trial in {(trial.task, trial.data): trial for trial in trials}.values():
            if trial.data is not None:  # fail before the first search, not in every trial
                check_rows(trial.definition, Path(trial.data), trial.search_settings)
        devices = [kind_of(engine_spec(name).device(sweep.device)) for name in sweep.engines]
        results = finished(trials, folder / TRIALS)
        with closing(
            open_pool(ray, jobs, threads, "cuda" if "cuda" in devices else "cpu", progress)
        ) as pool:
            _write(folder, sweep)
            return _run(folder, sweep, trials, results, pool, progress)


def _write(folder: Path, sweep: Sweep) -> None:
    """Make the folder with sweep.json in one step, so that whatever is left of a sweep can be
    resumed.
    """
    content = sweep.model_dump_json(indent=1).encode() + b"\n"
    if folder.exists():
        for place in (folder, *(folder / TRIALS).glob("*")):
            remove_leftovers(place)
        write_atomically(folder / SWEEP, content)
        return
    with reserved_folder(folder) as new:
        (new / TRIALS).mkdir()
        write_atomically(new / SWEEP, content)


def _source(
    folder: Path, config: str | Path | None, preset: str | None, resume: bool
) -> Path | None:
    """The file that defines the sweep, if any."""
    if config is not None and preset is not None:
        raise UsageError("--config and --preset exclude each other; choose one")
    if preset is not None:
        check_known("preset", preset, preset_names())
        config = PRESETS / f"{preset}.toml"
    stored = folder / SWEEP
    if folder.exists() and not (resume and stored.is_file()):
        hint = "is not a sweep;" if not stored.is_file() else "can be continued with --resume; or"
        raise BbtError(f"{folder} exists already and {hint} choose another -o")
    return Path(config) if config is not None else stored if stored.is_file() else None


def _run(
    folder: Path,
    sweep: Sweep,
    trials: list[Trial],
    results: dict[str, TrialResult],
    pool: Pool,
    progress: bool,
) -> SweepReport:
    """results: of the trials that are done, by name; those of the others are added."""
    places = {trial.name: folder / TRIALS / trial.name for trial in trials}
    failures: dict[str, str] = {}
    waiting = [
        PoolJob(
            t.name,
            run_trial,
            {"trial": t.model_dump(), "folder": str(places[t.name]), "threads": pool.threads},
        )
        for t in trials
        if t.name not in results
    ]
    interrupted, crossed = False, None
    try:
        for name, reply in pool.run(waiting, len(results), progress):
            if "error" in reply:
                failures[name] = " ".join(reply["message"].split())
            else:
                results[name] = TrialResult.model_validate(reply["value"])
            report = make_report(sweep, trials, results, failures)
            write_report(folder, report, markdown(report, plot=False))
        if sweep.cross_evaluate and results:
            done = [trial for trial in trials if trial.name in results]
            crossed = cross_evaluate(done, folder / TRIALS, pool, progress)
    except KeyboardInterrupt:
        interrupted = True
    report = make_report(sweep, trials, results, failures, interrupted, crossed)
    write_report(folder, report, markdown(report), lambda file: draw(file, report))
    return report


def run_trial(trial: dict[str, Any], folder: str, threads: int | None) -> dict[str, Any]:
    """Run a trial in its folder, or what remains of it; arguments and result are JSON. Raises what
    `tune` raises.
    """
    t, place = Trial.model_validate(trial), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    run = tune(
        t.bundle,
        t.definition,
        data=t.data,
        engine=t.engine,
        device=t.device,
        threads=threads,
        output=place / RUN,
        resume=True,
        settings=every_setting(t),
        progress=False,
    )
    if run.info.status != "done" or run.info.best is None:
        raise RunError(f"interrupted after {run.info.calls} calls; continue with --resume")
    score = evaluate(run.path, data=t.data, threads=threads)
    result = TrialResult(
        trial=t,
        score=score["score"],
        without_prompt=score["without_prompt"],
        batch_calibrated=score["batch_calibrated"],
        dev_score=run.info.best.dev_score,
        test_rows=score["rows"],
        calls=run.info.calls,
        seconds=run.info.seconds,
        curve=[(g.calls, g.dev_score) for g in run.history if g.dev_score is not None],
        versions=run.info.engine.versions,
    )
    write_atomically(place / SCORE, result.model_dump_json(indent=1).encode() + b"\n")
    return result.model_dump(mode="json")


def every_setting(trial: Trial) -> dict[str, Any]:
    """The trial's settings and its task's presets: a resumed run that is not given one keeps its
    own.

    Without those of a preset that do not apply here, and that `tune` therefore refuses where they
    are given.
    """
    settings = trial.search_settings
    info = Bundle.read(trial.bundle, verify=False).info
    return settings.model_dump(exclude={*without_effect(settings, info)}) | trial.settings


def finished(trials: list[Trial], folder: Path) -> dict[str, TrialResult]:
    """The results of those trials that are done, by name.

    Raises RunError for one that was done with other settings, rows, task or bundle: it would be
    lost in the report.
    """
    found: dict[str, TrialResult] = {}
    for trial in trials:
        try:
            result = TrialResult.model_validate_json((folder / trial.name / SCORE).read_bytes())
        except (OSError, ValidationError):  # not done, or with another version
            continue
        if changed := differences(result.trial, trial):
            problem = f"{folder / trial.name} is a finished trial with another {', '.join(changed)}"
            raise RunError(f"{problem}; choose another -o")
        if result.trial == trial:
            found[trial.name] = result
    return found


def differences(former: Trial, trial: Trial) -> list[str]:
    """What keeps a trial from continuing another of the same name. A larger budget does not."""
    pairs = former.search_settings.differences(trial.search_settings)
    changed = [f"{name} (was {was}, is now {now})" for name, (was, now) in pairs.items()]
    names = {
        "definition": "task definition",
        "rows": "data",
        "digest": "bundle",
        "device": "device",
    }
    return changed + [
        name for field, name in names.items() if getattr(former, field) != getattr(trial, field)
    ]
