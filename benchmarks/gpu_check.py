"""Validate the GPU engines against the CPU, measure them against PyTorch and the GPU's ceilings:
PASSED or FAILED.

python -m bbt_accel.benchmarks.gpu_check -o gpu-check

Needs a GPU and no network: backbones have random weights, rows are those of SST-2 where they are at
hand (in --data), else the shipped ones. An engine that fails is a row of the report. Where time is
short, `--families ""` with `--golden none` measures only, and `--methods ""` validates only; such a
partial check does not pass. `--device cpu --backbone demo` tries the script itself where there is
no GPU; what it measures then says nothing about one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bbt_accel.benchmarks.bench import Benchmark
from bbt_accel.benchmarks.bench_report import Measurement
from bbt_accel.benchmarks.gpu_report import (
    WORKLOAD,
    EngineCheck,
    GpuReport,
    TimedCheck,
    worst,
)
from bbt_accel.benchmarks.gpu_state import GpuState, identity, processes_on
from bbt_accel.benchmarks.gpu_steps import (
    save_reference,
    timed_errors,
    trace_error,
    validation_error,
)
from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.benchmarks.options import bench_options
from bbt_accel.benchmarks.script import count, run_script
from bbt_accel.benchmarks.steps import Bundles
from bbt_accel.core.bundle import Bundle, BundleInfo, Method
from bbt_accel.core.comparison import RMSE
from bbt_accel.core.engine_specs import EngineSpec, check_device, engine_specs, index_of, kind_of
from bbt_accel.core.option_types import PROMPT_TOKENS
from bbt_accel.core.settings import DEFAULTS
from bbt_accel.errors import BbtError, EngineError
from bbt_accel.io import processes
from bbt_accel.io.command import comma_separated
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.progress import StepProgress

VARIANTS = (("bbt", "add"), ("bbtv2", "add"), ("bbt", "cat"))
METHODS = get_args(Method)  # whose speed is measured
N_PROMPT, TRACE_PROMPT = 5, 10  # prompt tokens of the tiny backbones, and of the recorded traces
TIMED = "fp16"  # the precision that is timed
SIZES = (
    "popsize",
    "k_shot",
    "n_prompt_tokens",
    "budget",
    "repeats",
)  # go to the benchmark as they are


def gpu_engines() -> list[tuple[EngineSpec, str]]:
    """Every engine that runs on a GPU, with the precisions that have a tolerance."""
    specs = [
        spec for spec in engine_specs().values() if "cuda" in spec.backends and not spec.internal
    ]
    return [
        (spec, precision) for spec in specs for precision in spec.precisions if precision in RMSE
    ]


class SpeedBenchmark(Benchmark):
    """The benchmark of one method, which also compares the numbers of what it times.

    A search in eager PyTorch would take too long.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.checks: list[TimedCheck] = []
        self.attention: list[str] = []

    def tunes(self, row: Measurement) -> bool:
        return not row.baseline

    def time(self, row: Measurement) -> None:
        super().time(row)
        if found := fused_attention(Bundle.read(self.engine(row)["bundle"], verify=False).info):
            self.attention.append(f"{self.options.method}, {row.label}: {found}")
        reference = self.work / "reference.npy"
        what = {
            "engine": self.engine(row),
            "batch": self.work / "timed.npz",
            "popsize": self.options.popsize,
        }
        if row is self.original:
            processes.call(save_reference, output=reference, **what)
        elif not row.baseline:
            for found in processes.call(timed_errors, reference=reference, **what):
                shape, noise = found.pop("shape"), found["noise"]
                case = f"{self.options.method}, {shape}"
                self.checks.append(
                    TimedCheck(case=case, engine=row.label, error=worst(noise.values()), **found)
                )


