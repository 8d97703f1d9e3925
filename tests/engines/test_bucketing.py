"""Length buckets: every row once, similar lengths together, and as few tokens as possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import tiny_bundle

from bbt_accel import Batch
from bbt_accel.engines.bucketing import bucket_rows, split_points, trim


def cost(lengths: np.ndarray, where: list[int], overhead: int) -> int:
    """Tokens that are computed: each bucket's rows times its longest, plus its overhead."""
    return sum(len(part) * int(part[-1]) + overhead for part in np.split(lengths, where))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted), st.integers(0, 40))
def test_no_other_buckets_cost_fewer_tokens(lengths: list[int], overhead: int) -> None:
    rows = np.array(lengths)
    every = (c for k in range(len(rows)) for c in itertools.combinations(range(1, len(rows)), k))
    assert cost(rows, split_points(rows, overhead), overhead) == min(
        cost(rows, list(c), overhead) for c in every
    )


@settings(deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(9, 60), min_size=1, max_size=12), n=st.integers(1, 20),
    case=st.sampled_from([("roberta", "add"), ("roberta", "cat"), ("gpt2", "cat"), ("llama",
    "cat"), ("llama", "add")]),
    context=st.integers(0, 11),
)  # fmt: skip
def test_rows_of_a_bucket_are_padded_to_the_same_length_that_they_would_have_alone(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    n: int,
    case: tuple[str, str],
    context: int,
) -> None:
    """With no cost of a bucket, and a step of 8 keys."""
    family, mode = case
    info = tiny_bundle(tmp_path_factory.mktemp("bundle"), family, mode, n, max_length=100).info
    info = info.model_copy(
        update={"without": ["prefix-cache"]}
    )  # with it a decoder's bucket has a cost
    lengths = [length + (n if mode == "add" else 0) for length in lengths]
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    shared = np.arange(context) if info.causal else None
    last = np.array(lengths) - 1
    batch = Batch(np.ones_like(mask), mask, last, last * 0, np.arange(2), context_ids=shared)
    buckets = bucket_rows(info, batch, frozenset(), 8, 10**6, 10**6)
    assert sorted(np.concatenate(buckets).tolist()) == list(range(len(lengths)))
    for rows in buckets:
        padded = trim(info, batch, rows, frozenset(), 8, 1000).input_ids.shape[1]
        alone = {
            trim(info, batch, rows[i : i + 1], frozenset(), 8, 1000).input_ids.shape[1]
            for i in range(len(rows))
        }
        assert alone == {padded}
