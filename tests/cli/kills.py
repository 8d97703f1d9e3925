"""A command killed at every file operation: what it leaves, and what the next one makes of it.

python tests/kills.py COMMAND [EVERY]

COMMAND: tune, tune-v2, overwrite, export, optimize, package, fit, sweep or compare. A fork of a
process that has loaded everything is killed before and after each call that makes, opens for
writing, renames, replaces, removes or syncs a file or folder, or at every n-th of these points.
Then nothing half-written may have its final name, and the same command (with --resume) must end
with the result that it has when nobody kills it, and leave nothing else. (An export that was killed
when it was complete is not made again, and may leave the empty file of its lock; so may what
exports.)
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import Bundle, tune
from bbt_accel.benchmarks.compare_report import CompareReport
from bbt_accel.benchmarks.sweep.report import SweepReport
from bbt_accel.benchmarks.sweep.runner import run_sweep
from bbt_accel.search.run import Run

OPERATIONS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")  # of os


class Command(ABC):
    """What is killed. `output` is what it makes, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def prepare(self, output: Path) -> None:
        """What is there before; nothing by default."""

    @abstractmethod
    def run(self, output: Path, again: bool) -> None: ...

    @abstractmethod
    def result(self, output: Path) -> object:
        """What it made, checked, in a form that can be compared. Raises an error for what is not
        whole.
        """

    def acceptable(self, output: Path, whole: object) -> bool:
        """Whether what a kill has left under the final name is whole."""
        return not output.exists() or self.result(output) == whole


class Tune(Command):
    method = "bbt"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bundle, self.task = (
            search_bundle(folder / "bundle", self.method),
            task_file(folder / "data"),
        )

    def prepare(self, output: Path) -> None:
        pass

    def run(self, output: Path, again: bool, **more: Any) -> None:
        settings = {**SETTINGS, "budget": 24, **more.pop("settings", {})}
        options = {
            "data": self.task.parent,
            "engine": "dummy",
            "progress": False,
            "resume": again,
            **more,
        }
        tune(self.bundle.path, self.task, output=output, settings=settings, **options)

    def result(self, output: Path) -> object:
        run = Run.read(output)
        return (
            run.prompt.tobytes(),
            run.info.best,
            run.info.status,
            sorted(p.name for p in output.iterdir()),
        )


class TuneV2(Tune):
    method = "bbtv2"


class Overwrite(Tune):
    """A run in place of another: at any moment one of them is there, or is put back by the next
    command.
    """

    def prepare(self, output: Path) -> None:
        super().run(output, False, settings={"seed": 8})

    def run(self, output: Path, again: bool, **more: Any) -> None:
        super().run(output, False, overwrite=True)

    def acceptable(self, output: Path, whole: object) -> bool:
        if not output.exists():  # between two renames
            output = output.with_name(f".{output.name}.old")
        return self.result(output) is not None


class Export(Command):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from tiny_backbones import save_recorded_backbone

        from bbt_accel.exporters.trace import export, validate

        export.validated = validate.validate  # in this process
        self.checkpoint = folder / "checkpoint"
        save_recorded_backbone("bert", self.checkpoint)

    def prepare(self, output: Path) -> None:
        pass

    def run(self, output: Path, again: bool) -> None:
        from bbt_accel.exporters.trace.export import export_bundle

        if again and output.exists():
            return
        export_bundle(self.checkpoint, output, n_prompt_tokens=3)

    def result(self, output: Path) -> object:
        return Bundle.read(output).info.sha256


class Optimize(Export):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        super().run(folder / "source", False)

    def run(self, output: Path, again: bool) -> None:
        from bbt_accel.exporters.convert.optimize import optimize_bundle

        if again and output.exists():
            return
        optimize_bundle(self.folder / "source", output, precision="int8")


class Package(Export):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from package_parts import tuned

        super().run(folder / "source", False)
        self.tuned = tuned(Bundle.read(folder / "source"), folder / "tuned")

    def run(self, output: Path, again: bool) -> None:
        from bbt_accel.package.package import Options, package_run

        if again and output.exists():
            return
        package_run(self.tuned.path, output, Options(threads=1))

    def result(self, output: Path) -> object:
        from bbt_accel.package.manifest import read_info

        found = read_info(output).sha256
        return {
            name: digest for name, digest in found.items() if name != "README.md"
        }  # which names the output