class GpuCheck:
    """One run of the check, its bundles in the folder `work`. Raises EngineError when there is no
    GPU.
    """

    def __init__(self, given: argparse.Namespace, work: Path, tell: StepProgress) -> None:
        on_gpu = kind_of(given.device) == "cuda"
        if on_gpu and not describe_machine()["gpus"]:
            raise EngineError(
                "there is no NVIDIA GPU here (nvidia-smi finds none), and nothing was checked; see bbt-accel doctor"
            )
        self.given, self.work, self.tell = given, work, tell
        self.report = GpuReport(rows=[], benchmarks=[], **given.report)
        # Queried in a short-lived process; otherwise this one would count as computing on the GPU.
        self.others = (
            processes_on(processes.call(identity, index=index_of(given.device))) if on_gpu else None
        )

    def run(self) -> GpuReport:
        """Everything that was asked for. Ctrl-C and SIGTERM end it with a report of what there
        is.
        """
        try:
            with processes.interrupted_by_sigterm():
                self.report.partial += [
                    f"the speed of {name}" for name in METHODS if name not in self.given.methods
                ]
                for method in self.given.methods:
                    self.measure(method)
                self.validate()
                self.replay_traces()
        except KeyboardInterrupt:
            self.report.interrupted = True
        return self.report

    def validate(self) -> None:
        """Every family, method and engine on batches of several shapes, compared with eager PyTorch
        on the CPU.
        """
        from bbt_accel.exporters.families.registry import families

        wanted = families() if self.given.families is None else self.given.families
        self.report.partial += [
            f"the family {family}" for family in families() if family not in wanted
        ]
        cases = [(family, *variant) for family, variant in product(wanted, VARIANTS)]
        self.expect(" ".join(case) for case in cases)
        for family, method, mode in cases:
            checkpoint = self.work / f"tiny-{family}"
            if not checkpoint.exists():
                processes.call(make_backbone, shape=checkpoint.name, output=checkpoint)
            bundles = self.bundles(f"{family} {method} {mode}", checkpoint, method, mode, N_PROMPT)
            self.check(bundles, validation_error, bundles.exported)

    def replay_traces(self) -> None:
        """The losses that the original program recorded, where its traces are at hand."""
        found = [] if self.given.golden is None else sorted(self.given.golden.glob("*.npz"))
        traces = [trace for trace in found if not of_another_loss(trace)]
        if not traces:
            where = (
                "--golden was not given"
                if self.given.golden is None
                else f"{self.given.golden} has none"
            )
            self.report.left_out.append(f"traces of the original program: {where}")
        if others := [trace.stem for trace in found if trace not in traces]:
            self.report.left_out.append(
                f"traces of another loss than the cross entropy: {', '.join(others)}"
            )
        self.expect(f"trace {trace.stem}" for trace in traces)
        for trace in traces:
            with np.load(trace) as arrays:
                method = "bbt" if len(arrays["A"]) == 1 else "bbtv2"
            backbone, *words = trace.stem.split("_")
            mode = "cat" if "cat" in words else "add"
            checkpoint = next(
                iter(sorted((self.given.golden / "models").glob(f"{backbone}*"))), None
            )
            if checkpoint is None:
                self.report.errors.append(
                    f"trace {trace.stem}: {self.given.golden / 'models'} has no {backbone}"
                )
                continue
            bundles = self.bundles(f"trace {trace.stem}", checkpoint, method, mode, TRACE_PROMPT)
            self.check(bundles, trace_error, trace.absolute)

    def expect(self, cases: Iterable[str]) -> None:
        """Every engine on every one of these belongs to the check: whatever is not done fails
        it.
        """
        engines = [f"{spec.name} {precision}" for spec, precision in gpu_engines()]
        self.report.expected += product(cases, engines)

    def bundles(self, case: str, checkpoint: Path, method: str, mode: str, n: int) -> Bundles:
        folder = self.work / case
        folder.mkdir()
        return Bundles(
            folder, checkpoint, {"method": method, "prompt_mode": mode, "n_prompt_tokens": n}
        )

    def check(
        self, bundles: Bundles, error: Callable[..., float], reference: Callable[[], Path]
    ) -> None:
        """A row of the report for every engine: its error compared with a file."""
        for spec, precision in gpu_engines():
            check = EngineCheck(case=bundles.work.name, engine=f"{spec.name} {precision}")
            self.report.rows.append(check)
            self.tell(f"{check.engine} on {check.case}")
            with check.capture_errors():
                engine = {
                    "bundle": bundles.bundle(spec, precision),
                    "name": spec.name,
                    "device": self.given.device,
                }
                check.error = processes.call(error, reference=reference(), engine=engine)

    def measure(self, method: str) -> None:
        """The engines and the baselines on the workload, and a whole search with each engine."""
        given, folder = self.given, self.work / f"speed-{method}"
        folder.mkdir()
        backbone, data, benchmark = given.backbone, given.data, None
        asked = {name: getattr(given, name) for name in (*SIZES, "device")}
        engines = [spec.name for spec, precision in gpu_engines() if precision == TIMED]
        try:
            if backbone != "demo" and not Path(backbone).is_dir():
                backbone = str(self.work / backbone)
                if not Path(backbone).exists():
                    make_backbone(given.backbone, backbone)
            where = {
                "backbone": backbone,
                "task": "sst2" if data else "demo",
                "data": data,
                "method": method,
            }
            how = {
                "tune": True,
                "seeds": 1,
                "test_rows": 64,
                "precisions": [TIMED],
                "engines": engines,
            }
            benchmark = SpeedBenchmark(
                bench_options(**asked, **where, **how), self.report.command, folder, self.tell
            )
            benchmark.run()
        except BbtError as error:
            self.report.errors.append(f"{method}: {error}")
        finally:
            if benchmark is not None and benchmark.rows and benchmark.original.calls_ms:
                self.report.benchmarks.append(benchmark.report())
                self.report.timed += benchmark.checks
                self.report.attention += benchmark.attention
                if state := benchmark.machine.get("gpu"):
                    self.report.gpu = GpuState(**state | {"others": self.others})


