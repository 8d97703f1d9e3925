"""Length buckets: which rows of a batch are computed together, and how they are trimmed."""

from __future__ import annotations

import numpy as np

from bbt_accel.core.batch import Batch, Int64, group_by_beginning
from bbt_accel.core.bundle import BundleInfo


def row_lengths(info: BundleInfo, batch: Batch, without: frozenset[str]) -> Int64:
    """Columns that each row needs, (N,): up to its last real token, and to a readout position in
    the input.

    All of them without buckets; and never fewer than the graphs take.
    """
    width = batch.input_ids.shape[1]
    lengths: Int64 = (np.arange(1, width + 1) * batch.attention_mask).max(axis=1)
    if not info.decodes:
        lengths = np.maximum(lengths, batch.readout + 1)
    return np.maximum(lengths, max(info.shortest_row, width if "buckets" in without else 0))


def bucket_rows(
    info: BundleInfo,
    batch: Batch,
    without: frozenset[str],
    step: int,
    max_tokens: int,
    max_rows: int,
    overhead: int = 0,
) -> list[Int64]:
    """Row indices of each bucket: rows whose lengths are `aligned` to similar ones, at most so many
    tokens and rows.

    overhead: what a further call costs, in tokens per candidate. A decoder computes the n positions
    of its prompt once per bucket and candidate, so it gets no more buckets than pay off; the rows
    of a bucket have the same begin token and, in add mode, the same tokens under the prompt.
    """
    lengths = row_lengths(info, batch, without)
    prefix = info.n_prompt_tokens if info.causal and "prefix-cache" not in info.without else 0
    buckets = []
    for rows in group_by_beginning(info, batch):
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        rounded = batch.aligned(info, lengths[rows], step)
        for part in np.split(rows, split_points(rounded, prefix + overhead)):
            size = max(1, min(max_tokens // int(lengths[part].max()), max_rows))
            buckets += [part[i : i + size] for i in range(0, len(part), size)]
    return buckets


def split_points(lengths: Int64, overhead: int) -> list[int]:
    """Where to split rows, sorted by length (N,), so that the fewest tokens are computed.

    A bucket costs its rows times its longest, plus `overhead`. By dynamic programming over the
    lengths.
    """
    ends = [
        *np.flatnonzero(np.diff(lengths)) + 1,
        len(lengths),
    ]  # one past the last row of each length
    best, before = {0: 0}, {}
    for end in ends:
        longest = int(lengths[end - 1])
        best[end], before[end] = min((best[i] + (end - i) * longest + overhead, i) for i in best)
    points, end = [], before[len(lengths)]
    while end > 0:
        points.append(int(end))
        end = before[end]
    return points[::-1]


def trim(
    info: BundleInfo,
    batch: Batch,
    rows: Int64,
    without: frozenset[str],
    step: int = 1,
    longest: int = 0,
) -> Batch:
    """Some rows of a batch without the columns that none of them needs; padded if too short for the
    graphs.

    step: padded to where attention sees a multiple of this, if the row is then no longer than
    `longest`.
    """
    part = batch.rows(rows)
    needed = row_lengths(info, part, without).max()
    aligned = batch.aligned(info, needed, step)
    return part.padded(int(aligned if aligned <= longest else needed), info.special.pad)
