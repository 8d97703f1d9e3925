"""From label logits to what the search minimizes, and to the score of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from bbt_accel.core.batch import Float32, Float64, Int64
from bbt_accel.core.logits import IN_FP32, log_softmax
from bbt_accel.core.settings import Loss, Metric
from bbt_accel.errors import NonFiniteLoss, UsageError, check_known

MARGIN = 2.0  # of the hinge loss, as in the original
PRIOR_PENALTY = 0.01
"""λ of a bias for other class frequencies."""
COLUMNS = ("ce", "hinge", "correct", "true_positives", "positives")
"""Columns of the batch statistics: sums over the rows of the cross entropy, of the hinge loss, of
correct predictions, of those of class 1, and of all predictions of class 1."""


def batch_statistics(logits: Float32 | Float64, targets: Int64) -> Float64:
    """The sums from which every loss and metric follows, for each candidate: float64 (P, 5),
    columns `COLUMNS`.

    logits: float32 (P, N, C); targets: int64 (N,). The losses of a candidate with a NaN or infinite
    logit are NaN. Statistics of several batches add up. `engines.torch_statistics.batch_statistics`
    is the same in fp32, unchecked. Raises UsageError for other shapes, and for a target that is not
    a class.
    """
    x = np.asarray(logits, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.int64)
    if x.ndim != 3 or targets.shape != x.shape[1:2] or not x.size:
        raise UsageError(
            f"logits must be (P, N, C) and targets (N,), not {x.shape} and {targets.shape}"
        )
    check_targets(targets, x.shape[2])
    finite = np.asarray(np.isfinite(x).all(axis=(1, 2)))
    x = np.where(finite[:, None, None], x, 0.0)
    rows, predicted = np.arange(len(targets)), x.argmax(axis=2)
    shifted = x - x.max(axis=2, keepdims=True)
    cross_entropy = np.log(np.exp(shifted).sum(axis=2)) - shifted[:, rows, targets]
    violations = np.maximum(0.0, x - x[:, rows, targets][:, :, None] + MARGIN)
    violations[:, rows, targets] = 0.0
    correct, positives = predicted == targets, predicted == 1
    columns = [cross_entropy, violations.sum(axis=2), correct, correct & (targets == 1), positives]
    found = np.stack([column.sum(axis=1, dtype=np.float64) for column in columns], axis=1)
    found[~finite, :2] = np.nan
    return found


def check_targets(targets: Int64, classes: int) -> None:
    """Raises UsageError for a target outside 0 .. classes - 1."""
    if not ((targets >= 0) & (targets < classes)).all():
        raise UsageError(
            f"targets must lie in 0..{classes - 1}; got {targets.min()}..{targets.max()}"
        )


def uninformed(targets: Int64, classes: int, metric: Metric) -> tuple[float, float]:
    """The metric of drawing a class at random, and of always predicting the most frequent one.

    accuracy: 1 / C, and that class's share. f1 of class 1 with the share p: p / (p + ½) from the
    expected counts, and 2 p / (p + 1) where no class is more frequent than class 1, else 0.
    """
    shares = np.bincount(targets, minlength=classes) / len(targets)
    frequent = most_frequent(targets, classes, metric)
    if metric == "accuracy":
        return 1 / classes, float(shares[frequent])
    p = float(shares[1])
    return p / (p + 0.5), 2 * p / (p + 1) if frequent == 1 else 0.0


def most_frequent(targets: Int64, classes: int, metric: Metric) -> int:
    """The class of most rows; of equally many the first, for F1 class 1."""
    counts = np.bincount(targets, minlength=classes)
    return int(counts.argmax()) if metric == "accuracy" or counts[1] < counts[0] else 1


def f1_bias(scores: Float64, targets: Int64, share: float | None = None) -> Float64:
    """A class bias (2,) with which taking the higher score gives the highest expected F1 of class
    1.

    F1 is highest when class 1 is predicted above half of that F1 (Lipton et al., 2014). If the k
    most probable rows are predicted as class 1, the expected F1 is 2 Σ p over these / (k + Σ p over
    all rows).
    scores: held-out scores, (N, 2). share: share of class 1 among the rows to predict, by default
        that of the targets (N,); probabilities and the weights of the rows are corrected for it.
    """
    own = float(np.mean(targets == 1))
    share = own if share is None else share
    prior = np.log(share / (1 - share)) - np.log(own / (1 - own))
    p = np.exp(log_softmax(scores + np.array([0.0, prior])))[:, 1]
    weight = np.where(targets == 1, share / own, (1 - share) / (1 - own))
    order = np.argsort(-p, kind="stable")
    hits = (weight * p)[order].cumsum()
    threshold = max(float((hits / (weight[order].cumsum() + hits[-1])).max()), 1e-300)
    return np.array([0.0, prior + np.log((1 - threshold) / threshold)])


def prior_bias(scores: Float64, targets: Int64, shares: Float64) -> Float64:
    """A class bias (C,) from the frequencies of the classes among these rows to `shares`, which sum
    to 1.

    By Bayes' rule log(shares / own) corrects scores whose prior is that of the rows. Regularized
    fits have it only roughly, and an ensemble has it several times. So the bias is b = log(shares /
    own) + c, where c minimizes CE(scores + b, y) + λ‖c‖², and each row counts as much more as its
    class is more frequent. 0, without a fit of c, where all classes are equally frequent in both.
    scores: held-out scores, (N, C).
    """
    from scipy.optimize import minimize

    own = np.bincount(targets, minlength=len(shares)) / len(targets)
    if np.ptp(own) < 1e-9 and np.ptp(shares) < 1e-9:
        return np.zeros(len(shares))
    prior, weight = np.log(shares / own), (shares / own)[targets] / len(targets)
    wanted = np.bincount(targets, weight, len(shares))

    def loss(c: Float64) -> tuple[float, Float64]:
        likely = log_softmax(scores + prior + c)
        gradient = weight @ np.exp(likely) - wanted + 2 * PRIOR_PENALTY * c
        return float(
            PRIOR_PENALTY * c @ c - weight @ likely[np.arange(len(targets)), targets]
        ), gradient

    found = minimize(
        loss,
        np.zeros(len(shares)),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    return np.asarray(prior + found.x)


def wilson(shares: Any, rows: int, z: float = 1.96) -> tuple[Any, Any]:
    """Wilson's score interval of each share of `rows` rows. z: 1.96 for 95 %."""
    centre = (shares + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * np.sqrt(shares * (1 - shares) / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    return centre - half, centre + half


@dataclass(frozen=True)
class Objective:
    """A loss to minimize and a metric to report.

    loss: `ce`, the cross entropy of a softmax over the C classes, mean over the rows; `hinge`, Σ
        over rows and wrong classes of max(0, logit_c - logit_target + 2), over N; `perf`, minus the
        metric.
    metric: `accuracy`; `f1`, the F1 of class 1 (0 where it has neither a row nor a prediction),
        which is what GLUE reports for MRPC.
    class_shares: how frequent each class is among the rows to predict, in proportion, where the
    task tells it. Raises UsageError for an unknown loss or metric.
    """

    loss: Loss = "ce"
    metric: Metric = "accuracy"
    class_shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_known("loss", self.loss, get_args(Loss))
        check_known("metric", self.metric, get_args(Metric))

    def score(
        self, logits: Float32 | Float64, targets: Int64, first: int = 0
    ) -> tuple[Float64, Float64]:
        """Losses and metrics of a population.

        logits: float32 or float64 (P, N, C), a column for each class; targets: int64 (N,). Returns
        float64 (P,) twice.
        first: number of the first candidate, where these are a slice of a population.
        Raises UsageError for other shapes and for a target that is not a class, NonFiniteLoss when
        a candidate's logits are NaN or infinite.
        """
        return self.from_statistics(batch_statistics(logits, targets), targets, first)

    def from_statistics(
        self, found: Float64, targets: Int64, first: int = 0
    ) -> tuple[Float64, Float64]:
        """Losses and metrics of a population from its batch statistics (P, 5), as `score` gives
        them.

        Raises NonFiniteLoss when the losses of a candidate are NaN.
        """
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            raise NonFiniteLoss(
                f"the loss of candidate {first + int(np.argmin(finite))} is not finite (a logit is "
                f"NaN or infinite); {IN_FP32} or, with the normal projection, a smaller --alpha"
            )
        sums = dict(zip(COLUMNS, found.T, strict=True))
        if self.metric == "accuracy":
            metrics = sums["correct"] / len(targets)
        else:
            metrics = (
                2.0
                * sums["true_positives"]
                / np.maximum(sums["positives"] + np.sum(np.equal(targets, 1)), 1)
            )
        return (-metrics if self.loss == "perf" else sums[self.loss] / len(targets)), metrics

    @property
    def biased(self) -> bool:
        """Whether the scores of a readout need a class bias."""
        return self.metric == "f1" or self.class_shares is not None

    def class_bias(self, held_out: Float64, targets: Int64) -> Float64:
        """The class bias (C,) with which taking the highest score is best for the metric and the
        class shares.

        held_out: scores (N, C) by readouts that were fitted without the row; targets: (N,).
        """
        shares = (
            None
            if self.class_shares is None
            else np.asarray(self.class_shares) / sum(self.class_shares)
        )
        if self.metric == "f1":
            return f1_bias(held_out, targets, None if shares is None else float(shares[1]))
        return (
            np.zeros(held_out.shape[1]) if shares is None else prior_bias(held_out, targets, shares)
        )
