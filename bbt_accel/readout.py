"""Readouts: from what a forward pass returns to class scores, fitted on the labelled rows of a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from bbt_accel.batch import Float32, Float64, Int64
from bbt_accel.bundle import STATES
from bbt_accel.errors import RunError, first_line
from bbt_accel.files import sha256, write_atomically
from bbt_accel.projection import one_blas_thread
from bbt_accel.settings import ReadoutName

BIAS_PENALTY = 0.05
"""λ of a fitted class bias."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Of a linear readout's squared weights, for standardized features; cross-validation chooses."""
FOLDS = 8
REGRESSIONS = ("words", "state", "mean", "states")  # logistic regressions on features
LINEAR = ("found", *REGRESSIONS, "ensemble")  # features times a weight, plus a bias
OF_WORDS = ("found", "words")  # whose features are the logits of further words
FOUND_WORDS = 8  # label words of a class that `found` takes
STATES_OF = {
    "prototype": STATES[:1],
    "state": STATES[:1],
    "mean": STATES[1:],
    "states": STATES,
    "ensemble": STATES,
}
"""The hidden states that a readout reads, if any."""
PROTOTYPE_SIZE = 128  # DecT: dimensions of the space of prototypes
Outputs = Mapping[str, Float32]
"""What `BoundBatch.outputs` returns, of one prompt: label_logits (N, M), readout_state and mean_state (N, H)."""


