"""Validate the GPU engines against the CPU, measure them against PyTorch and the GPU's ceilings: PASSED or FAILED.

python -m bbt_accel.benchmarks.gpu_check -o gpu-check

Needs a GPU and no network: backbones have random weights, rows are those of SST-2 where they are at hand (in --data),
else the shipped ones. An engine that fails is a row of the report. Where time is short, `--families ""` with
`--golden none` measures only, and `--methods ""` validates only. `--device cpu --backbone demo` tries the script itself
where there is no GPU; what it measures then says nothing about one.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from pydantic import Field

from bbt_accel import processes
from bbt_accel.benchmarks.bench import Benchmark
from bbt_accel.benchmarks.bench_report import BenchReport, Measurement
from bbt_accel.benchmarks.gpu_steps import trace_error, validation_error
from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.benchmarks.options import bench_options
from bbt_accel.benchmarks.script import Outcome, Report, page, rows_table, run_script
from bbt_accel.benchmarks.steps import Bundles
from bbt_accel.command import comma_separated
from bbt_accel.engine_specs import EngineSpec, engine_specs
from bbt_accel.errors import BbtError, EngineError
from bbt_accel.machine import describe_machine
from bbt_accel.progress import StepProgress
from bbt_accel.reporting import digits, markdown_list, markdown_table, percent, plain

SECONDS, SPEEDUP, SHARE = 30.0, 12.0, 0.6
"""Targets on one H100, on `WORKLOAD`: seconds of a search, the ratio to the original's forward (eager PyTorch in fp32),
and the share of the measured fp16 rate by the operations that the torch engine needs."""
WORKLOAD = {"backbone": "roberta-large", "popsize": 20, "n_prompt_tokens": 50, "budget": 8000}
ROWS = 32  # of SST-2; the targets are for `WORKLOAD` on these rows
TOLERANCE = {"fp32": 1e-4, "fp16": 0.02}
"""Largest error of logits, relative to the largest logit where that is beyond 1; of losses for recorded traces."""
VARIANTS = (("bbt", "add"), ("bbtv2", "add"), ("bbt", "cat"))
N_PROMPT, TRACE_PROMPT = 5, 10  # prompt tokens of the tiny backbones, and of the recorded traces
TIMED = "fp16"  # the precision that is timed
SIZES = ("popsize", "k_shot", "n_prompt_tokens", "budget", "repeats")  # go to the benchmark as they are


class EngineCheck(Outcome):
    """An engine validated against the CPU."""

    case: str = Field(description="Backbone, method and mode; or the recorded trace.")
    engine: str = Field(description="Engine and precision.")
    error: float | None = Field(default=None, description="Largest error of its logits and losses.")

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE[self.engine.rsplit(" ", 1)[1]]

    @property
    def result(self) -> str:
        return f"error {self.error:.1e}" if self.error is not None else self.reason or "not checked"


class GpuReport(Report):
    """GPU check."""

    interrupted: bool = Field(default=False, description="Whether the check ended before it was complete.")
    errors: list[str] = Field(default_factory=list, description="What ended the measurement of a method.")
    rows: list[EngineCheck] = Field(description="Every engine on every family and recorded trace.")
    benchmarks: list[BenchReport] = Field(description="The speed, one benchmark per method.")

    def failures(self) -> list[str]:
        """What is not as it should be, one line each; empty when the check has passed."""
        found = [f"{check.engine} on {check.case}: {check.result}" for check in self.rows if not check.passed]
        rows = [(report.options.method, row) for report in self.benchmarks for row in report.rows if not row.baseline]
        found += [f"{m}, {row.label}: {row.reason}" for m, row in rows if row.status in ("failed", "not installed")]
        plans = [(m, row) for m, row in rows if row.engine == "trt"]
        found += [f"{m}, {row.label}: no CUDA graphs" for m, row in plans if row.versions.get("cuda graphs") == "off"]
        if self.interrupted:
            found.append("interrupted: the rest has not been checked")
        elif not self.rows:
            found.append("no engine was validated against the CPU")
        return [*found, *self.errors, *self.missed_targets()]

    def markdown(self) -> str:
        failures = self.failures()
        return page(
            f"# GPU check\n\n**{'FAILED' if failures else 'PASSED'}**",
            "\n".join(f"- {line}" for line in failures),
            "Compared with eager PyTorch on the CPU, in fp32; traces: the losses that the original program recorded.",
            rows_table(self.rows, {name: (name, str) for name in ("case", "engine", "result")}, 3),
            *map(speed_section, self.benchmarks),
            markdown_list(self.options | self.provenance()),
        )

    def missed_targets(self) -> list[str]:
        """The targets of bbt on TensorRT in fp16 that are not met, and why they do not apply to another workload."""
        report = next((b for b in self.benchmarks if b.options.method == "bbt"), None)
        goal = next((row for row in report.rows if row.label == "trt fp16"), None) if report else None
        if report is None or goal is None or goal.ms_median is None:
            return ["bbt, trt fp16: not measured, so the target is not met"]
        measured = {**dict(report.options), "backbone": self.options["backbone"]}
        others = [f"{name} {measured[name]}" for name, value in WORKLOAD.items() if measured[name] != value]
        others += [f"{report.n_rows} rows"] if report.n_rows != ROWS else []
        others += ["the shipped rows"] if report.task == "demo" else []
        found = []
        if others:
            wanted = ", ".join(f"{name} {value}" for name, value in WORKLOAD.items())
            found.append(f"the target is for {wanted} and {ROWS} rows of SST-2; this was {', '.join(others)}")
        seconds, speedup = goal.search_seconds or math.inf, goal.speedup or 0.0
        share = fp16_share(report, goal) or 0.0
        targets = [
            (seconds < SECONDS, f"the search takes {seconds:.1f} s, not under {SECONDS:.0f} s"),
            (speedup >= SPEEDUP, f"trt fp16 is {speedup:.1f} times as fast as eager fp32, not {SPEEDUP:.0f}"),
            (share >= SHARE, f"trt fp16 reaches {share:.0%} of the fp16 rate, not {SHARE:.0%}"),
        ]
        return [*found, *(text for met, text in targets if not met)]


def fp16_share(report: BenchReport, row: Measurement) -> float | None:
    """A row's share of the fp16 rate, by the operations that it computes: its own, or those of the torch engine."""
    flops = next((r.flops for r in (row, *report.rows[::-1]) if r.flops), None)
    rate: float | None = report.machine["rates"].get("fp16 PyTorch")
    if rate is None or flops is None or row.candidates_per_second is None:
        return None
    return flops * row.candidates_per_second / (rate * 1e9)


