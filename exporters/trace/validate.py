"""Validation of a bundle's label logits: real rows, and the check that ends every export.

Rows need neither onnx nor torch, which benchmarks of an engine may lack; the check imports them.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.comparison import scaled_error
from bbt_accel.core.demo import DATA
from bbt_accel.core.pieces import read_tokenizer

LONG = 256
"""Tokens of the long row's text: beyond windows of local attention, and where positions are far
apart.
"""


def sample_rows(bundle: Bundle, count: int = 8, words: int = 40) -> Batch:
    """Rows of the shipped texts, of different lengths, padded, with a mask token, encoded for any
    backbone.
    """
    tokenizer = read_tokenizer(bundle)
    texts = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in shipped_texts()[:count]
    ]
    return rows_of(bundle, [ids[: words * (1 + i % 4) // 4] for i, ids in enumerate(texts)])


def long_row(bundle: Bundle) -> Batch:
    """One row of `LONG` tokens of the shipped texts, or of what the backbone takes."""
    text = read_tokenizer(bundle).encode(" ".join(shipped_texts()), add_special_tokens=False)
    return rows_of(bundle, [text.ids[:LONG]])


def shipped_texts() -> list[str]:
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["text"]) for line in lines]


def rows_of(bundle: Bundle, texts: list[list[int]]) -> Batch:
    """Rows with these tokens as their texts, as far as there is room for them.

    The five label words are plain vocabulary ids: no task is needed, so a bundle with any
    vocabulary can be checked.
    """
    info, special = bundle.info, bundle.info.special
    prompt = (
        []
        if info.prompt_mode == "cat"
        else [5 + i % (info.vocab_size - 5) for i in range(info.n_prompt_tokens)]
    )
    context = np.array([info.special.pad, 5, 6]) if info.causal else None
    room = max(1, info.max_length - len(prompt) - 3 - (0 if context is None else len(context)))
    rows, readout = [], []
    for text in texts:
        row = ([special.begin] if special.begin is not None else []) + prompt + (text[:room] or [5])
        if special.mask is not None:
            row.append(special.mask)
        readout.append(1 if info.template_group == "span" else len(row) - 1)
        rows.append(row + ([special.end] if special.end is not None else []))
    length = max(map(len, rows))
    ids = np.array([row + [special.pad] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = np.linspace(0, info.vocab_size - 1, 5).astype(np.int64)
    return Batch(
        ids, mask, np.array(readout), np.arange(len(rows)) % 5, labels, context_ids=context
    )


def naive_forward(bundle: Bundle) -> Callable[[Batch, Float32], Float32]:
    """Label logits (P, N, C) of transformers' own class in the bundle's precision, one candidate at
    a time.
    """
    import torch

    from bbt_accel.exporters.families.loading import DTYPES, load_model
    from bbt_accel.exporters.families.reference import Reference

    reference = Reference(load_model(bundle.path, dtype=DTYPES[bundle.info.precision]), bundle.info)

    def label_logits(batch: Batch, prompts: Float32) -> Float32:
        rows = {name: torch.from_numpy(value) for name, value in batch.inputs().items()}
        return np.stack(
            [reference.label_logits(torch.from_numpy(prompt), **rows).numpy() for prompt in prompts]
        )

    return label_logits


def validate(path: str) -> float:
    """The largest scaled error of a bundle's label logits against eager PyTorch, for three random
    prompts.

    `export_bundle` calls it in a process that has not traced anything.
    """
    from bbt_accel.exporters.trace.sessions import run_stages

    bundle = Bundle.read(path)
    noise = np.random.default_rng(0).standard_normal((3, *bundle.info.prompt_shape))
    prompts, naive = (
        (bundle.info.word_embedding_std * noise).astype(np.float32),
        naive_forward(bundle),
    )
    batches = (sample_rows(bundle), long_row(bundle))
    return float(
        np.max(
            [
                scaled_error(run_stages(bundle, rows, prompts), naive(rows, prompts))
                for rows in batches
            ]
        )
    )
