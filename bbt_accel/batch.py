"""Encoded rows, as the engines take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bbt_accel.errors import DataError

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """N encoded rows of a task, padded to S tokens, and the C label words.

    input_ids, attention_mask: int64 (N, S); 1 marks a real token.
    readout: int64 (N,), the position whose logits are read: in `input_ids` for masked LMs and GPT-2 (in cat mode
        counted without the prompt), in the decoder's input for BART and T5.
    targets: int64 (N,), the class of each row, 0 .. C-1.
    label_token_ids: int64 (C,), the vocabulary id of each class's label word.
    decoder_input_ids: int64 (N, D) to override what BART and T5 derive by themselves, else None.
    """

    input_ids: Int64
    attention_mask: Int64
    readout: Int64
    targets: Int64
    label_token_ids: Int64
    decoder_input_ids: Int64 | None = None

    def __post_init__(self) -> None:
        for name in ("input_ids", "attention_mask", "readout", "targets", "label_token_ids", "decoder_input_ids"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.ascontiguousarray(value, dtype=np.int64))
        rows = self.input_ids.shape[0] if self.input_ids.ndim == 2 else -1
        shapes_fit = (
            rows > 0
            and self.attention_mask.shape == self.input_ids.shape
            and self.readout.shape == (rows,)
            and self.targets.shape == (rows,)
            and self.label_token_ids.ndim == 1
            and (self.decoder_input_ids is None or self.decoder_input_ids.shape[:1] == (rows,))
        )
        if not shapes_fit:
            raise DataError(
                "a batch needs input_ids and attention_mask (N, S), readout and targets (N,), label_token_ids (C,), "
                f"with N > 0; got {self.input_ids.shape}, {self.attention_mask.shape}, {self.readout.shape}, "
                f"{self.targets.shape}, {self.label_token_ids.shape}"
            )
        if not np.isin(self.attention_mask, (0, 1)).all() or not self.attention_mask.any(axis=1).all():
            raise DataError("attention_mask must hold 0 and 1, with at least one real token a row")
        limit = self.input_ids.shape[1] if self.decoder_input_ids is None else self.decoder_input_ids.shape[1]
        if ((self.readout < 0) | (self.readout >= limit)).any():
            raise DataError(
                f"readout positions must lie in 0..{limit - 1}; got {self.readout.min()}..{self.readout.max()}"
            )

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def rows(self, index: Int64 | slice) -> Batch:
        """The same batch with some of its rows, in the order of `index`."""
        decoder = None if self.decoder_input_ids is None else self.decoder_input_ids[index]
        return replace(
            self,
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            readout=self.readout[index],
            targets=self.targets[index],
            decoder_input_ids=decoder,
        )
