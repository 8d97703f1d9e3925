"""Length buckets: which rows of a batch are computed together, and how they are trimmed."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Batch, Int64
from bbt_accel.bundle import BundleInfo
from bbt_accel.errors import DataError


def row_lengths(info: BundleInfo, batch: Batch) -> Int64:
    """Columns that each row needs, (N,): up to its last real token, and to a readout position in the input."""
    columns = np.arange(1, batch.input_ids.shape[1] + 1)
    lengths: Int64 = (columns * batch.attention_mask).max(axis=1)
    return lengths if info.decodes else np.maximum(lengths, batch.readout + 1)


def bucket_rows(info: BundleInfo, batch: Batch, without: frozenset[str], max_tokens: int, step: int) -> list[Int64]:
    """Row indices of each bucket: rows of similar length (up to a multiple of `step`), at most `max_tokens` in all.

    A decoder computes the n positions of its prompt once per bucket and candidate, so it gets no more buckets than
    pay off; in add mode the rows of a bucket begin with the same n tokens.
    """
    lengths = np.maximum(row_lengths(info, batch), info.shortest_row)
    group, prefix = np.zeros(len(batch), np.int64), 0
    if info.causal and "prefix-cache" not in info.without:
        prefix = info.n_prompt_tokens
        if info.prompt_mode == "add":
            group = group_by_beginning(batch, prefix)
    buckets = []
    for value in np.unique(group):
        rows = np.flatnonzero(group == value)
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        rounded = -(-lengths[rows] // step) * step
        parts = [rows] if "buckets" in without else np.split(rows, split_points(rounded, prefix))
        for part in parts:
            width = batch.input_ids.shape[1] if "buckets" in without else int(lengths[part].max())
            size = max(1, max_tokens // width)
            buckets += [part[i : i + size] for i in range(0, len(part), size)]
    return buckets


def group_by_beginning(batch: Batch, n: int) -> Int64:
    """(N,): equal for rows with the same first n tokens. Raises DataError for a readout position among them."""
    if (batch.readout < n).any():
        raise DataError("a readout position lies within the prompt; a decoder reads behind it")
    start = np.concatenate([batch.input_ids[:, :n], batch.attention_mask[:, :n]], axis=1)
    _, same = np.unique(start, axis=0, return_inverse=True)
    return np.asarray(same.reshape(-1), np.int64)


def split_points(lengths: Int64, overhead: int) -> list[int]:
    """Where to split rows, sorted by length (N,), so that the fewest tokens are computed.

    A bucket costs its rows times its longest, plus `overhead`. By dynamic programming over the lengths.
    """
    ends = [*np.flatnonzero(np.diff(lengths)) + 1, len(lengths)]  # one past the last row of each length
    best, before = {0: 0}, {}
    for end in ends:
        longest = int(lengths[end - 1])
        best[end], before[end] = min((best[i] + (end - i) * longest + overhead, i) for i in best)
    points, end = [], before[len(lengths)]
    while end > 0:
        points.append(int(end))
        end = before[end]
    return points[::-1]


def trim(info: BundleInfo, batch: Batch, rows: Int64, without: frozenset[str]) -> Batch:
    """Some rows of a batch without the columns that none of them needs; padded if too short for the graphs."""
    part = batch.rows(rows)
    length = part.input_ids.shape[1] if "buckets" in without else int(row_lengths(info, part).max())
    return part.padded(max(length, info.shortest_row), info.special.pad)
