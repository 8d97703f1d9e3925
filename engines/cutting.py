"""How the rows of a batch are cut up, so that like ones are computed together."""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Batch, Int64
from bbt_accel.bundle import BundleInfo
from bbt_accel.errors import DataError


def row_lengths(batch: Batch, reads_input: bool) -> Int64:
    """Columns that each row needs: up to its last real token, and to its readout position if that lies in the input."""
    columns = np.arange(1, batch.input_ids.shape[1] + 1)
    lengths: Int64 = (columns * batch.attention_mask).max(axis=1)
    return np.maximum(lengths, batch.readout + 1) if reads_input else lengths


def buckets(info: BundleInfo, batch: Batch, without: frozenset[str], most_tokens: int, step: int) -> list[Int64]:
    """Row indices, grouped: rows of like length (up to a multiple of `step`), at most `most_tokens` a group.

    GPT-2 computes the n positions of its prompt once a group and candidate, so its groups are as few as pays. In add
    mode the rows of a group begin with the same n tokens.
    """
    shortest = shortest_row(info)
    lengths = np.maximum(row_lengths(batch, info.family not in ("bart", "t5")), shortest)
    begin, prefix = np.zeros(len(batch), np.int64), 0
    if info.family == "gpt2" and "prefix-cache" not in info.without:
        prefix = info.n_prompt_tokens
        if info.prompt_mode == "add":
            begin = beginnings(batch, prefix)
    found = []
    for value in np.unique(begin):
        rows = np.flatnonzero(begin == value)
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        rounded = -(-lengths[rows] // step) * step
        parts = [rows] if "buckets" in without else np.split(rows, cuts(rounded, prefix))
        for part in parts:
            width = batch.input_ids.shape[1] if "buckets" in without else int(lengths[part].max())
            size = max(1, most_tokens // width)
            found += [part[i : i + size] for i in range(0, len(part), size)]
    return found


def beginnings(batch: Batch, n: int) -> Int64:
    """(N,): the same number for rows whose first n tokens are the same. Raises DataError for a readout among them."""
    if (batch.readout < n).any():
        raise DataError("a readout position lies within the prompt; GPT-2 reads behind it")
    start = np.concatenate([batch.input_ids[:, :n], batch.attention_mask[:, :n]], axis=1)
    _, same = np.unique(start, axis=0, return_inverse=True)
    return np.asarray(same.reshape(-1), np.int64)


def cuts(lengths: Int64, overhead: int) -> list[int]:
    """Where to cut rows, sorted by length (N,), so that the tokens that are computed are fewest.

    A group of rows costs its rows times its longest, and `overhead`. By dynamic programming over the lengths.
    """
    ends = [*np.flatnonzero(np.diff(lengths)) + 1, len(lengths)]  # behind the last row of each length
    best, before = {0: 0}, {}
    for end in ends:
        longest = int(lengths[end - 1])
        best[end], before[end] = min((best[i] + (end - i) * longest + overhead, i) for i in best)
    found, end = [], before[len(lengths)]
    while end > 0:
        found.append(int(end))
        end = before[end]
    return found[::-1]


def shortest_row(info: BundleInfo) -> int:
    """The graphs hold the prompt positions and one more on each side."""
    return 2 if info.prompt_mode == "cat" else info.n_prompt_tokens + 2


def cut(info: BundleInfo, batch: Batch, rows: Int64, without: frozenset[str]) -> Batch:
    """Some rows of a batch without the columns that none of them needs; padded if they are too short for a graph."""
    part = batch.rows(rows)
    length = part.input_ids.shape[1]
    if "buckets" not in without:
        length = int(row_lengths(part, info.family not in ("bart", "t5")).max())
    length = max(length, shortest_row(info))
    short = length - part.input_ids.shape[1]
    ids, mask = part.input_ids[:, :length], part.attention_mask[:, :length]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=info.special.pad)
        mask = np.pad(mask, ((0, 0), (0, short)))
    return Batch(ids, mask, part.readout, part.targets, part.label_token_ids, part.decoder_input_ids)
