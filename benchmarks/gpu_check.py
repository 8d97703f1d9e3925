"""Hold the GPU engines to the CPU, measure them against eager PyTorch and the GPU's ceilings, and say PASSED or FAILED.

python -m bbt_accel.benchmarks.gpu_check -o gpu-check

Needs a GPU and no network: backbones are made with random weights, rows are those of SST-2 where they are at hand (in
--data), else the shipped ones. An engine that fails is a row of the report. Where time is short, `--families ""` with
`--golden none` measures alone, and `--methods ""` checks alone. `--device cpu --backbone demo` runs the script itself
where there is no GPU; what it measures then says nothing about one.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.benchmarks import worker
from bbt_accel.benchmarks.gpu_report import Check, GpuReport, Speed
from bbt_accel.benchmarks.gpu_steps import N_PROMPT, TINY
from bbt_accel.benchmarks.progress import StepProgress
from bbt_accel.benchmarks.workload import save_batch, timed_rows
from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called
from bbt_accel.doctor import describe_machine, installed_versions
from bbt_accel.errors import BbtError, EngineError

ENGINES = (("torch", "fp32"), ("ort", "fp32"), ("ort", "fp16"), ("trt", "fp32"), ("trt", "fp16"))
"""Held to the CPU."""
TIMED = (("eager", "fp32"), ("eager", "fp16"), ("ort", "fp16"), ("trt", "fp16"))
VARIANTS = (("bbt", "add"), ("bbtv2", "add"), ("bbt", "cat"))
GOLDEN_PROMPT = 10
"""Prompt tokens of the recorded traces."""


class GpuCheck:
    """One run of the check, its bundles in the folder `work`."""

    def __init__(self, given: argparse.Namespace, work: Path, tell: Callable[[str], None]) -> None:
        self.given, self.work, self.tell = given, work, tell
        self.device: str = given.device
        self.ceilings: dict[str, float] = {}
        self.checks: list[Check] = []
        self.timed: list[Speed] = []

    def run(self, command: str) -> GpuReport:
        """All that was asked for. Ctrl-C and SIGTERM end it with a report of what there is."""
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        interrupted = False
        try:
            self.everything()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGTERM, former)
        return GpuReport(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            device=self.device,
            gpus=describe_machine()["gpus"],
            backbone=self.given.backbone,
            rows=self.rows,
            popsize=self.given.popsize,
            n_prompt_tokens=self.given.n_prompt_tokens,
            calls=self.given.calls,
            data=self.task if self.data is None else str(self.data),
            interrupted=interrupted,
            matrix_tflops=self.ceilings.get("matrix_tflops"),
            bandwidth_gbs=self.ceilings.get("bandwidth_gbs"),
            checks=self.checks,
            speeds=self.timed,
            versions=installed_versions(),
        )

    def everything(self) -> None:
        with self.noting() as failed:
            self.ceilings = worker.call("ceilings", device=self.device)
        if failed:
            print(f"the ceilings could not be measured: {failed[0]}", file=sys.stderr)
        for check in chain(self.exactness(), self.traces()):
            self.checks.append(check)
        for method in listed(self.given.methods):
            for speed in self.speeds(method):
                self.timed.append(speed)

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """Gives a list that holds the reason when the block failed."""
        reasons: list[str] = []
        try:
            yield reasons
        except BbtError as error:
            reasons.append(str(error))

    def engine(self, bundle: Path, name: str) -> dict[str, Any]:
        return {"bundle": str(bundle), "name": name, "device": self.device}

    # Exactness ------------------------------------------------------------------------------------------------

    def exactness(self) -> Iterator[Check]:
        """Every family, method and engine on batches of several shapes."""
        for family in listed(self.given.families):
            checkpoint = self.work / f"tiny-{family}"
            with self.noting() as failed:
                worker.call("tiny", model_type=family, output=checkpoint)
            if failed:
                yield Check(case=family, engine="torch fp32", reason=failed[0])
                continue
            for method, mode in VARIANTS:
                yield from self.variant(checkpoint, f"{family} {method} {mode}", method, mode)

    def variant(self, checkpoint: Path, case: str, method: str, mode: str) -> Iterator[Check]:
        folder = self.work / case.replace(" ", "-")
        with self.noting() as failed:
            self.tell(f"exporting {case}")
            made = {"method": method, "prompt_mode": mode, "n_prompt_tokens": N_PROMPT}
            worker.call("export", backbone=str(checkpoint), output=folder, **made)
            worker.call("expected", bundle=folder, output=folder.with_suffix(".npz"))
        if failed:
            yield Check(case=case, engine="torch fp32", reason=failed[0])
            return
        for name, precision in ENGINES:
            self.tell(f"{name} {precision} on {case}")
            check = Check(case=case, engine=f"{name} {precision}")
            with self.noting() as failed:
                check.error = worker.call(
                    "exact",
                    exported=folder,
                    expected=folder.with_suffix(".npz"),
                    engine=self.engine(folder if plain(name, precision) else self.made(folder, name, precision), name),
                    made=None if plain(name, precision) else {"precision": precision, "target": name},
                )
            check.reason = failed[0] if failed else None
            yield check

    def made(self, folder: Path, name: str, precision: str) -> Path:
        return folder.with_name(f"{folder.name}-{name}-{precision}")

    def traces(self) -> Iterator[Check]:
        """The losses that the original program recorded, where its traces are at hand."""
        for trace in sorted(self.given.golden.glob("*.npz")):
            backbone, *words = trace.stem.split("_")
            if {"hinge", "perf"} & set(words):
                continue
            checkpoint = min((self.given.golden / "models").glob(f"{backbone}*"))
            folder = self.work / f"golden-{trace.stem}"
            with np.load(trace) as arrays:
                method = "bbt" if len(arrays["A"]) == 1 else "bbtv2"
            mode = "cat" if "cat" in words else "add"
            made = {"method": method, "prompt_mode": mode, "n_prompt_tokens": GOLDEN_PROMPT}
            exported = False
            for name, precision in ENGINES:
                check = Check(case=f"trace {trace.stem}", engine=f"{name} {precision}")
                self.tell(f"{check.engine} on {check.case}")
                with self.noting() as failed:
                    if not exported:
                        worker.call("export", backbone=str(checkpoint), output=folder, **made)
                        exported = True
                    bundle = folder
                    if not plain(name, precision):
                        bundle = self.made(folder, name, precision)
                        worker.call(
                            "optimize", source=folder, output=bundle, data=None, precision=precision, target=name
                        )
                    check.error = worker.call("golden", trace=trace, engine=self.engine(bundle, name))
                check.reason = failed[0] if failed else None
                yield check

    # Speed ----------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path | None:
        return self.given.data if self.given.data.is_dir() else None

    @property
    def task(self) -> str:
        return "demo" if self.data is None else "sst2"

    rows = 0

    def speeds(self, method: str) -> Iterator[Speed]:
        """Eager and the engines on the workload, each in a process of its own."""
        folder, batch = self.work / f"speed-{method}", self.work / f"rows-{method}.npz"
        work = {"naive": 0, "done": 0}
        with self.noting() as failed:
            self.tell(f"exporting {self.given.backbone} for {method}")
            self.export(folder, method)
            self.encode(folder, batch)
            popsize = self.given.popsize if self.device == "cuda" else 2
            work = worker.call("work", bundle=folder, batch=batch, device=self.device, popsize=popsize)
        if failed:
            yield Speed(method=method, engine="eager fp32", reason=failed[0])
            return
        eager: float | None = None
        for name, precision in TIMED:
            speed = Speed(method=method, engine=f"{name} {precision}")
            self.tell(f"timing {speed.engine}, {method}")
            with self.noting() as failed:
                self.time(speed, folder, batch, name, precision)
                if (name, precision) == ("eager", "fp32"):
                    eager = speed.ms
                self.derive(speed, eager, work)
            if not failed and name != "eager":
                self.tell(f"a search of {self.given.calls} calls, {speed.engine}, {method}")
                with self.noting() as failed:
                    self.search(speed, folder, name, precision)
            speed.reason = failed[0] if failed else None
            yield speed

    def export(self, folder: Path, method: str) -> None:
        backbone = self.given.backbone
        if backbone != "demo" and not Path(backbone).is_dir():
            from bbt_accel.benchmarks.make_backbone import make_backbone

            checkpoint = self.work / backbone
            if not checkpoint.exists():
                make_backbone(backbone, checkpoint)
            backbone = str(checkpoint)
        n = self.given.n_prompt_tokens
        worker.call("export", backbone=backbone, output=folder, method=method, prompt_mode="add", n_prompt_tokens=n)

    def encode(self, folder: Path, file: Path) -> None:
        from bbt_accel.encoding import Encoder
        from bbt_accel.tasks import load_task

        task = load_task(self.task)
        batch = Encoder(Bundle.read(folder), task).encode(timed_rows(task, self.data, self.given.k_shot, None, 42))
        self.rows = len(batch)
        save_batch(file, batch)

    def time(self, speed: Speed, folder: Path, batch: Path, name: str, precision: str) -> None:
        bundle = folder
        if name != "eager":
            bundle = self.made(folder, name, precision)
            made = {"precision": precision, "target": name, "calibrate": self.task, "data": self.data}
            worker.call("optimize", source=folder, output=bundle, **made)
        measured = worker.call(
            "speed",
            engine=self.engine(bundle, name),
            batch=batch,
            popsize=self.given.popsize,
            repeats=self.given.repeats,
            half=(name, precision) == ("eager", "fp16"),
        )
        speed.ms, speed.versions = 1000 * float(np.median(measured["seconds"])), measured["versions"]

    def search(self, speed: Speed, folder: Path, name: str, precision: str) -> None:
        speed.measured_search = worker.call(
            "search",
            engine=self.engine(self.made(folder, name, precision), name),
            task=self.task,
            data=self.data,
            calls=self.given.calls,
            popsize=self.given.popsize,
            k_shot=self.given.k_shot,
            run=self.work / f"run-{speed.method}-{name}",
        )

    def derive(self, speed: Speed, eager: float | None, work: dict[str, int]) -> None:
        if speed.ms is None:
            return
        speed.search_seconds = speed.ms * self.given.calls / 1000
        speed.speedup = None if eager is None else eager / speed.ms
        if "matrix_tflops" in self.ceilings:
            rate = 1e12 * self.ceilings["matrix_tflops"] * speed.ms / 1000
            speed.naive_share = work["naive"] / rate
            speed.share = work["naive" if speed.engine.startswith("eager") else "done"] / rate


def listed(names: str) -> list[str]:
    """The names between commas; none where there are none."""
    return [name for name in names.split(",") if name]


def plain(name: str, precision: str) -> bool:
    """Whether an engine runs the exported bundle as it is."""
    return name == "torch" or (name, precision) == ("ort", "fp32")


def check_device(device: str) -> None:
    """Raises EngineError, in one line, when there is no GPU."""
    if device == "cuda" and not describe_machine()["gpus"]:
        raise EngineError("there is no NVIDIA GPU here (nvidia-smi finds none): nothing was checked")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    root = Path(__file__).resolve().parents[1]
    shared = root.parent / "shared"
    parser = argparse.ArgumentParser(prog="gpu_check", description="Check and measure the GPU engines.")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-check"), help="the report's folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself")
    parser.add_argument("--backbone", default="roberta-large", help="a shape of make_backbone, a folder, or demo")
    parser.add_argument(
        "--families", default=",".join(TINY), help='of the tiny backbones that are held to the CPU; "" for none'
    )
    parser.add_argument("--methods", default="bbt,bbtv2", help='that are timed; "" for none')
    parser.add_argument("--popsize", type=int, default=20, help="candidates a call")
    parser.add_argument("--k-shot", type=int, default=16, help="rows a class")
    parser.add_argument("--n-prompt-tokens", type=int, default=50, help="soft prompt vectors")
    parser.add_argument("--calls", type=int, default=8000, help="of a whole search")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls a row")
    parser.add_argument("--data", type=Path, default=shared / "data" / "sst2", help="SST-2's folder")
    parser.add_argument("--golden", type=Path, default=shared / "golden", help="recorded traces, if there are any")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    command = called("gpu_check", arguments)
    try:
        check_device(given.device)
        with new_folder(given.output) as folder:
            work = folder / "work"
            work.mkdir()
            with StepProgress() as tell:
                report = GpuCheck(given, work, tell).run(command)
            shutil.rmtree(work)
            (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
            (folder / "report.md").write_text(report.markdown(), encoding="utf-8")
    except BbtError as error:
        print("error:", error, file=sys.stderr)
        return error.exit_code
    for line in report.failures():
        print("-", line)
    print(f"{'FAILED' if report.failures() else 'PASSED'}; the report is in {given.output}")
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