def speed_section(report: BenchReport) -> str:
    """ms per candidate, seconds of a whole search, CMA-ES included, and the share of the fp16 rate."""
    header = ["engine", "ms", "search, s", "× fastest baseline", "× original", "share of fp16 rate, %", "CUDA graphs"]
    lines = []
    for row in report.rows:
        numbers = (row.ms_median, row.search_seconds, row.speedup_over_fastest, row.speedup)
        share, graphs = percent(fp16_share(report, row), 0), row.versions.get("cuda graphs", "–")
        lines.append([row.label, *map(digits, numbers), share, graphs])
    title = f"## Speed: {report.options.method}, {report.batch}, {report.processor}"
    return f"{title}\n\n{markdown_table(header, lines)}\n\nCeilings, 10⁹/s: {plain(report.machine['rates'])}."


def gpu_engines() -> list[tuple[EngineSpec, str]]:
    """Every engine that runs on a GPU, with the precisions that have a tolerance."""
    specs = [spec for spec in engine_specs().values() if "cuda" in spec.backends and not spec.internal]
    return [(spec, precision) for spec in specs for precision in spec.precisions if precision in TOLERANCE]


class SpeedBenchmark(Benchmark):
    """The benchmark of one method; a search in eager PyTorch would take too long."""

    def tunes(self, row: Measurement) -> bool:
        return not row.baseline


