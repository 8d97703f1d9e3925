"""How far an engine is from eager PyTorch: logits, predictions, scores."""

from __future__ import annotations

from statistics import mean, stdev

import numpy as np

from bbt_accel.batch import Batch, Float32, Int64
from bbt_accel.benchmarks.report import Row, Tuned
from bbt_accel.engines.base import Engine
from bbt_accel.exporters.validate import scaled_error
from bbt_accel.objective import Metric, Objective

LARGEST_ERROR = 1e-4
"""An fp32 row passes if its logits differ by no more, relative to the largest logit where that is beyond 1."""
LEAST_AGREEMENT = 0.97
"""A row of lower precision passes if it predicts eager's class for this share of the test rows."""
ROWS = 64
"""Test rows that an engine holds at a time."""


def row_logits(engine: Engine, batch: Batch, prompt: Float32) -> Float32:
    """Label logits (N, C) of all rows for one prompt, a few rows at a time."""
    parts = []
    for start in range(0, len(batch), ROWS):
        with engine.bind(batch.rows(slice(start, start + ROWS))) as bound:
            parts.append(bound.label_logits(prompt[None])[0])
    return np.concatenate(parts)


def judge(row: Row, logits: Float32, eager: Float32, targets: Int64, metric: Metric) -> None:
    """Compare a row's test logits (N, C) with eager's, and set its error, agreement, score and status."""
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


def summarize(seeds: list[int], budget: int, scores: list[float], seconds: list[float]) -> Tuned:
    return Tuned(
        seeds=seeds,
        budget=budget,
        scores=scores,
        mean=mean(scores),
        std=stdev(scores) if len(scores) > 1 else None,
        seconds=mean(seconds),
    )