class Fit(Export):
    """From a file of rows and a checkpoint, with an empty cache of bundles."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows = folder / "rows.csv"
        lines = [f"it was w{i} .,{('bad', 'great')[i % 2]}" for i in range(16)]
        self.rows.write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")

    def run(self, output: Path, again: bool) -> None:
        from bbt_accel.predict.fit import fit_file

        if again and output.exists():
            return
        os.environ["BBT_ACCEL_CACHE"] = str(output.parent / f"cache of {output.name}")
        fit_file(
            self.rows, output, text="text", label="label", backbone=str(self.checkpoint), engine="ort",
            precision="fp32", budget=41, n_prompt_tokens=3, threads=1, progress=False,
        )  # fmt: skip

    def result(self, output: Path) -> object:
        run = Run.read(output)
        return run.prompt.tobytes(), run.info.status, sorted(p.name for p in output.iterdir())


class Sweep(Command):
    """Its trials are processes of their own, which end with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        search_bundle(folder / "bundle")
        task = task_file(folder / "data" / "toy")
        self.given = {
            "tasks": [str(task)], "bundles": [str(folder / "bundle")], "engines": ["dummy"], "seeds": [1, 2],
            "data": str(folder / "data"), "settings": {"k_shot": 3, "eval_every": 10, "budget": 24},
        }  # fmt: skip

    def prepare(self, output: Path) -> None:
        pass

    def run(self, output: Path, again: bool) -> None:
        resume = again and output.exists()
        run_sweep(output, given=None if resume else self.given, resume=resume, progress=False)

    def result(self, output: Path) -> object:
        report = SweepReport.model_validate_json((output / "report.json").read_bytes())
        return [(trial.name, trial.status, trial.score) for trial in report.trials]

    def acceptable(self, output: Path, whole: object) -> bool:
        return not output.exists() or (output / "sweep.json").is_file()


class Compare(Export):
    """Its trials are processes of their own, as those of a sweep are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.task = task_file(folder / "data" / "toy")

    def run(self, output: Path, again: bool) -> None:
        from bbt_accel.benchmarks.compare import run_compare
        from bbt_accel.benchmarks.options import CompareOptions

        options = CompareOptions(
            backbone=str(self.checkpoint), data=self.task.parents[1], contenders=["readouts", "bbt"], budgets=[40],
            seeds=[1], k_shot=3, n_prompt_tokens=3, test_rows=8, threads=1,
        )  # fmt: skip
        run_compare(
            [str(self.task)], output, options, resume=again and output.exists(), progress=False
        )

    def result(self, output: Path) -> object:
        report = CompareReport.model_validate_json((output / "report.json").read_bytes())
        return [(score.label, score.score) for score in report.scores], report.failures

    def acceptable(self, output: Path, whole: object) -> bool:
        return not output.exists() or (output / "trials").is_dir()


COMMANDS: dict[str, type[Command]] = {
    "tune": Tune, "tune-v2": TuneV2, "overwrite": Overwrite, "export": Export, "optimize": Optimize, "package": Package,
    "fit": Fit, "sweep": Sweep, "compare": Compare,
}  # fmt: skip


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

    from bbt_accel.io import files

    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))
    opened = io.open

    def written(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return (deadly(opened) if set(mode) & set("wax+") else opened)(
            file, mode, *arguments, **options
        )

    io.open = builtins.open = written  # type: ignore[assignment]
    native = files._renameat2()
    files._renameat2 = (lambda: deadly(native)) if native is not None else files._renameat2  # type: ignore[assignment]
    return lambda: count


def kill_everywhere(
    name: str, folder: Path, every: int = 1, first: int = 1
) -> tuple[int, list[str]]:
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
    for at in range(first, points + 1, every):
        place = folder / f"killed-{at}"
        output = place / "output"
        place.mkdir()
        in_a_fork(lambda output=output: command.prepare(output))  # type: ignore[misc]
        status, _ = in_a_fork(lambda output=output: command.run(output, False), at)  # type: ignore[misc]
        kills += status == signal.SIGKILL
        wrong += [
            f"{name} at {at} of {points}: {problem}" for problem in problems(command, output, whole)
        ]
        shutil.rmtree(place)
    return kills, wrong


def problems(command: Command, output: Path, whole: object) -> list[str]:
    found = []
    try:
        if not command.acceptable(output, whole):
            found.append("something half-written has its final name")
        status, _ = in_a_fork(lambda: command.run(output, True))
        if status:
            found.append(f"the next command failed ({status})")
        elif command.result(output) != whole:
            found.append("the result is another one")
        locks = isinstance(command, Export)
        hidden = [
            p
            for p in output.parent.rglob(".*")
            if not (locks and p.suffix == ".lock" and not p.stat().st_size)
        ]
        left = [str(p.relative_to(output.parent)) for p in hidden]
        found += [f"{left} is left"] if left else []
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    begun = time.monotonic()
    with TemporaryDirectory() as place:
        killed, gone_wrong = kill_everywhere(
            sys.argv[1], Path(place), int(sys.argv[2]) if len(sys.argv) > 2 else 1
        )
    print(*gone_wrong, sep="\n")
    print(
        f"{sys.argv[1]}: {killed} kills in {time.monotonic() - begun:.0f} s, {len(gone_wrong)} went wrong"
    )
