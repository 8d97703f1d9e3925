"""Fidelity of label logits to a reference: the comparison that export checks, reports and benchmarks share."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Float32


def fidelity(logits: Float32, reference: Float32) -> dict[str, float]:
    """All measures of label logits (P, N, C) against those of a reference, by their names in reports.

    agreement: the share of equal predictions.
    """
    return {
        "logit_error": scaled_error(logits, reference),
        "logit_rmse": relative_rmse(logits, reference),
        "agreement": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
    }


def scaled_error(logits: Float32, reference: Float32) -> float:
    """Largest absolute difference, relative to the largest reference logit if that exceeds 1; inf if shapes differ."""
    if logits.shape != reference.shape:
        return float("inf")
    return float(np.abs(logits - reference).max() / max(1.0, np.abs(reference).max()))


def relative_rmse(logits: Float32, reference: Float32) -> float:
    """Root mean square error relative to the reference's root mean square, both after centring over the classes.

    Only differences between classes reach a prediction or a loss, so an offset that all classes share is no error.
    """
    found, wanted = (x - x.mean(axis=-1, keepdims=True) for x in (logits, reference))
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / max(float(np.sqrt(np.mean(wanted**2))), 1e-12))