def log_softmax(scores: npt.ArrayLike) -> Float64:
    """Log-probabilities, float64, over the last axis."""
    x = np.asarray(scores, np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@dataclass(frozen=True)
class Readout:
    """Class scores of rows as a function of what a forward pass returns for them.

    name: one of `READOUTS`. classes: int64 (M,), the class of each label word, in the order of their logits; a class
        with several words has the mean of theirs. token_ids: int64 (F,), further words whose logits are features.
    arrays: float64, what was fitted.
    """

    name: ReadoutName
    classes: Int64
    token_ids: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    arrays: dict[str, Float64] = field(default_factory=dict)

    def biased(self, bias: Float64) -> Readout:
        """The same with a bias (C,) added to its scores; not for the verbalizer, which has no numbers."""
        name = "radius" if self.name == "prototype" else "bias"
        return replace(self, arrays=self.arrays | {name: self.arrays[name] + bias})

    def class_logits(self, outputs: Outputs) -> Float64:
        """The verbalizer: float64 (…, N, C)."""
        return class_logits(outputs["label_logits"], self.classes)

    def scores(self, outputs: Outputs) -> Float64:
        """Class scores, float64 (…, N, C), whose softmax gives the probabilities."""
        if self.name == "verbalizer":
            return self.class_logits(outputs)
        if self.name == "calibrated":
            return self.class_logits(outputs) + self.arrays["bias"]
        if self.name == "prototype":
            return prototype_scores(self.arrays, outputs["readout_state"], self.class_logits(outputs))
        x = np.concatenate(features(self.name, outputs, self.classes), axis=-1)
        return x @ self.arrays["weight"] + self.arrays["bias"]

    def save(self, file: Path) -> str:
        """Write it as safetensors; returns the file's sha256."""
        tensors = {**self.arrays, "classes": self.classes, "token_ids": self.token_ids}
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        write_atomically(file, save(tensors, {"name": self.name}))
        return sha256(file)

    @classmethod
    def load(cls, file: Path) -> Readout:
        """Raises RunError for a file that is not a readout."""
        try:
            with safe_open(file, "numpy") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                return cls(tensors.metadata()["name"], arrays.pop("classes"), arrays.pop("token_ids"), arrays)
        except Exception as error:  # safetensors raises its own, besides OSError and KeyError
            raise RunError(f"cannot read {file} ({first_line(error)}); tune again") from None


def reads_states(name: ReadoutName) -> bool:
    """Whether a readout needs hidden states besides label logits."""
    return name in STATES_OF


def batch_calibration(logits: Float64) -> Float64:
    """Minus the mean log-probability of each class, (…, N, C) to (…, C): a bias that needs no labels.

    Zhou et al., ICLR 2024.
    """
    return np.asarray(-log_softmax(logits).mean(-2))


def with_calibrated(logits: Float64) -> Float64:
    """(N, C) → (2, N, C): logits as they are, and with batch calibration."""
    return np.stack([logits, logits + batch_calibration(logits)])


def class_logits(label_logits: npt.ArrayLike, classes: Int64) -> Float64:
    """(…, N, M or more) → (…, N, C): the mean over the words of each class."""
    words = np.asarray(label_logits, np.float64)[..., : len(classes)]
    return words if one_word_each(classes) else np.asarray(words @ word_shares(classes))


def word_shares(classes: Int64) -> Float64:
    """(M, C): the share of each label word in the logit of its class."""
    own = np.equal.outer(classes, np.arange(classes.max() + 1)).astype(np.float64)
    return np.asarray(own / own.sum(0))


def one_word_each(classes: Int64) -> bool:
    """Whether every class has one label word, so that label logits are class logits."""
    return np.array_equal(classes, np.arange(len(classes)))


def features(name: str, outputs: Outputs, classes: Int64) -> list[Float64]:
    """The blocks of features that a linear readout takes, each float64 (…, N, F)."""
    if name in OF_WORDS:
        return [np.asarray(outputs["label_logits"][..., len(classes) :], np.float64)]
    states = [np.asarray(outputs[state], np.float64) for state in STATES_OF[name]]
    return [class_logits(outputs["label_logits"], classes), *states] if name == "ensemble" else states


# Fitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledRows:
    """Rows to fit readouts on: what a forward pass returned for them, and their classes.

    outputs: of N rows. targets: (N,). classes, token_ids: as in `Readout`.
    seed: of the folds, and of DecT's prototypes.
    """

    outputs: Outputs
    targets: Int64
    classes: Int64
    token_ids: Int64
    seed: int

    def __getitem__(self, index: Int64) -> LabelledRows:
        some = {name: value[index] for name, value in self.outputs.items()}
        return replace(self, outputs=some, targets=self.targets[index])


def fit(name: ReadoutName, rows: LabelledRows) -> Readout:
    """Fit a readout, in float64; the same on every call."""
    arrays: dict[str, Float64] = {}
    with one_blas_thread():  # several are slower on so few rows, and their number would decide the last bits
        logits = class_logits(rows.outputs["label_logits"], rows.classes)
        if name == "calibrated":
            arrays["bias"] = fit_bias(logits, rows.targets)[0]
        elif name == "prototype":
            state = np.asarray(rows.outputs["readout_state"], np.float64)
            arrays = fit_prototypes(state, logits, rows.targets, rows.seed)
        elif name == "found":
            (words,) = features(name, rows.outputs, rows.classes)
            arrays = fit_found(words, rows.targets)
        elif name != "verbalizer":
            arrays = FITS[name](features(name, rows.outputs, rows.classes), rows.targets, rows.seed)[0]
    return Readout(name, rows.classes, rows.token_ids if name in OF_WORDS else rows.token_ids[:0], arrays)


def held_out(name: ReadoutName, rows: LabelledRows) -> Float64:
    """Scores (N, C) of each row by a readout that was fitted on the other folds.

    A regression's penalty and an ensemble's temperature are chosen by the same scores.
    """
    with one_blas_thread():
        if name in FITS:
            return FITS[name](features(name, rows.outputs, rows.classes), rows.targets, rows.seed)[1]
        return held_out_scores(
            lambda some, others: fit(name, rows[some]).scores(rows[others].outputs), rows.targets, rows.seed
        )


def fit_bias(logits: Float64, targets: Int64) -> tuple[Float64, float]:
    """A bias b for each class, and the loss with it, which is mean CE(L + b, y) + λ‖b - b0‖².

    b0 is that of batch calibration. The problem is convex; it is solved by Newton's method.
    logits: (N, C); targets: (N,). Returns float64 (C,) and the loss.
    """
    N, C = logits.shape
    shares = np.bincount(targets, minlength=C) / N
    start = batch_calibration(logits)
    logits, bias = logits + start, np.zeros(C)

    def objective(bias: Float64) -> float:
        return log_loss(logits + bias, targets) + BIAS_PENALTY * float(bias @ bias)

    value = objective(bias)
    for _ in range(50):
        p = np.exp(log_softmax(logits + bias))
        gradient = p.mean(0) - shares + 2 * BIAS_PENALTY * bias
        hessian = np.diag(p.mean(0) + 2 * BIAS_PENALTY) - p.T @ p / N
        step = np.linalg.solve(hessian, gradient)
        while (lower := objective(bias - step)) > value + 1e-12:  # some fraction of a step lowers a convex function
            step = step / 2
        bias, value = bias - step, lower
        if np.abs(step).max() < 1e-10:
            break
    return start + bias, value


def fit_found(words: Float64, targets: Int64) -> dict[str, Float64]:
    """Label words found on the rows: for each class the `FOUND_WORDS` with the highest mean log-probability in its
    rows, compared with that in all rows, as in BBT-RGB (Sun et al., 2023); and a class bias.

    words: logits (N, F). A class's score is the mean logit of its words: weight (F, C) and bias (C,).
    """
    likely = log_softmax(words)
    gain = np.stack([likely[targets == c].mean(0) for c in range(targets.max() + 1)], axis=1) - likely.mean(0)[:, None]
    weight = np.zeros_like(gain)
    count = min(FOUND_WORDS, len(gain))
    for c, best in enumerate(np.argsort(-gain, axis=0, kind="stable")[:count].T):
        weight[best, c] = 1 / count
    return {"weight": weight, "bias": fit_bias(words @ weight, targets)[0]}


def fit_linear(blocks: Sequence[Float64], targets: Int64, seed: int) -> tuple[dict[str, Float64], Float64]:
    """The mean of one logistic regression on each block of features (N, F): weight (ΣF, C) and bias (C,).

    And the held-out scores (N, C), by which the penalty of each block is chosen.
    """
    weights, biases, scores = zip(*(fit_regression(x, targets, seed) for x in blocks), strict=True)
    arrays = {"weight": np.concatenate(weights) / len(weights), "bias": np.mean(biases, axis=0)}
    return arrays, np.mean(scores, axis=0)


def fit_ensemble(blocks: Sequence[Float64], targets: Int64, seed: int) -> tuple[dict[str, Float64], Float64]:
    """The product of the probabilities of calibrated label words, and of a logistic regression on each hidden state,
    with a temperature that minimizes the held-out loss: weight (C + ΣH, C) and bias (C,); and the held-out scores.

    blocks: class logits (N, C), then states (N, H). The label words know the task from their meaning, the regressions
    from the labels.
    """
    logits, *states = blocks
    scores = held_out_scores(
        lambda some, others: logits[others] + fit_bias(logits[some], targets[some])[0], targets, seed
    )
    experts = [(np.eye(logits.shape[1]), fit_bias(logits, targets)[0], scores)]
    experts += [fit_regression(x, targets, seed) for x in states]
    held = np.sum([log_softmax(scores) for *_, scores in experts], axis=0)
    t = fit_temperature(held, targets)
    weight, bias = np.concatenate([own for own, _, _ in experts]), np.sum([own for _, own, _ in experts], axis=0)
    return {"weight": t * weight, "bias": t * bias}, t * held


FITS = {**dict.fromkeys(REGRESSIONS, fit_linear), "ensemble": fit_ensemble}
"""Readouts whose fit has held-out scores as a by-product."""


def fit_temperature(scores: Float64, targets: Int64) -> float:
    """The factor in [1/20, 20] that minimizes the cross entropy of the scores (N, C) times it, a convex function."""
    low, high = -np.log(20), np.log(20)
    for _ in range(50):  # bisection of the derivative
        t = np.exp((low + high) / 2)
        p = np.exp(log_softmax(t * scores))
        slope = float((p * scores).sum(1).mean() - scores[np.arange(len(targets)), targets].mean())
        low, high = (np.log(t), high) if slope < 0 else (low, np.log(t))
    return float(np.exp((low + high) / 2))


def fit_regression(x: Float64, targets: Int64, seed: int) -> tuple[Float64, Float64, Float64]:
    """A logistic regression: weight (F, C) and bias (C,); and the held-out scores (N, C) that choose its penalty."""
    tried = {
        penalty: held_out_scores(partial(linear_scores, x, targets, penalty), targets, seed) for penalty in PENALTIES
    }
    best = min(tried, key=lambda penalty: log_loss(tried[penalty], targets))
    return *logistic_regression(x, targets, best), tried[best]


def linear_scores(x: Float64, targets: Int64, penalty: float, rows: Int64, others: Int64) -> Float64:
    weight, bias = logistic_regression(x[rows], targets[rows], penalty)
    return np.asarray(x[others] @ weight + bias)


def logistic_regression(x: Float64, targets: Int64, penalty: float) -> tuple[Float64, Float64]:
    """Multinomial, on standardized features: weight (F, C) and bias (C,) for x (N, F) itself."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-6 * max(1e-30, np.abs(x).max()), std, 1.0)
    z = (x - mean) / std
    # N rows span at most N directions, in which the solution lies; there it is found sooner.
    _, _, basis = np.linalg.svd(z, full_matrices=False)
    with warnings.catch_warnings(action="ignore"):  # of a limit that separable rows reach
        model = LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-6).fit(z @ basis.T, targets)
    weight, bias = basis.T @ model.coef_.T, model.intercept_
    if weight.shape[1] == 1:  # two classes: one column, the log-odds of the second
        weight, bias = weight * [-0.5, 0.5], bias * np.array([-0.5, 0.5])
    weight = weight / std[:, None]
    return weight, bias - mean @ weight


def held_out_scores(scores: Callable[[Int64, Int64], Float64], targets: Int64, seed: int) -> Float64:
    """Scores (N, C) of every row by a readout that was fitted without it: `FOLDS` folds, stratified by class.

    scores: from the indices of the rows to fit on, and of those to score, to the scores of the latter.
    """
    from sklearn.model_selection import StratifiedKFold

    folds = min(FOLDS, int(np.bincount(targets).min()))
    found = np.zeros((len(targets), targets.max() + 1))
    if folds < 2:  # one example of a class: nothing to hold out
        return scores(np.arange(len(targets)), np.arange(len(targets)))
    for rows, others in StratifiedKFold(folds, shuffle=True, random_state=seed).split(targets, targets):
        found[others] = scores(rows, others)
    return found


def f1_bias(scores: Float64, targets: Int64, share: float | None = None) -> Float64:
    """A class bias (2,) with which taking the higher score gives the highest expected F1 of class 1.

    F1 is highest when class 1 is predicted above half of that F1 (Lipton et al., 2014). If the k most probable rows are
    predicted as class 1, the expected F1 is 2 Σ p over these / (k + Σ p over all rows).
    scores: held-out scores, (N, 2). share: share of class 1 among the rows to predict, by default that of the targets
        (N,); probabilities and the weights of the rows are corrected for it.
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


def log_loss(scores: Float64, targets: Int64) -> float:
    """Mean cross entropy of scores (N, C)."""
    return float(row_losses(scores, targets).mean())


def row_losses(scores: Float64, targets: Int64) -> Float64:
    """Cross entropy of each row: (N, C) and (N,) to (N,)."""
    return -log_softmax(scores)[np.arange(len(targets)), targets]


# DecT (Cui et al., ACL 2023) ---------------------------------------------------------------------------------


def prototype_scores(arrays: Mapping[str, Float64], state: npt.ArrayLike, logits: Float64) -> Float64:
    """−‖norm(W h) − z_k‖ + r_k + λ L_k for states (…, N, H) and calibrated logits (…, N, C)."""
    h = np.asarray(state, np.float64) @ arrays["weight"]
    h = h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), 1e-12)
    distance = np.linalg.norm(h[..., None, :] - arrays["prototypes"], axis=-1)
    return np.asarray(arrays["radius"] - distance + arrays["share"] * (logits + arrays["bias"]))


def fit_prototypes(state: Float64, logits: Float64, targets: Int64, seed: int) -> dict[str, Float64]:
    """W and r, trained on the cross entropy with Adam (0.01, 30 epochs); the prototypes z_k are random and fixed.

    The paper divides the label words' probabilities by those of an empty input. Here they get batch calibration, which
    takes no further call.
    """
    rng, (N, H), C = np.random.default_rng(seed), state.shape, logits.shape[1]
    bound = np.sqrt(6 / (C + PROTOTYPE_SIZE))  # Xavier
    arrays: dict[str, Float64] = {
        "prototypes": rng.uniform(-bound, bound, (C, PROTOTYPE_SIZE)),
        "weight": rng.uniform(-1, 1, (H, PROTOTYPE_SIZE)) / np.sqrt(H),
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
        for name, gradient in zip(trained, prototype_gradients(arrays, state, logits, own), strict=True):
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
    difference = h[:, None] - arrays["prototypes"]
    towards = difference / np.maximum(np.linalg.norm(difference, axis=2, keepdims=True), 1e-12)
    of_h = -(found[:, :, None] * towards).sum(1)
    return state.T @ ((of_h - h * (of_h * h).sum(1, keepdims=True)) / length), found.sum(0)
