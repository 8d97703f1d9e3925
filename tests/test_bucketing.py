"""Length buckets: every row once, similar lengths together, and as few tokens as possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbt_accel.engines.bucketing import split_points


def cost(lengths: np.ndarray, where: list[int], overhead: int) -> int:
    """Tokens that are computed: each bucket's rows times its longest, plus its overhead."""
    return sum(len(part) * int(part[-1]) + overhead for part in np.split(lengths, where))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted), st.integers(0, 40))
def test_no_other_buckets_cost_fewer_tokens(lengths: list[int], overhead: int) -> None:
    rows = np.array(lengths)
    every = (c for k in range(len(rows)) for c in itertools.combinations(range(1, len(rows)), k))
    assert cost(rows, split_points(rows, overhead), overhead) == min(cost(rows, list(c), overhead) for c in every)


@pytest.mark.parametrize(
    ("overhead", "where"),
    [(0, [2, 3, 5]), (5, [3, 5]), (1000, [])],
    ids=["no padding", "few buckets", "one bucket"],
)
def test_a_bucket_costs_its_overhead(overhead: int, where: list[int]) -> None:
    assert split_points(np.array([5, 5, 6, 9, 9, 20]), overhead) == where
