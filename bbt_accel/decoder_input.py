"""What the decoder of BART and T5 reads, where the batch does not say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bbt_accel.batch import Batch
from bbt_accel.bundle import BundleInfo


def with_decoder_input(info: BundleInfo, batch: Batch, short: bool = True) -> Batch:
    """The batch with decoder_input_ids (N, D), if `short` up to the last readout position, which sees no further.

    BART reads the encoder's input shifted right behind its start token (transformers' shift_tokens_right); T5 reads
    its start token and the sentinel `<extra_id_0>`. Other families have no decoder: the batch is returned as it is.
    """
    if info.family not in ("bart", "t5"):
        return batch
    ids = batch.decoder_input_ids
    if ids is None:
        start = np.full((len(batch), 1), info.special.decoder_start)
        follow = batch.input_ids[:, :-1] if info.family == "bart" else np.full((len(batch), 1), info.special.mask)
        ids = np.concatenate([start, follow], axis=1)
    return replace(batch, decoder_input_ids=ids[:, : batch.readout.max() + 1] if short else ids)