def fused_attention(info: BundleInfo) -> str | None:
    """What the builder made of attention in the plans of a bundle; None for one without plans."""
    facts = info.optimization or {}
    if "attention_fused" not in facts:
        return None
    fused, other = facts["attention_fused"], facts["attention_not_fused"]
    return (
        f"{fused} times one kernel, {other} times several"
        if fused or other
        else "the builder does not say"
    )


def of_another_loss(trace: Path) -> bool:
    """Whether a recorded trace is of another loss than the cross entropy."""
    return bool({"hinge", "perf"} & set(trace.stem.split("_")))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=check_device,
        default="cuda",
        help="cuda:N for another; cpu tries the script",
    )
    parser.add_argument(
        "--backbone",
        default=WORKLOAD["backbone"],
        help="a shape of make_backbone, a folder, or demo",
    )
    parser.add_argument(
        "--families",
        type=comma_separated,
        help='validated with tiny backbones; "" for none (default: all)',
    )
    parser.add_argument(
        "--methods", type=comma_separated, default=list(METHODS), help='timed methods; "" for none'
    )
    parser.add_argument(
        "--popsize", type=count, default=DEFAULTS.popsize, help="candidates per call"
    )
    parser.add_argument("--k-shot", type=count, default=DEFAULTS.k_shot, help="examples per class")
    parser.add_argument(
        "--n-prompt-tokens", type=count, default=PROMPT_TOKENS, help="soft prompt vectors"
    )
    parser.add_argument(
        "--calls", type=count, default=DEFAULTS.budget, dest="budget", help="calls of a search"
    )
    parser.add_argument("--repeats", type=count, default=10, help="timed calls per engine")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of SST-2's rows, of the targets (default: the shipped rows)",
    )
    parser.add_argument("--golden", type=Path, help="folder of traces of the original program")


def main(arguments: list[str] | None = None) -> int:
    report = run_script(
        "gpu_check", __doc__, add_options, lambda *given: GpuCheck(*given).run(), arguments
    )
    failures = report.failures()
    for line in failures:
        print("-", line)
    print(f"{'FAILED' if failures else 'PASSED'}; the report is in {report.options['output']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
