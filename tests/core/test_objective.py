"""Losses and metrics against their definitions, and the statistics of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from bbt_accel import Objective
from bbt_accel.core.objective import batch_statistics
from bbt_accel.errors import NonFiniteLoss, UsageError


@st.composite
def scored(draw: st.DrawFn, limit: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    P, N, C = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    number = st.floats(-limit, limit, width=32, allow_subnormal=False)
    logits = draw(st.lists(number, min_size=P * N * C, max_size=P * N * C))
    targets = draw(st.lists(st.integers(0, C - 1), min_size=N, max_size=N))
    return np.array(logits, np.float32).reshape(P, N, C), np.array(targets)


@given(scored())
def test_cross_entropy_is_its_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = case
    losses, _ = Objective("ce").score(logits, targets)
    for candidate, loss in zip(logits.tolist(), losses, strict=True):
        rows = zip(candidate, targets, strict=True)
        wanted = sum(
            math.log(math.fsum(math.exp(x) for x in row)) - row[t] for row, t in rows
        ) / len(targets)
        assert loss == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(scored())
def test_hinge_is_its_definition(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = case
    losses, _ = Objective("hinge").score(logits, targets)
    for candidate, loss in zip(logits.tolist(), losses, strict=True):
        wanted = 0.0
        for row, target in zip(candidate, targets, strict=True):
            wanted += sum(max(0.0, x - row[target] + 2) for c, x in enumerate(row) if c != target)
        assert loss == pytest.approx(wanted / len(targets), rel=1e-9, abs=1e-9)


@given(scored())
def test_perf_is_minus_the_metric(case: tuple[np.ndarray, np.ndarray]) -> None:
    losses, metrics = Objective("perf").score(*case)
    assert (losses == -metrics).all()
    logits, targets = case
    assert metrics.tolist() == pytest.approx(
        [float(np.mean(x.argmax(-1) == targets)) for x in logits]
    )


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_f1_is_that_of_class_1(pairs: list[tuple[int, int]]) -> None:
    predicted, actual = map(list, zip(*pairs, strict=True))
    logits = np.eye(2, dtype=np.float32)[predicted][None]
    _, metrics = Objective("ce", "f1").score(logits, np.array(actual))
    assert metrics[0] == pytest.approx(f1_score(actual, predicted, zero_division=0.0))


@given(scored(limit=2.0**100))
def test_huge_logits_do_not_overflow(case: tuple[np.ndarray, np.ndarray]) -> None:
    for loss in ("ce", "hinge", "perf"):
        losses, metrics = Objective(loss).score(*case)  # type: ignore[arg-type]
        assert losses.dtype == metrics.dtype == np.float64
        assert losses.shape == metrics.shape == case[0].shape[:1]
        assert np.isfinite(losses).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("loss", ["ce", "hinge", "perf"])
def test_a_loss_that_is_not_finite_names_its_candidate(loss: str, value: float) -> None:
    logits = np.zeros((4, 2, 2), np.float32)
    logits[2, 1, 0] = value
    with pytest.raises(NonFiniteLoss, match="candidate 2"):
        Objective(loss).score(logits, np.array([0, 1]))  # type: ignore[arg-type]


@given(scored(), st.data())
def test_batch_statistics_of_several_batches_add_up(
    case: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    logits, targets = case
    split = data.draw(st.integers(0, len(targets)))
    halves = [half for half in (slice(split), slice(split, None)) if len(targets[half])]
    parts = [batch_statistics(logits[:, half], targets[half]) for half in halves]
    np.testing.assert_allclose(
        sum(parts), batch_statistics(logits, targets), rtol=1e-12, atol=1e-12
    )


def test_unknown_names_and_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="choose from ce, hinge, perf"):
        Objective("mse")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choose from accuracy, f1"):
        Objective("ce", "auc")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="targets"):
        Objective().score(np.zeros((1, 2, 2), np.float32), np.array([0, 2]))
    with pytest.raises(UsageError, match="must be"):
        Objective().score(np.zeros((2, 2), np.float32), np.array([0, 1]))
