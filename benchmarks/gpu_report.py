"""The report of the GPU check: report.json, report.md, and the verdict."""

from __future__ import annotations

from pydantic import Field

from bbt_accel.benchmarks.markdown import digits
from bbt_accel.benchmarks.report import Part
from bbt_accel.display import markdown_table, text

SECONDS = 30.0
"""Target on one H100: a search of 8,000 calls on RoBERTa-large and SST-2, in seconds."""
SPEEDUP = 12.0
"""Target: times as fast as eager PyTorch in fp32."""
SHARE = 0.6
"""Target: share of the measured fp16 matrix rate."""
WORKLOAD = {"backbone": "roberta-large", "rows": 32, "popsize": 20, "n_prompt_tokens": 50, "calls": 8000}
"""What the targets are for, on rows of SST-2."""
TOLERANCE = {"fp32": 1e-4, "fp16": 0.02}
"""Largest error of logits, relative to the largest logit where that is beyond 1; of losses for recorded traces."""


class Check(Part):
    """An engine held to the CPU."""

    case: str
    """Backbone, method and mode; or the recorded trace."""
    engine: str
    """Engine and precision."""
    error: float | None = None
    reason: str | None = None
    """Why there is no error to report."""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE[self.engine.rsplit(" ", 1)[1]]


class Speed(Part):
    """An engine's time on the workload."""

    method: str
    engine: str
    """Engine and precision."""
    reason: str | None = None
    """Why it was not measured."""
    ms: float | None = None
    """Milliseconds a candidate, median of the calls."""
    search_seconds: float | None = None
    """Seconds that the calls of a search would take at that rate, CMA-ES not counted."""
    speedup: float | None = None
    """Over eager fp32."""
    naive_share: float | None = None
    """The naive forward's operations a second over the fp16 matrix rate: more than is computed."""
    share: float | None = None
    """The operations that are computed a second over the fp16 matrix rate."""
    measured_search: float | None = None
    """Seconds of a whole search, CMA-ES included; None where it was not run."""
    versions: dict[str, str] = Field(default_factory=dict)


class GpuReport(Part):
    """report.json."""

    created: str
    command: str
    device: str
    gpus: list[str]
    backbone: str
    rows: int
    popsize: int
    n_prompt_tokens: int
    calls: int
    data: str
    """Where the rows are from."""
    interrupted: bool
    """Whether the check was ended before its end."""
    matrix_tflops: float | None
    """Measured: 10¹² fp16 operations a second of a large matrix product in PyTorch."""
    bandwidth_gbs: float | None
    """Measured: 10⁹ bytes a second read and written by a large copy on the device."""
    checks: list[Check]
    speeds: list[Speed]
    versions: dict[str, str]

    def failures(self) -> list[str]:
        """What is not as it should be, one line each; empty when the check has passed."""
        found = [f"{c.engine} on {c.case}: {c.reason or f'error {c.error:.1e}'}" for c in self.checks if not c.passed]
        found += [f"{s.method}, {s.engine}: {s.reason}" for s in self.speeds if s.reason]
        found += [
            f"{s.method}, {s.engine}: calls are not CUDA graphs"
            for s in self.speeds
            if s.engine.startswith("trt") and s.versions.get("cuda graphs") == "off"
        ]
        if self.interrupted:
            found.append("interrupted: the rest has not been checked")
        elif not self.checks:
            found.append("no engine was held to the CPU")
        goal = next((s for s in self.speeds if (s.method, s.engine) == ("bbt", "trt fp16")), None)
        if goal is None or goal.ms is None:
            return [*found, "bbt, trt fp16: not measured, so the target is not met"]
        seconds = goal.measured_search or goal.search_seconds
        others = [f"{name} {getattr(self, name)}" for name, wanted in WORKLOAD.items() if getattr(self, name) != wanted]
        others += ["the shipped rows"] if self.data == "demo" else []
        if others:
            wanted = ", ".join(f"{name} {value}" for name, value in WORKLOAD.items())
            found.append(f"the target is for {wanted} and rows of SST-2; this was {', '.join(others)}")
        if seconds is None or not seconds < SECONDS:
            found.append(f"the search takes {seconds or float('nan'):.1f} s, not under {SECONDS:.0f} s")
        if goal.speedup is None or not goal.speedup >= SPEEDUP:
            found.append(f"trt fp16 is {goal.speedup or 0:.1f} times as fast as eager fp32, not {SPEEDUP:.0f}")
        if goal.share is None or not goal.share >= SHARE:
            found.append(f"trt fp16 reaches {goal.share or 0:.0%} of the fp16 matrix rate, not {SHARE:.0%}")
        return found

    def markdown(self) -> str:
        failures = self.failures()
        parts = [
            "# GPU check",
            f"**{'FAILED' if failures else 'PASSED'}**",
            *(["\n".join(f"- {line}" for line in failures)] if failures else []),
            "## Exactness",
            "Against eager PyTorch on the CPU, in fp32; traces: losses against those that the original recorded.",
            markdown_table(
                ["case", "engine", "status", "error"],
                [
                    [c.case, c.engine, "passed" if c.passed else "failed", c.reason or f"{c.error:.1e}"]
                    for c in self.checks
                ],
                text_columns=4,
            ),
            "## Speed",
            f"{self.backbone}, {self.rows} rows ({self.data}), {self.popsize} candidates a call, on {self.device}"
            f"{''.join(f'; {gpu}' for gpu in self.gpus)}. Ceilings: fp16 matrix rate {number(self.matrix_tflops)} "
            f"TFLOP/s, copy {number(self.bandwidth_gbs)} GB/s.",
            markdown_table(
                [
                    "method", "engine", "ms", f"{self.calls:,} calls, s", "search, s", "× eager", "naive rate", "rate",
                    "CUDA graphs",
                ],
                [
                    [
                        s.method, s.engine, number(s.ms) if s.ms else s.reason or "–", number(s.search_seconds),
                        number(s.measured_search), number(s.speedup), percent(s.naive_share), percent(s.share),
                        s.versions.get("cuda graphs", "–"),
                    ]
                    for s in self.speeds
                ],
                text_columns=9,
            ),
            "ms is for one candidate, from z to its loss, the projection included. The next column is what the "
            "calls of a search would take at that rate, then comes a whole search with CMA-ES. Rates are shares of the "
            "fp16 matrix rate: of the naive forward's operations, and of those that are computed.",
            f"{self.created}; `{self.command}`; {text(self.versions)}",
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    return "–" if value is None else digits(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