class GpuCheck:
    """One run of the check, its bundles in the folder `work`. Raises EngineError when there is no GPU."""

    def __init__(self, given: argparse.Namespace, work: Path, tell: StepProgress) -> None:
        if given.device == "cuda" and not describe_machine()["gpus"]:
            raise EngineError("there is no NVIDIA GPU here (nvidia-smi finds none): nothing was checked")
        self.given, self.work, self.tell = given, work, tell
        self.report = GpuReport(rows=[], benchmarks=[], **given.report)

    def run(self) -> GpuReport:
        """Everything that was asked for. Ctrl-C and SIGTERM end it with a report of what there is."""
        former = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.validate()
            self.replay_traces()
            for method in self.given.methods:
                self.measure(method)
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            signal.signal(signal.SIGTERM, former)
        return self.report

    def validate(self) -> None:
        """Every family, method and engine on batches of several shapes, compared with eager PyTorch on the CPU."""
        from bbt_accel.exporters.families import families

        wanted = families() if self.given.families is None else self.given.families
        for family, (method, mode) in product(wanted, VARIANTS):
            checkpoint = self.work / f"tiny-{family}"
            if not checkpoint.exists():
                processes.call(make_backbone, shape=checkpoint.name, output=checkpoint)
            bundles = self.bundles(f"{family} {method} {mode}", checkpoint, method, mode, N_PROMPT)
            self.check(bundles, validation_error, bundles.exported)

    def replay_traces(self) -> None:
        """The losses that the original program recorded, where its traces are at hand."""
        for trace in sorted(self.given.golden.glob("*.npz")):
            backbone, *words = trace.stem.split("_")
            if {"hinge", "perf"} & set(words):
                continue
            with np.load(trace) as arrays:
                method = "bbt" if len(arrays["A"]) == 1 else "bbtv2"
            checkpoint = min((self.given.golden / "models").glob(f"{backbone}*"))
            mode = "cat" if "cat" in words else "add"
            bundles = self.bundles(f"trace {trace.stem}", checkpoint, method, mode, TRACE_PROMPT)
            self.check(bundles, trace_error, trace.absolute)

    def bundles(self, case: str, checkpoint: Path, method: str, mode: str, n: int) -> Bundles:
        folder = self.work / case
        folder.mkdir()
        return Bundles(folder, checkpoint, {"method": method, "prompt_mode": mode, "n_prompt_tokens": n})

    def check(self, bundles: Bundles, error: Callable[..., float], reference: Callable[[], Path]) -> None:
        """A row of the report for every engine: its error compared with a file."""
        for spec, precision in gpu_engines():
            check = EngineCheck(case=bundles.work.name, engine=f"{spec.name} {precision}")
            self.report.rows.append(check)
            self.tell(f"{check.engine} on {check.case}")
            with check.capture_errors():
                engine = {"bundle": bundles.bundle(spec, precision), "name": spec.name, "device": self.given.device}
                check.error = processes.call(error, reference=reference(), engine=engine)

    def measure(self, method: str) -> None:
        """The engines and the baselines on the workload, and a whole search with each engine."""
        given, folder = self.given, self.work / f"speed-{method}"
        folder.mkdir()
        data = given.data if given.data.is_dir() else None
        backbone, benchmark = given.backbone, None
        asked = {name: getattr(given, name) for name in (*SIZES, "device")}
        engines = [spec.name for spec, precision in gpu_engines() if precision == TIMED]
        try:
            if backbone != "demo" and not Path(backbone).is_dir():
                backbone = str(self.work / backbone)
                if not Path(backbone).exists():
                    make_backbone(given.backbone, backbone)
            where = {"backbone": backbone, "task": "sst2" if data else "demo", "data": data, "method": method}
            how = {"tune": True, "seeds": 1, "test_rows": 64, "precisions": [TIMED], "engines": engines}
            benchmark = SpeedBenchmark(bench_options(**asked, **where, **how), self.report.command, folder, self.tell)
            benchmark.run()
        except BbtError as error:
            self.report.errors.append(f"{method}: {error}")
        finally:
            if benchmark is not None and benchmark.rows and benchmark.original.calls_ms:
                self.report.benchmarks.append(benchmark.report())


def add_options(parser: argparse.ArgumentParser) -> None:
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself")
    parser.add_argument("--backbone", default="roberta-large", help="a shape of make_backbone, a folder, or demo")
    parser.add_argument(
        "--families", type=comma_separated, help='validated with tiny backbones; "" for none (default: all)'
    )
    parser.add_argument("--methods", type=comma_separated, default=["bbt", "bbtv2"], help='timed methods; "" for none')
    parser.add_argument("--popsize", type=int, default=20, help="candidates per call")
    parser.add_argument("--k-shot", type=int, default=16, help="examples per class")
    parser.add_argument("--n-prompt-tokens", type=int, default=50, help="soft prompt vectors")
    parser.add_argument("--calls", type=int, default=8000, dest="budget", help="API calls of a whole search")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls per engine")
    parser.add_argument("--data", type=Path, default=shared / "data" / "sst2", help="SST-2's folder")
    parser.add_argument("--golden", type=Path, default=shared / "golden", help="recorded traces, if there are any")


def main(arguments: list[str] | None = None) -> int:
    report = run_script("gpu_check", __doc__, add_options, lambda *given: GpuCheck(*given).run(), arguments)
    failures = report.failures()
    for line in failures:
        print("-", line)
    print(f"{'FAILED' if failures else 'PASSED'}; the report is in {report.options['output']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
