"""Real rows for checks: the shipped texts, encoded for any backbone."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer

from bbt_accel.batch import Batch
from bbt_accel.bundle import Bundle
from bbt_accel.demo import DATA


def sample_rows(bundle: Bundle, count: int = 8, words: int = 40) -> Batch:
    """Rows of different lengths, padded, with a mask token and five label words that are plain vocabulary ids.

    Independent of a task, so that a bundle with any vocabulary can be checked.
    """
    info, special = bundle.info, bundle.info.special
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["text"] for line in lines]
    prompt = [] if info.prompt_mode == "cat" else [5 + i % (info.vocab_size - 5) for i in range(info.n_prompt_tokens)]
    rows, readout = [], []
    for i, text in enumerate(texts):
        kept = words * (1 + i % 4) // 4
        body = tokenizer.encode(text, add_special_tokens=False).ids[:kept][: info.max_length - len(prompt) - 3]
        row = ([special.begin] if special.begin is not None else []) + prompt + (body or [5])
        if special.mask is not None:
            row.append(special.mask)
        readout.append(1 if info.template_group == "span" else len(row) - 1)
        rows.append(row + ([special.end] if special.end is not None else []))
    length = max(map(len, rows))
    ids = np.array([row + [special.pad] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = np.linspace(0, info.vocab_size - 1, 5).astype(np.int64)
    return Batch(ids, mask, np.array(readout), np.arange(count) % 5, labels)
