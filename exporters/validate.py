"""Validate an exported bundle against eager PyTorch: names, shapes and values, on real padded rows.

`export_bundle` calls it in a process that has not traced anything.
"""

from __future__ import annotations

import numpy as np

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.exporters.fidelity import scaled_error
from bbt_accel.exporters.rows import sample_rows
from bbt_accel.exporters.sessions import run_stages


def reference_logits(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of transformers' own class in the bundle's precision, one candidate at a time."""
    import torch

    from bbt_accel.exporters.families import DTYPES, load_model
    from bbt_accel.exporters.reference import Reference

    reference = Reference(load_model(bundle.path, dtype=DTYPES[bundle.info.precision]), bundle.info)
    rows = {name: torch.from_numpy(value) for name, value in batch.inputs().items()}
    return np.stack([reference.label_logits(torch.from_numpy(prompt), **rows).numpy() for prompt in prompts])


def validate(path: str) -> float:
    """The largest scaled error of the bundle's label logits, for three random prompts."""
    bundle = Bundle.read(path)
    batch = sample_rows(bundle)
    noise = np.random.default_rng(0).standard_normal((3, *bundle.info.prompt_shape))
    prompts = (bundle.info.word_embedding_std * noise).astype(np.float32)
    return scaled_error(run_stages(bundle, batch, prompts), reference_logits(bundle, batch, prompts))
