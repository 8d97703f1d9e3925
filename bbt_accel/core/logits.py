"""From logits of label words to class logits, log-probabilities and losses, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bbt_accel.core.batch import Float64, Int64
from bbt_accel.errors import NonFiniteLoss

IN_FP32 = "use a bundle in fp32"
"""What to do about a value that is not finite."""


def require_finite(values: npt.ArrayLike, what: str) -> None:
    """Raises NonFiniteLoss for NaN and infinite values."""
    if not np.isfinite(values).all():
        raise NonFiniteLoss(f"{what} is NaN or infinite; {IN_FP32}")


def log_softmax(scores: npt.ArrayLike) -> Float64:
    """Log-probabilities, float64, over the last axis."""
    x = np.asarray(scores, np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def log_loss(scores: Float64, targets: Int64) -> float:
    """Mean cross entropy of scores (N, C)."""
    return float(row_losses(scores, targets).mean())


def row_losses(scores: Float64, targets: Int64) -> Float64:
    """Cross entropy of each row: (N, C) and (N,) to (N,)."""
    return -log_softmax(scores)[np.arange(len(targets)), targets]


def batch_calibration(logits: Float64) -> Float64:
    """Minus the mean log-probability of each class, (…, N, C) to (…, C): a bias that needs no
    labels.

    Zhou et al., ICLR 2024.
    """
    return np.asarray(-log_softmax(logits).mean(-2))


def class_logits(label_logits: npt.ArrayLike, classes: Int64) -> Float64:
    """(…, N, M or more) → (…, N, C): the mean over the words of each class."""
    words = np.asarray(label_logits, np.float64)[..., : len(classes)]
    return words if one_word_each(classes) else np.asarray(words @ word_shares(classes))


def scores_without_search(label_logits: npt.ArrayLike, classes: Int64) -> Float64:
    """Class scores (2, N, C) from label logits (N, M or more): as they are, and with batch
    calibration.
    """
    logits = class_logits(label_logits, classes)
    return np.stack([logits, logits + batch_calibration(logits)])


def word_shares(classes: Int64) -> Float64:
    """(M, C): the share of each label word in the logit of its class."""
    own = np.equal.outer(classes, np.arange(classes.max() + 1)).astype(np.float64)
    return np.asarray(own / own.sum(0))


def one_word_each(classes: Int64) -> bool:
    """Whether every class has one label word, so that label logits are class logits."""
    return np.array_equal(classes, np.arange(len(classes)))
