"""From label logits to what the search minimizes, and to the score of the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from bbt_accel.batch import Float32, Int64
from bbt_accel.errors import NonFiniteLoss, UsageError

Loss = Literal["ce", "hinge", "perf"]
Metric = Literal["accuracy", "f1"]
Float64 = npt.NDArray[np.float64]
MARGIN = 2.0
"""Of the hinge loss, as in the original."""


@dataclass(frozen=True)
class Objective:
    """A loss to minimize and a metric to report.

    loss: `ce`, mean cross entropy over the C label words; `hinge`, Σ over rows and wrong classes of
        max(0, logit_c - logit_target + 2), over N; `perf`, minus the metric.
    metric: `accuracy`; `f1`, the F1 of class 1 (0 where it has neither a row nor a prediction), which is what GLUE
        reports for MRPC.

    Raises UsageError for another loss or metric.
    """

    loss: Loss = "ce"
    metric: Metric = "accuracy"

    def __post_init__(self) -> None:
        for kind, value, known in (("loss", self.loss, get_args(Loss)), ("metric", self.metric, get_args(Metric))):
            if value not in known:
                raise UsageError(f"unknown {kind} {value!r}; it is one of {', '.join(known)}")

    def score(self, logits: Float32, targets: Int64, first: int = 0) -> tuple[Float64, Float64]:
        """Losses and metrics of a population.

        logits: float32 (P, N, C); targets: int64 (N,). Returns float64 (P,) and float64 (P,).
        first: number of the first candidate, where these are part of a population.
        Raises NonFiniteLoss when a candidate's logits are NaN or infinite.
        """
        x = np.asarray(logits, dtype=np.float64)
        targets = np.asarray(targets, dtype=np.int64)
        if x.ndim != 3 or targets.shape != x.shape[1:2] or not x.size:
            raise UsageError(f"logits must be (P, N, C) and targets (N,), not {x.shape} and {targets.shape}")
        if not ((targets >= 0) & (targets < x.shape[2])).all():
            raise UsageError(f"targets must lie in 0..{x.shape[2] - 1}; got {targets.min()}..{targets.max()}")
        finite = np.isfinite(x).all(axis=(1, 2))
        if not finite.all():
            raise NonFiniteLoss(
                f"the loss of candidate {first + int(np.argmin(finite))} is not finite (a logit is NaN or infinite); "
                "use an fp32 bundle, or a smaller --sigma or --alpha"
            )
        metrics = _accuracy(x, targets) if self.metric == "accuracy" else _f1(x, targets)
        if self.loss == "perf":
            return -metrics, metrics
        return (_cross_entropy(x, targets) if self.loss == "ce" else _hinge(x, targets)), metrics


def _cross_entropy(x: Float64, targets: Int64) -> Float64:
    shifted = x - x.max(axis=2, keepdims=True)
    per_row = np.log(np.exp(shifted).sum(axis=2)) - shifted[:, np.arange(len(targets)), targets]
    return np.asarray(per_row.mean(axis=1))


def _hinge(x: Float64, targets: Int64) -> Float64:
    rows = np.arange(len(targets))
    violations = np.maximum(0.0, x - x[:, rows, targets][:, :, None] + MARGIN)
    violations[:, rows, targets] = 0.0
    return np.asarray(violations.sum(axis=(1, 2)) / len(targets))


def _accuracy(x: Float64, targets: Int64) -> Float64:
    return np.asarray((x.argmax(axis=2) == targets).mean(axis=1))


def _f1(x: Float64, targets: Int64) -> Float64:
    predicted, actual = x.argmax(axis=2) == 1, targets == 1
    hits = (predicted & actual).sum(axis=1)
    total = predicted.sum(axis=1) + actual.sum()
    return np.asarray(2.0 * hits / np.maximum(total, 1))
