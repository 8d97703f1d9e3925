"""Check a freshly exported bundle against eager PyTorch: names, shapes and values, on real padded rows.

Run as `python -m bbt_accel.exporters.validate BUNDLE`, in a process that has not traced anything.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.errors import BbtError
from bbt_accel.exporters.rows import sample_rows
from bbt_accel.exporters.sessions import run_stages


def reference_logits(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of transformers' own class, one candidate at a time."""
    import torch

    from bbt_accel.exporters.families import load_model
    from bbt_accel.exporters.reference import Reference

    reference = Reference(load_model(bundle.path), bundle.info)
    fields = (batch.input_ids, batch.attention_mask, batch.readout, batch.label_token_ids)
    rows = [torch.from_numpy(x) for x in fields]
    each = [reference.label_logits(torch.from_numpy(p), *rows).numpy() for p in prompts]
    return np.stack(each)


def scaled_error(logits: Float32, wanted: Float32) -> float:
    """Largest absolute difference, relative to the largest logit where that is beyond 1; inf for other shapes."""
    if logits.shape != wanted.shape:
        return float("inf")
    return float(np.abs(logits - wanted).max() / max(1.0, np.abs(wanted).max()))


def main(path: str) -> None:
    bundle = Bundle.read(path)
    batch = sample_rows(bundle)
    rng = np.random.default_rng(0)
    shape = (3, *bundle.info.prompt_shape)
    prompts = (bundle.info.word_embedding_std * rng.standard_normal(shape)).astype(np.float32)
    error = scaled_error(run_stages(bundle, batch, prompts), reference_logits(bundle, batch, prompts))
    print(json.dumps({"max_error": error, "rows": len(batch), "candidates": len(prompts)}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BbtError as problem:
        sys.exit(str(problem))
