"""Fitting readouts on the labelled rows of a prompt: in float64, the same on every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from bbt_accel.core.batch import Float64, Int64
from bbt_accel.core.logits import batch_calibration, log_loss, log_softmax
from bbt_accel.core.objective import Objective
from bbt_accel.core.projection import one_blas_thread
from bbt_accel.core.settings import ReadoutName
from bbt_accel.search.prototypes import fit_prototypes
from bbt_accel.search.readout import Outputs, Readout, features, reads_words

BIAS_PENALTY = 0.05
"""λ of a fitted class bias."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Of a linear readout's squared weights, for standardized features; cross-validation chooses."""
FOLDS = 8
FOUND_WORDS = 8  # label words of a class that `found` takes


Blocks = Sequence[Float64]
Arrays = dict[str, Float64]
Fit = tuple[Arrays, Float64 | None]
"""What a fit returns: the arrays of a readout, and held-out scores (N, C) where it has them
anyway.
"""


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
    """A readout, fitted on all the rows."""
    return fit_once(name, rows)[0]


def held_out(name: ReadoutName, rows: LabelledRows) -> Float64:
    """Scores (N, C) of each row by a readout that was fitted on the other folds.

    A regression's penalty and an ensemble's temperature are chosen by the same scores.
    """
    scores = fit_once(name, rows)[1]
    return refitted(name, rows) if scores is None else scores


def fit_for(objective: Objective, name: ReadoutName, rows: LabelledRows) -> tuple[Readout, Float64]:
    """A readout, and the class bias (C,) that its scores need; see `Objective.class_bias`."""
    readout, scores = fit_once(name, rows)
    if not objective.biased:  # so that no held-out scores are needed
        return readout, np.zeros(rows.classes.max() + 1)
    return readout, objective.class_bias(
        refitted(name, rows) if scores is None else scores, rows.targets
    )


def fit_once(name: ReadoutName, rows: LabelledRows) -> tuple[Readout, Float64 | None]:
    """A fitted readout; and the held-out scores (N, C), where its fit has them as a by-product."""
    with (
        one_blas_thread
    ):  # several are slower on so few rows, and their number would decide the last bits
        arrays, scores = FITS[name](
            features(name, rows.outputs, rows.classes), rows.targets, rows.seed
        )
    return Readout(
        name, rows.classes, rows.token_ids if reads_words(name) else rows.token_ids[:0], arrays
    ), scores


