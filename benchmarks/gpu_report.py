"""The report of the GPU check, and its verdict."""

from __future__ import annotations

import math

from pydantic import Field

from bbt_accel.benchmarks.bench_report import BenchReport, Measurement
from bbt_accel.benchmarks.script import Outcome, Report, page, rows_table
from bbt_accel.reporting import digits, markdown_list, markdown_table, percent, plain

SECONDS = 30.0
"""Target on one H100: a search of 8,000 calls on RoBERTa-large and SST-2, in seconds."""
SPEEDUP = 12.0
"""Target: times as fast as the original's forward, eager PyTorch in fp32."""
SHARE = 0.6
"""Target: share of the measured fp16 rate, by the operations that the torch engine needs."""
WORKLOAD = {"backbone": "roberta-large", "popsize": 20, "n_prompt_tokens": 50, "budget": 8000}
ROWS = 32
"""What the targets are for, on rows of SST-2."""
TOLERANCE = {"fp32": 1e-4, "fp16": 0.02}
"""Largest error of logits, relative to the largest logit where that is beyond 1; of losses for recorded traces."""


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
        found += [
            f"{m}, {row.label}: no CUDA graphs"
            for m, row in rows
            if row.engine == "trt" and row.versions.get("cuda graphs") == "off"
        ]
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


def fp16_share(report: BenchReport, row: Measurement, naive: bool = False) -> float | None:
    """A row's share of the fp16 rate by the operations that it computes, or by those of the original's forward."""
    counted = report.original if naive else next((r for r in (row, *report.rows[::-1]) if r.flops), None)
    rate: float | None = report.machine["rates"].get("fp16 PyTorch")
    if rate is None or counted is None or counted.flops is None or row.candidates_per_second is None:
        return None
    return counted.flops * row.candidates_per_second / (rate * 1e9)


def speed_section(report: BenchReport) -> str:
    """ms per candidate, what the calls of a search take at that rate, a whole search, and shares of the fp16 rate."""
    calls = report.options.budget or 0
    header = ["engine", "ms", f"{calls:,} calls, s", "search, s", "× fastest baseline", "× original"]
    header += ["naive share %", "share %", "CUDA graphs"]
    lines = []
    for row in report.rows:
        at_rate = None if row.ms_median is None else calls * row.ms_median / 1000
        numbers = (row.ms_median, at_rate, row.search_seconds, row.speedup_over_fastest, row.speedup)
        shares = [percent(fp16_share(report, row, naive), 0) for naive in (True, False)]
        lines.append([row.label, *map(digits, numbers), *shares, row.versions.get("cuda graphs", "–")])
    notes = (
        "A search includes CMA-ES. Shares of the fp16 rate: naive by the operations of the original's forward, the "
        f"other by those that are computed. Ceilings, 10⁹/s: {plain(report.machine['rates'])}."
    )
    title = f"## Speed: {report.options.method}, {report.batch}, {report.processor}"
    return f"{title}\n\n{markdown_table(header, lines)}\n\n{notes}"
