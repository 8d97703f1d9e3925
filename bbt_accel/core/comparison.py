"""How close outputs are to those of a reference: the measures, and the table of tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np

from bbt_accel.core.batch import Float32

ENGINE = 1e-5
"""Scaled error of an engine in fp32 against the naive forward."""
EXPORT = 1e-4
"""Scaled error of exported graphs, and of an fp32 row of a benchmark, against eager PyTorch."""
CONVERSION = 1e-3
"""Scaled error of a converted bundle in fp32 against its source: more means a wrong rewrite."""
PADDING = 0.05
"""Scaled error of rows with more padding: more means a lost attention mask."""
AGREEMENT = 0.97
"""Share of eager PyTorch's predictions that an engine in a lower precision has to give."""
PACKAGE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 5e-2, "int4": 1e-3}
"""Scaled error of a package's scores against `predict`: rounding to 8 and 16 bits amplifies what
differs in fp32 between two batches."""


def fidelity(found: Float32, wanted: Float32) -> dict[str, float]:
    """All measures of logits (P, N, C), by their names in reports.

    agreement: the share of equal predictions.

    >>> fidelity(np.float32([[[1, 3]]]), np.float32([[[1, 4]]]))["agreement"]
    1.0
    """
    return {
        "logit_error": scaled_error(found, wanted),
        "logit_rmse": relative_rmse(found, wanted),
        "agreement": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
    }


def scaled_errors(found: Any, wanted: Any) -> Any:
    """Absolute differences, relative to the largest reference value if that exceeds 1."""
    return np.abs(found - wanted) / max(1.0, float(np.abs(wanted).max(initial=0)))


def scaled_error(found: Float32, wanted: Float32) -> float:
    """The largest of `scaled_errors`; inf if shapes differ, NaN if there is one."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(scaled_errors(found, wanted).max())


def relative_rmse(found: Float32, wanted: Float32) -> float:
    """Root mean square error relative to the reference's root mean square, both centred over the
    classes: an offset that all classes share reaches no prediction and no loss.
    """
    found, wanted = (x - x.mean(axis=-1, keepdims=True) for x in (found, wanted))
    error, size = (float(np.sqrt(np.mean(x**2))) for x in (found - wanted, wanted))
    return error / max(size, 1e-12)