def refitted(name: ReadoutName, rows: LabelledRows) -> Float64:
    """Held-out scores (N, C), by a fit for each fold."""
    with one_blas_thread:
        return held_out_scores(
            lambda some, others: fit(name, rows[some]).scores(rows[others].outputs),
            rows.targets,
            rows.seed,
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
        while (
            lower := objective(bias - step)
        ) > value + 1e-12:  # some fraction of a step lowers a convex function
            step = step / 2
        bias, value = bias - step, lower
        if np.abs(step).max() < 1e-10:
            break
    return start + bias, value


def fit_calibrated(blocks: Blocks, targets: Int64, seed: int) -> Fit:
    """A class bias (C,)."""
    return {"bias": fit_bias(blocks[0], targets)[0]}, None


def fit_prototype(blocks: Blocks, targets: Int64, seed: int) -> Fit:
    """DecT's prototypes, on the state and the class logits."""
    state, logits = blocks
    return fit_prototypes(state, logits, targets, seed), None


def fit_found(blocks: Blocks, targets: Int64, seed: int) -> Fit:
    """Label words found on the rows: for each class the `FOUND_WORDS` with the highest mean
    log-probability in its rows, compared with that in all rows, as in BBT-RGB (Sun et al., 2023);
    and a class bias.

    blocks: word logits (N, F). A class's score is the mean logit of its words: weight (F, C) and
    bias (C,).
    """
    (words,) = blocks
    likely = log_softmax(words)
    gain = (
        np.stack([likely[targets == c].mean(0) for c in range(targets.max() + 1)], axis=1)
        - likely.mean(0)[:, None]
    )
    weight = np.zeros_like(gain)
    count = min(FOUND_WORDS, len(gain))
    for c, best in enumerate(np.argsort(-gain, axis=0, kind="stable")[:count].T):
        weight[best, c] = 1 / count
    return {"weight": weight, "bias": fit_bias(words @ weight, targets)[0]}, None


def fit_linear(blocks: Blocks, targets: Int64, seed: int) -> tuple[Arrays, Float64]:
    """The mean of one logistic regression on each block of features (N, F): weight (ΣF, C) and bias
    (C,).

    And the held-out scores (N, C), by which the penalty of each block is chosen.
    """
    weights, biases, scores = zip(*(fit_regression(x, targets, seed) for x in blocks), strict=True)
    arrays = {"weight": np.concatenate(weights) / len(weights), "bias": np.mean(biases, axis=0)}
    return arrays, np.mean(scores, axis=0)


def fit_ensemble(blocks: Blocks, targets: Int64, seed: int) -> tuple[Arrays, Float64]:
    """The product of the probabilities of calibrated label words, and of a logistic regression on
    each hidden state, with a temperature that minimizes the held-out loss: weight (C + ΣH, C) and
    bias (C,); and the held-out scores.

    blocks: class logits (N, C), then states (N, H). The label words know the task from their
    meaning, the regressions from the labels.
    """
    logits, *states = blocks
    scores = held_out_scores(
        lambda some, others: logits[others] + fit_bias(logits[some], targets[some])[0],
        targets,
        seed,
    )
    experts = [(np.eye(logits.shape[1]), fit_bias(logits, targets)[0], scores)]
    experts += [fit_regression(x, targets, seed) for x in states]
    held, apart = (
        np.sum([log_softmax(scores) for *_, scores in experts], axis=0),
        held_apart(targets),
    )
    t = fit_temperature(held[apart], targets[apart])
    weight, bias = (
        np.concatenate([own for own, _, _ in experts]),
        np.sum([own for _, own, _ in experts], axis=0),
    )
    return {"weight": t * weight, "bias": t * bias}, t * held


FITS: dict[ReadoutName, Callable[[Blocks, Int64, int], Fit]] = {
    "verbalizer": lambda blocks, targets, seed: ({}, None),
    "calibrated": fit_calibrated,
    "found": fit_found,
    "prototype": fit_prototype,
    "words": fit_linear,
    "state": fit_linear,
    "mean": fit_linear,
    "states": fit_linear,
    "ensemble": fit_ensemble,
}
"""How each readout is fitted, from what it reads (`READS`), the targets (N,) and the seed."""


def fit_temperature(scores: Float64, targets: Int64) -> float:
    """The factor in [1/20, 20] that minimizes the cross entropy of the scores (N, C) times it, a
    convex function.

    1 where all rows are classified rightly: the cross entropy then has no minimum, which says
    little of a few rows.
    """
    if (scores.argmax(1) == targets).all():
        return 1.0
    low, high = -np.log(20), np.log(20)
    for _ in range(50):  # bisection of the derivative
        t = np.exp((low + high) / 2)
        p = np.exp(log_softmax(t * scores))
        slope = float((p * scores).sum(1).mean() - scores[np.arange(len(targets)), targets].mean())
        low, high = (np.log(t), high) if slope < 0 else (low, np.log(t))
    return float(np.exp((low + high) / 2))


def fit_regression(x: Float64, targets: Int64, seed: int) -> tuple[Float64, Float64, Float64]:
    """A logistic regression: weight (F, C) and bias (C,); and the held-out scores (N, C) that
    choose its penalty.

    The last ones are kept: `auto` tries several readouts with the same regressions on the same
    rows.
    """
    return _regression(
        np.asarray(x, np.float64).tobytes(), x.shape, np.asarray(targets, np.int64).tobytes(), seed
    )


@lru_cache(maxsize=8)
def _regression(
    content: bytes, shape: tuple[int, int], classes: bytes, seed: int
) -> tuple[Float64, Float64, Float64]:
    x, targets = np.frombuffer(content, np.float64).reshape(shape), np.frombuffer(classes, np.int64)
    tried = {
        penalty: held_out_scores(partial(linear_scores, x, targets, penalty), targets, seed)
        for penalty in PENALTIES
    }
    apart = held_apart(targets)
    best = min(tried, key=lambda penalty: log_loss(tried[penalty][apart], targets[apart]))
    return *logistic_regression(x, targets, best), tried[best]


def linear_scores(
    x: Float64, targets: Int64, penalty: float, rows: Int64, others: Int64
) -> Float64:
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


def held_apart(targets: Int64) -> Int64:
    """Indices of the rows that `held_out_scores` scores by a fit without them; all rows where there
    are none.
    """
    counts = np.bincount(targets)
    return np.flatnonzero((counts[targets] > 1) | (counts.max() == 1))


def held_out_scores(
    scores: Callable[[Int64, Int64], Float64], targets: Int64, seed: int
) -> Float64:
    """Scores (N, C) of every row by a readout that was fitted without it: `FOLDS` folds, stratified
    by class. The only row of a class is scored by a fit that has it.

    scores: from the indices of the rows to fit on, and of those to score, to the scores of the
    latter.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(targets)
    folds, single = min(FOLDS, int(counts.max())), np.flatnonzero(counts[targets] == 1)
    every, several = np.arange(len(targets)), np.flatnonzero(counts[targets] > 1)
    found = np.zeros((len(targets), len(counts)))
    if folds < 2:  # one example of each class: nothing to hold out
        return scores(every, every)
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer rows than folds
        splits = list(
            StratifiedKFold(folds, shuffle=True, random_state=seed).split(several, targets[several])
        )
    for rows, others in splits:
        found[several[others]] = scores(np.concatenate([several[rows], single]), several[others])
    if single.size:  # without it there would be no fit of its class
        found[single] = scores(every, single)
    return found
