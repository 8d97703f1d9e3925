"""A command killed at every file operation: what it leaves, and what the next one makes of it.

python tests/cli/kills.py COMMAND [EVERY]

A fork of a process that has loaded everything is killed before and after each call that makes,
opens for writing, renames, replaces, removes or syncs a file or folder, or at every n-th of these
points. Then nothing half-written may have its final name, and the same command (with --resume) must
end with the result that it has when nobody kills it, and leave nothing else but the empty file of a
lock.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import Bundle, Run, tune

OPERATIONS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")  # of os


@dataclass
class Command:
    """What is killed. run: makes an output; again: after a kill. result: what it made, in a form
    that can be compared; raises an error for what is not whole. marker: the file that an unfinished
    output has, where it may have its final name.
    """

    run: Callable[[Path, bool], object]
    result: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda output: None
    marker: str | None = None
    overwrites: bool = False

    def acceptable(self, output: Path, whole: object) -> bool:
        """Whether what a kill has left under the final name is whole."""
        if self.overwrites:  # one of the two is always there, under its name or between two renames
            output = output if output.exists() else output.with_name(f".{output.name}.old")
            return self.result(output) is not None
        if self.marker is not None and output.exists():
            return (output / self.marker).exists()
        return not output.exists() or self.result(output) == whole


def unless_made(make: Callable[[Path], object]) -> Callable[[Path, bool], object]:
    """For a command that refuses an existing output; a complete one is not made again."""
    return lambda output, again: None if again and output.exists() else make(output)


def run_result(output: Path) -> object:
    run = Run.read(output)
    names = sorted(file.name for file in output.iterdir())
    return run.prompt.tobytes(), run.info.best, run.info.status, names


def tune_command(folder: Path, method: str = "bbt", overwrite: bool = False) -> Command:
    bundle, task = search_bundle(folder / "bundle", method), task_file(folder / "data")

    def search(output: Path, again: bool = False, **settings: Any) -> object:
        options: Any = {"data": task.parent, "engine": "dummy", "progress": False}
        options |= {"resume": again and not overwrite}
        options |= {"overwrite": overwrite and "seed" not in settings}
        chosen = {**SETTINGS, "budget": 24, **settings}
        return tune(bundle.path, task, output=output, settings=chosen, **options)

    if overwrite:
        return Command(search, run_result, lambda out: search(out, seed=8), overwrites=True)
    return Command(search, run_result)


def checkpoint(folder: Path) -> Path:
    from tiny_backbones import save_recorded_backbone

    from bbt_accel.exporters.trace import export, validate

    export.validated = validate.validate  # in this process
    save_recorded_backbone("bert", folder / "checkpoint")
    return folder / "checkpoint"


def exported(folder: Path) -> Bundle:
    from bbt_accel import export_bundle

    return export_bundle(checkpoint(folder), folder / "source", n_prompt_tokens=3)


def bundle_result(output: Path) -> object:
    return Bundle.read(output).info.sha256


def export_command(folder: Path) -> Command:
    from bbt_accel import export_bundle

    place = checkpoint(folder)
    make = unless_made(lambda output: export_bundle(place, output, n_prompt_tokens=3))
    return Command(make, bundle_result)


def package_command(folder: Path) -> Command:
    from package_parts import tuned

    from bbt_accel.package.manifest import read_info
    from bbt_accel.package.package import Options, package_run

    run = tuned(exported(folder), folder / "tuned").path

    def result(output: Path) -> object:
        found = read_info(output).sha256.items()
        return {name: digest for name, digest in found if name != "README.md"}  # names the output

    return Command(unless_made(lambda out: package_run(run, out, Options(threads=1))), result)


def fit_command(folder: Path) -> Command:
    """From a file of rows and a checkpoint, with an empty cache of bundles."""
    from bbt_accel.predict.fit import fit_file

    backbone, rows = str(checkpoint(folder)), folder / "rows.csv"
    lines = [f"it was w{i} .,{('bad', 'great')[i % 2]}" for i in range(16)]
    rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    options: Any = {"text": "text", "label": "label", "backbone": backbone, "budget": 41}
    options |= {"engine": "ort", "precision": "fp32", "n_prompt_tokens": 3, "threads": 1}

    def make(output: Path) -> object:
        os.environ["BBT_ACCEL_CACHE"] = str(output.parent / f"cache of {output.name}")
        return fit_file(rows, output, **options, progress=False)

    return Command(unless_made(make), run_result)


def sweep_command(folder: Path) -> Command:
    """Its trials are processes of their own, which end with it."""
    from bbt_accel.benchmarks.sweep.report import SweepReport
    from bbt_accel.benchmarks.sweep.runner import run_sweep

    bundle, task = search_bundle(folder / "bundle").path, task_file(folder / "data" / "toy")
    given = {"tasks": [str(task)], "bundles": [str(bundle)], "engines": ["dummy"], "seeds": [1, 2]}
    settings = {"k_shot": 3, "eval_every": 10, "budget": 24}
    given |= {"data": str(folder / "data"), "settings": settings}

    def run(output: Path, again: bool) -> object:
        resume = again and output.exists()
        return run_sweep(output, given=None if resume else given, resume=resume, progress=False)

    def result(output: Path) -> object:
        report = SweepReport.model_validate_json((output / "report.json").read_bytes())
        return [(trial.name, trial.status, trial.score) for trial in report.trials]

    return Command(run, result, marker="sweep.json")


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "tune": tune_command,
    "tune-v2": lambda folder: tune_command(folder, "bbtv2"),
    "overwrite": lambda folder: tune_command(folder, overwrite=True),
    "export": export_command,
    "package": package_command,
    "fit": fit_command,
    "sweep": sweep_command,
}


def in_a_fork(work: Callable[[], object], at: int = 0) -> tuple[int, int]:
    """Do something in a fork that is killed at the n-th point; its exit status, and how many points
    it passed.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = 1
        try:
            passed = armed(at)
            work()
            os.write(write, str(passed()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as stream:
        points = int(stream.read() or 0)
    return os.waitpid(child, 0)[1], points


def armed(at: int) -> Callable[[], int]:
    """Kill this process before or after the n-th operation. Returns the number of points passed so
    far.
    """
    count = 0

    def point() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            point()
            result = function(*arguments, **options)
            point()
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))
    opened = io.open

    def written(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+")
        return (deadly(opened) if writes else opened)(file, mode, *arguments, **options)

    io.open = builtins.open = written  # type: ignore[assignment]
    return lambda: count


def kill_everywhere(name: str, folder: Path, every: int) -> tuple[int, list[str]]:
    """Kill the command at every n-th point; returns the number of kills, and a line for each that
    went wrong.
    """
    command = COMMANDS[name](folder)
    for output in (folder / "whole", folder / "counted"):
        command.prepare(output)
    in_a_fork(lambda: command.run(folder / "whole", False))
    whole = command.result(folder / "whole")
    points = in_a_fork(lambda: command.run(folder / "counted", False))[1]
    wrong, kills = [], 0
    for at in range(1, points + 1, every):
        output = folder / f"killed-{at}" / "output"
        output.parent.mkdir()
        in_a_fork(lambda output=output: command.prepare(output))  # type: ignore[misc]
        status, _ = in_a_fork(lambda output=output: command.run(output, False), at)  # type: ignore[misc]
        kills += status == signal.SIGKILL
        if found := problem(command, output, whole):
            wrong.append(f"{name} at {at} of {points}: {found}")
        shutil.rmtree(output.parent)
    return kills, wrong


def problem(command: Command, output: Path, whole: object) -> str | None:
    try:
        if not command.acceptable(output, whole):
            return "something half-written has its final name"
        status, _ = in_a_fork(lambda: command.run(output, True))
        if status:
            return f"the next command failed ({status})"
        if command.result(output) != whole:
            return "the result is another one"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    hidden = output.parent.rglob(".*")
    left = [p.name for p in hidden if p.suffix != ".lock" or p.stat().st_size]
    return f"{left} is left" if left else None


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        step = int(sys.argv[2]) if len(sys.argv) > 2 else 1
        killed, gone_wrong = kill_everywhere(sys.argv[1], Path(place), step)
    print(*gone_wrong, f"{killed} kills, {len(gone_wrong)} went wrong", sep="\n")
