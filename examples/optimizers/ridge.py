"""A ridge classifier, and its loss with each row left out, in closed form."""

from __future__ import annotations

import numpy as np

from bbt_accel.core.batch import Float64, Int64


def leave_one_out(x: Float64, targets: Int64, penalty: float) -> float:
    """Mean squared error of every row by the classifier that is fitted without it.

    With the hat matrix H of the fit on all rows, the residual without row i is (y_i − (H y)_i) / (1
    − H_ii) (PRESS; Allen, 1974). x: (N, F), scaled as for `fit`; targets: (N,).
    """
    z, y = x - x.mean(0), signs(targets)
    kernel, N = z @ z.T, len(z)
    hat = 1 / N + kernel @ np.linalg.inv(
        kernel + penalty * np.eye(N)
    )  # the intercept has no penalty
    residuals = (y - hat @ y) / (1 - np.diag(hat))[:, None]
    return float((residuals**2).mean())


def fit(x: Float64, targets: Int64, penalty: float) -> tuple[Float64, Float64]:
    """Weight (F, C) and bias (C,) that minimize Σ ‖x W + b − y‖² + penalty ‖W‖², y being 1 for the
    class, else −1.
    """
    mean, y = x.mean(0), signs(targets)
    z = x - mean
    weight = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), y - y.mean(0))
    return weight, y.mean(0) - mean @ weight


def signs(targets: Int64) -> Float64:
    """(N, C): 1 for a row's class, −1 for the others."""
    return 2.0 * np.equal.outer(targets, np.arange(targets.max() + 1)) - 1
