"""The schema of a benchmark's report.json."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from bbt_accel.batch import Float32, Int64
from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.benchmarks.script import Outcome, Provenance, Timed
from bbt_accel.exporters.fidelity import scaled_error
from bbt_accel.objective import Objective
from bbt_accel.reporting import Schema
from bbt_accel.settings import Metric

LARGEST_ERROR = 1e-4
"""An fp32 row passes up to this logit error (`exporters.fidelity.scaled_error`)."""
LEAST_AGREEMENT = 0.97
"""A row of lower precision passes if it predicts eager's class for at least this share of the test rows."""


class Drift(Schema):
    """Time of the original's forward before the other rows and after them."""

    first_ms: float | None = Field(
        default=None, description="Milliseconds per candidate before the other rows, median."
    )
    last_ms: float | None = None
    """Milliseconds per candidate after the other rows, median; None if that failed."""
    change: float | None = None
    """last_ms / first_ms − 1: how much the machine itself changed. Ratios are not more precise than that."""


class TuningScores(Schema):
    """Whole searches, one per seed."""

    seeds: list[int] = Field(description="Seeds of the few-shot rows, the projection and the search.")
    budget: int = Field(description="API calls of each search.")
    scores: list[float] = Field(description="Test score of each search's prompt on the engine that searched for it.")
    mean: float = Field(description="Mean of the scores.")
    std: float | None = Field(description="Standard deviation of the scores (n − 1); None for one seed.")
    seconds: float = Field(description="Mean duration of a search.")


class Measurement(Outcome, Timed):
    """An engine at a precision. None means not measured; `reason` says why."""

    engine: str = Field(description="Name of the engine.")
    precision: str = Field(description="fp32, fp16, bf16 or int8.")
    baseline: bool = False
    """PyTorch without bbt-accel's optimizations: eager is transformers' forward as the original calls it, eager-readout
    the same with the LM head at the readout position alone, compiled is eager-readout under torch.compile."""
    without: list[str] = Field(default_factory=list)
    """Optimizations that were switched off, by their names in bbt_accel.optimizations."""
    ablation: bool = Field(
        default=False, description="Measured to find the contribution of an optimization; not tuned."
    )
    bundle_mib: float | None = None
    """Size of the bundle that the engine read, MiB, tokenizer included."""
    flops: int | None = None
    """Floating-point operations per candidate, matmuls and attention, padding included; PyTorch engines only."""
    calls_ms: list[float] = Field(default_factory=list)
    """Milliseconds per candidate of each timed call, from z to the sums of loss and hits."""
    candidates_per_second: float | None = Field(
        default=None, description="Candidates/s: 1000 over the median milliseconds."
    )
    speedup: float | None = None
    """Ratio of the time of the original's forward (eager fp32) to this row's, medians."""
    speedup_over_fastest: float | None = None
    """Ratio of the time of the fastest baseline that passed to this row's, medians."""
    fp32_share: float | None = None
    """Effective share of the machine's fp32 rate: operations of the original's forward × candidates/s over that rate.
    It exceeds 100 % where redundant computation is avoided or the precision is lower."""
    peak_mib: float | None = None
    """Largest resident memory of the row's process, MiB, from its start to the end of the timed calls."""
    max_error: float | None = None
    """Largest difference of a test row's label logits from eager fp32, relative to the largest logit where that is
    beyond 1; None if a logit is not finite."""
    agreement: float | None = None
    """Share of the test rows with the same predicted class as eager fp32."""
    score: float | None = None
    """The task's metric on the test rows, with the same prompt in every row of the report."""
    tuned: TuningScores | None = Field(default=None, description="Scores of whole searches on this engine.")
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that compute, and the device or provider."""

    @property
    def label(self) -> str:
        """How tables and plots name the row."""
        names = ", ".join(self.without) if len(self.without) < 3 else f"{len(self.without)} optimizations"
        return f"{self.engine} {self.precision}" + (f" without {names}" if names else "")


class BenchReport(Provenance):
    """report.json."""

    version: int = Field(default=2, description="Version of this schema.")
    options: BenchOptions = Field(description="What was asked for; the number of threads is that which was used.")
    task: str = Field(description="Name of the task.")
    metric: Literal["accuracy", "f1"] = Field(description="The metric of all scores.")
    machine: dict[str, Any]
    """Where it ran, and its ceilings: the names of `machine.describe_machine` and `benchmarks.rates.matrix_rates`."""
    n_rows: int = Field(description="N, rows of the timed batch, from the task's train split.")
    length: int = Field(description="S, tokens per row after padding.")
    padding: float = Field(description="Share of the N × S tokens that is padding.")
    n_test_rows: int = Field(description="Rows on which logits, predictions and scores are compared.")
    drift: Drift = Field(description="How steady the machine was.")
    fastest_baseline: str = Field(description="Label of the fastest baseline that passed.")
    rows: list[Measurement]
    """The baselines first, then a row per engine, precision and set of optimizations."""
    notes: list[str] = Field(description="What was left out by default on this machine, and why.")

    @property
    def original(self) -> Measurement:
        """The original's forward: eager fp32."""
        return self.rows[0]

    @property
    def fastest(self) -> Measurement | None:
        """The fastest row that passed, baselines and ablations excepted."""
        found = [m for m in self.rows if m.status == "passed" and m.ms_median and not (m.baseline or m.ablation)]
        return min(found, key=lambda m: m.ms_median or 0.0, default=None)


def check_fidelity(row: Measurement, logits: Float32, eager: Float32, targets: Int64, metric: Metric) -> None:
    """Set a row's error, agreement, score and status from its test logits (N, C) and eager's."""
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    row.agreement = float((finite & (logits.argmax(1) == eager.argmax(1))).mean())
    if not finite.all():
        row.status, row.reason = "differs", f"{(~finite).sum()} of {len(finite)} test rows have NaN or infinite logits"
        return
    row.max_error = scaled_error(logits, eager)
    row.score = score(logits, targets, metric)
    if row.precision == "fp32" and not row.max_error <= LARGEST_ERROR:
        row.status, row.reason = "differs", f"logit error {row.max_error:.1e} is more than {LARGEST_ERROR:.0e}"
    if row.precision != "fp32" and row.agreement < LEAST_AGREEMENT:
        row.status, row.reason = "differs", f"agreement {row.agreement:.3f} is less than {LEAST_AGREEMENT}"


def score(logits: Float32, targets: Int64, metric: Metric) -> float:
    """The task's metric of one prompt's logits (N, C). Raises NonFiniteLoss."""
    return float(Objective("ce", metric).score(logits[None], targets)[1][0])
