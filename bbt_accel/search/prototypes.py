"""The readout of DecT (Cui et al., ACL 2023): distances to random prototypes in a space that is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bbt_accel.core.batch import Float64, Int64
from bbt_accel.core.logits import batch_calibration, log_softmax

SIZE = 128  # dimensions of the space of prototypes


def prototype_scores(
    arrays: Mapping[str, Float64], state: npt.ArrayLike, logits: Float64
) -> Float64:
    """−‖norm(W h) − z_k‖ + r_k + λ L_k for states (…, N, H) and calibrated logits (…, N, C)."""
    h = np.asarray(state, np.float64) @ arrays["weight"]
    h = h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
    radius = arrays["radius"] - distances(h, arrays["prototypes"])
    return np.asarray(radius + arrays["share"] * (logits + arrays["bias"]))


def distances(h: Float64, z: Float64) -> Float64:
    """‖h_i − z_k‖, (…, N, C), without an array of N × C differences: of many classes that would be
    large.
    """
    square = (h * h).sum(-1, keepdims=True) - 2 * h @ z.T + (z * z).sum(1)
    return np.asarray(np.sqrt(np.maximum(square, 0)))


def fit_prototypes(
    state: Float64, logits: Float64, targets: Int64, seed: int
) -> dict[str, Float64]:
    """W and r, trained on the cross entropy with Adam (0.01, 30 epochs); the prototypes z_k are
    random and fixed.

    The paper divides the label words' probabilities by those of an empty input. Here they get batch
    calibration, which takes no further call.
    """
    rng, (N, H), C = np.random.default_rng(seed), state.shape, logits.shape[1]
    bound = np.sqrt(6 / (C + SIZE))  # Xavier
    arrays: dict[str, Float64] = {
        "prototypes": rng.uniform(-bound, bound, (C, SIZE)),
        "weight": rng.uniform(-1, 1, (H, SIZE)) / np.sqrt(H),
        "radius": np.zeros(C),
        "share": np.array(C / N),  # λ = 1 / k
        "bias": batch_calibration(logits),
    }
    own = np.equal.outer(targets, np.arange(C)).astype(np.float64)
    start = prototype_scores(arrays, state, logits) - arrays["share"] * (logits + arrays["bias"])
    arrays["radius"] = -(start * own).sum(0) / own.sum(0)  # the class's mean distance
    trained = ("weight", "radius")
    first, second = ({name: np.zeros_like(arrays[name]) for name in trained} for _ in range(2))
    for step in range(1, 31):
        for name, gradient in zip(
            trained, prototype_gradients(arrays, state, logits, own), strict=True
        ):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            arrays[name] = arrays[name] - 0.01 * mean / (np.sqrt(square) + 1e-8)
    return arrays


def prototype_gradients(
    arrays: Mapping[str, Float64], state: Float64, logits: Float64, own: Float64
) -> tuple[Float64, Float64]:
    """Of the mean cross entropy with respect to W (H, 128) and r (C,)."""
    found = (np.exp(log_softmax(prototype_scores(arrays, state, logits))) - own) / len(own)
    h = state @ arrays["weight"]
    length = np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    h = h / length
    z = arrays["prototypes"]
    pull = found / np.maximum(distances(h, z), 1e-12)
    of_h = pull @ z - h * pull.sum(1, keepdims=True)
    return state.T @ ((of_h - h * (of_h * h).sum(1, keepdims=True)) / length), found.sum(0)
