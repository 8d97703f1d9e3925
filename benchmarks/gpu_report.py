"""What the GPU check finds, when it has passed, and its report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import Field

from bbt_accel.benchmarks.bench_report import BenchReport, Measurement
from bbt_accel.benchmarks.gpu_state import GpuState, doubts, peak_of
from bbt_accel.benchmarks.script import Columns, Outcome, Report, page, rows_table
from bbt_accel.core.comparison import RMSE
from bbt_accel.core.option_types import PROMPT_TOKENS
from bbt_accel.core.settings import DEFAULTS
from bbt_accel.io.reporting import digits, markdown_list, markdown_table, percent, plain

GPU, SECONDS, SPEEDUP, SHARE = "H100", 30.0, 12.0, 0.6
"""Targets on one GPU of this name, on `WORKLOAD`: seconds of a search, the ratio to the original's
forward (eager PyTorch in fp32 without TF32), and the share of the measured fp16 rate by the
operations that the torch engine needs."""
WORKLOAD = {
    "backbone": "roberta-large", "popsize": DEFAULTS.popsize, "n_prompt_tokens": PROMPT_TOKENS,
    "budget": DEFAULTS.budget,
}  # fmt: skip
ROWS = 32  # of SST-2; the targets are for `WORKLOAD` on these rows
TF32, HALF = "eager-tf32 fp32", "eager fp16"
"""Further baselines that the speed is compared with."""


def worst(errors: Iterable[float]) -> float:
    """The largest; infinity where one is not finite. Python's max would drop a NaN that does not
    come first.
    """
    found = list(errors)
    return max(found) if found and all(map(math.isfinite, found)) else math.inf


class EngineCheck(Outcome):
    """An engine validated against the CPU."""

    case: str = Field(description="Backbone, method and mode; or the recorded trace.")
    engine: str = Field(description="Engine and precision.")
    error: float | None = Field(
        default=None, description="Largest noise of its logits, or error of its losses."
    )

    @property
    def limit(self) -> float:
        return RMSE[self.engine.rsplit(" ", 1)[1]]

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit

    @property
    def result(self) -> str:
        return f"{self.error:.1e}" if self.error is not None else self.reason or "not checked"

    @property
    def problem(self) -> str:
        beyond = self.error is not None and not self.error <= self.limit
        return f"{self.result}, more than {self.limit:.0e}" if beyond else self.result


class TimedCheck(EngineCheck):
    """The numbers of a plan or graph that is timed, on one bucket of its rows, compared with eager
    fp32.
    """

    tokens: int = Field(default=0, description="Of the bucket, padding included, per candidate.")
    noise: dict[str, float] = Field(
        default={}, description="By how it ran: enqueued, captured, launched."
    )
    launches: bool = Field(
        default=False, description="Whether the engine makes CUDA graphs of such calls."
    )
    identical: bool | None = Field(
        default=None, description="Whether a launched graph gives the enqueued call's bits."
    )

    @property
    def passed(self) -> bool:
        if self.launches and not (self.identical and "launched" in self.noise):
            return False
        return super().passed

    @property
    def result(self) -> str:
        if self.reason or not self.noise:
            return self.reason or "not checked"
        text = ", ".join(f"{way} {noise:.1e}" for way, noise in self.noise.items())
        if self.launches and "launched" not in self.noise:
            return f"{text}; never launched as a CUDA graph"
        return f"{text}; launched and enqueued calls differ" if self.identical is False else text


class GpuReport(Report):
    """GPU check."""

    interrupted: bool = Field(
        default=False, description="Whether the check ended before it was complete."
    )
    errors: list[str] = Field(
        default_factory=list, description="What ended the measurement of a method."
    )
    expected: list[tuple[str, str]] = Field(
        default=[], description="Case and engine of every check of `rows`."
    )
    left_out: list[str] = Field(
        default=[], description="What was not checked, and why; it is no failure."
    )
    partial: list[str] = Field(
        default=[], description="What belongs to the check and was not asked for."
    )
    gpu: GpuState | None = Field(default=None, description="The GPU under load.")
    rows: list[EngineCheck] = Field(description="Every engine on every family and recorded trace.")
    timed: list[TimedCheck] = Field(
        default=[], description="What is timed, compared with eager fp32."
    )
    attention: list[str] = Field(
        default=[], description="In which plans attention is one kernel, by method and engine."
    )
    benchmarks: list[BenchReport] = Field(description="The speed, one benchmark per method.")

    def failures(self) -> list[str]:
        """What is not as it should be, one line each; empty when the check has passed."""
        checks: Sequence[EngineCheck] = [*self.rows, *self.timed]
        found = [
            f"{check.engine} on {check.case}: {check.problem}"
            for check in checks
            if not check.passed
        ]
        done = {(check.case, check.engine) for check in self.rows}
        found += [
            f"{engine} on {case}: not checked"
            for case, engine in self.expected
            if (case, engine) not in done
        ]
        if self.interrupted:
            found.append("interrupted: the rest has not been checked")
        elif not self.expected:
            found.append("no engine was validated against the CPU")
        found += [f"a partial check: {line} was not asked for" for line in self.partial]
        return [*found, *self.errors, *self.unmeasured(), *self.missed_targets()]

    def unmeasured(self) -> list[str]:
        """Engines that failed, gave logits that are not finite, were not compared, or did not run
        as CUDA graphs.

        Of the baselines those that the speed is compared with.
        """
        found = []
        compared = {(check.case.partition(",")[0], check.engine) for check in self.timed}
        for report in self.benchmarks:
            method = report.options.method
            for row in report.rows:
                where = f"{method}, {row.label}"
                wanted = not row.baseline or row.label in (TF32, HALF)
                # Random weights make labels close: how often predictions agree is reported, and no
                # failure.
                infinite = row.status == "differs" and row.max_error is None
                if wanted and (row.status in ("failed", "not installed") or infinite):
                    found.append(f"{where}: {row.reason}")
                elif not row.baseline and (method, row.label) not in compared:
                    found.append(f"{where}: timed, but not compared with eager fp32")
                if row.graph_share is not None and row.graph_share < 1:
                    share = f"{row.graph_share:.1%} of the timed calls were CUDA graphs"
                    found.append(f"{where}: {share}; from the third generation on all should be")
        return found

    def missed_targets(self) -> list[str]:
        """The targets of bbt on TensorRT in fp16 that are not met, and why they do not apply to
        another workload.
        """
        report = next((b for b in self.benchmarks if b.options.method == "bbt"), None)
        goal = (
            next((row for row in report.rows if row.label == "trt fp16"), None) if report else None
        )
        if report is None or goal is None or goal.ms_median is None:
            return ["bbt, trt fp16: not measured, so the target is not met"]
        seconds, speedup = goal.search_seconds or math.inf, goal.speedup or 0.0
        share = self.fp16_share(report, goal) or 0.0
        targets = [
            (seconds < SECONDS, f"the search takes {seconds:.1f} s, not under {SECONDS:.0f} s"),
            (
                speedup >= SPEEDUP,
                f"trt fp16 is {speedup:.1f} times as fast as eager fp32, not {SPEEDUP:.0f}",
            ),
            (share >= SHARE, f"trt fp16 reaches {share:.0%} of the fp16 rate, not {SHARE:.0%}"),
        ]
        missed = [text for met, text in targets if not met]
        return [*self.other_workload(report), *doubts(self.gpu, report.machine["rates"]), *missed]

    def fp16_share(self, report: BenchReport, row: Measurement) -> float | None:
        """A row's share of the fp16 rate, by the operations that it computes.

        Those that are not counted are the torch engine's per token, times its own tokens: their
        buckets differ.
        """
        counted = next((r for r in (row, *report.rows[::-1]) if r.flops), None)
        rate: float | None = report.machine["rates"].get("fp16 PyTorch")
        if rate is None or counted is None or not counted.flops or row.calls_per_second is None:
            return None
        own, others = (self.tokens(report, r) for r in (row, counted))
        if counted is not row and not (own and others):
            return None
        flops = counted.flops * (1.0 if counted is row else own / others)
        return flops * row.calls_per_second / (rate * 1e9)

    def tokens(self, report: BenchReport, row: Measurement) -> int:
        """Tokens per candidate that a row computes, padding included; 0 if its buckets were not
        compared.
        """
        case = f"{report.options.method}, "
        return sum(
            check.tokens
            for check in self.timed
            if check.engine == row.label and check.case.startswith(case)
        )

    def other_workload(self, report: BenchReport) -> list[str]:
        """In what the measured workload and GPU are not those of the targets; empty when they
        are.
        """
        measured = {**dict(report.options), "backbone": self.options["backbone"]}
        others = [
            f"{name} {measured[name]}"
            for name, value in WORKLOAD.items()
            if measured[name] != value
        ]
        others += [f"{report.n_rows} rows"] if report.n_rows != ROWS else []
        others += ["the shipped rows"] if report.task == "demo" else []
        name = "an unknown GPU" if self.gpu is None else self.gpu.name
        others += [name] if GPU not in name else []
        if not others:
            return []
        wanted = ", ".join(f"{name} {value}" for name, value in WORKLOAD.items())
        return [
            f"the target is for {wanted} and {ROWS} rows of SST-2 on an {GPU}; this was {', '.join(others)}"
        ]

    def markdown(self) -> str:
        failures = self.failures()
        columns: Columns = {name: (name, str) for name in ("case", "engine", "result")}
        left_out = "\n".join(f"- Not checked: {line}" for line in self.left_out)
        return page(
            f"# GPU check\n\n**{'FAILED' if failures else 'PASSED'}**",
            "\n".join(f"- {line}" for line in failures),
            left_out,
            self.ceilings(),
            "Compared with eager PyTorch on the CPU, in fp32; traces: the losses that the original program recorded.",
            rows_table(self.rows, columns, 3),
            "## What is timed\n\nLabel logits of fixed z in every bucket, compared with eager fp32 on the GPU.",
            rows_table(self.timed, columns, 3),
            "\n".join(f"- Attention of {line}" for line in self.attention),
            *map(self.speed, self.benchmarks),
            markdown_list(self.options | self.provenance()),
        )

    def ceilings(self) -> str:
        """The GPU under load, and each measured ceiling beside the published one."""
        if self.gpu is None or not self.benchmarks:
            return ""
        rates, peak = self.benchmarks[0].machine["rates"], peak_of(self.gpu.name)
        published = (
            "not known" if peak is None else f"fp16 {digits(peak.fp16)}, bytes {digits(peak.bytes)}"
        )
        return f"## GPU\n\n{self.gpu}\n\nMeasured, 10⁹/s: {plain(rates)}. Published: {published}."

    def speed(self, report: BenchReport) -> str:
        """ms per candidate, seconds of a whole search, CMA-ES included, ratios, and the share of
        the fp16 rate.
        """
        header = [
            "engine",
            "ms",
            "search, s",
            "× eager fp32",
            "× eager TF32",
            "× eager fp16",
            "× fastest baseline",
        ]
        header += ["share of fp16 rate, %", "CUDA graphs, %"]
        lines = []
        for row in report.rows:
            ratios = (
                row.speedup,
                ratio(report, row, TF32),
                ratio(report, row, HALF),
                row.speedup_over_fastest,
            )
            shares = [
                percent(share, 0) for share in (self.fp16_share(report, row), row.graph_share)
            ]
            lines.append(
                [row.label, *map(digits, (row.ms_median, row.search_seconds, *ratios)), *shares]
            )
        title = f"## Speed: {report.options.method}, {report.batch}, {report.processor}"
        reasons = "\n".join(
            f"- {row.label}: {row.status}: {row.reason}" for row in report.rows if row.reason
        )
        overheads = [
            f"{row.label} {digits(row.call_overhead)}"
            for row in report.rows
            if row.call_overhead is not None
        ]
        note = f"A call's overhead, in tokens: {', '.join(overheads)}." if overheads else ""
        return page(title, markdown_table(header, lines), reasons, note).rstrip()


def ratio(report: BenchReport, row: Measurement, label: str) -> float | None:
    """How many times as fast a row is as another of the report."""
    base = next((other.ms_median for other in report.rows if other.label == label), None)
    return None if base is None or row.ms_median is None else base / row.ms_median
