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

    GPT-2 in add mode computes its first n positions once for all rows of a group: they begin alike.
    """
    shortest = shortest_row(info)
    lengths = np.maximum(row_lengths(batch, info.family not in ("bart", "t5")), shortest)
    group = -(-lengths // step) if "buckets" not in without else np.zeros_like(lengths)
    if info.family == "gpt2" and info.prompt_mode == "add" and "prefix-cache" not in info.without:
        if (batch.readout < info.n_prompt_tokens).any():
            raise DataError("a readout position lies within the prompt; GPT-2 reads behind it")
        n = info.n_prompt_tokens
        start = np.concatenate([batch.input_ids[:, :n], batch.attention_mask[:, :n]], axis=1)
        _, first = np.unique(start, axis=0, return_inverse=True)
        group = group + (group.max() + 1) * first.reshape(-1)
    found = []
    for value in np.unique(group):
        rows = np.flatnonzero(group == value)
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        width = batch.input_ids.shape[1] if "buckets" in without else int(lengths[rows].max())
        size = max(1, most_tokens // width)
        found += [rows[i : i + size] for i in range(0, len(rows), size)]
    return found


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
