"""Encoded rows, as the engines take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from bbt_accel.core.bundle import BundleInfo
from bbt_accel.errors import DataError

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def shape_fits(found: Sequence[int], wanted: Sequence[int | str]) -> bool:
    """Whether a shape is as wanted; -1 and names, e.g. `P`, are any size."""
    return len(found) == len(wanted) and all(
        size == -1 or isinstance(size, str) or size == n
        for n, size in zip(found, wanted, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """N encoded rows of a task, padded to S tokens, and the M label words of its C classes.

    input_ids, attention_mask: int64 (N, S); 1 marks a real token.
    readout: int64 (N,), the position whose logits are read: in `input_ids` for encoders and
        decoders (in cat mode counted without the prompt), in the decoder's input for
        encoder-decoders.
    targets: int64 (N,), the class of each row, 0 .. C-1.
    label_token_ids: int64 (M,), the vocabulary ids of the label words: one for each class, in class
        order; or more, whose classes `Encoder.classes` has.
    decoder_input_ids: int64 (N, D), to override the decoder input that is derived from the rows,
    else None.
    context_ids: int64 (K,), a decoder's: tokens between the begin token, if any, and the prompt of
        every row. `readout` does not count them.

    Raises DataError for numbers that are not integers, shapes that do not fit, a mask without a
    real token, and a readout outside the row.
    """

    input_ids: Int64
    attention_mask: Int64
    readout: Int64
    targets: Int64
    label_token_ids: Int64
    decoder_input_ids: Int64 | None = None
    context_ids: Int64 | None = None

    def __post_init__(self) -> None:
        for name, value in self.arrays().items():
            with np.errstate(invalid="ignore"):
                integers = np.ascontiguousarray(value, dtype=np.int64)
            if not np.array_equal(integers, np.atleast_1d(value)):
                raise DataError(f"{name} of a batch must hold integers")
            object.__setattr__(self, name, integers)
        N, S = self.input_ids.shape if self.input_ids.ndim == 2 else (0, 0)
        wanted = {"input_ids": (N, S), "attention_mask": (N, S), "readout": (N,), "targets": (N,)}
        wanted |= {"label_token_ids": (-1,), "decoder_input_ids": (N, -1), "context_ids": (-1,)}
        if not N or not all(
            shape_fits(value.shape, wanted[name]) for name, value in self.arrays().items()
        ):
            raise DataError(
                "a batch needs input_ids and attention_mask (N, S), readout and targets (N,), "
                "label_token_ids (M,) and perhaps decoder_input_ids (N, D) or context_ids (K,), "
                f"with N > 0; got {', '.join(str(value.shape) for value in self.arrays().values())}"
            )
        if (
            not np.isin(self.attention_mask, (0, 1)).all()
            or not self.attention_mask.any(axis=1).all()
        ):
            raise DataError(
                "attention_mask must hold 0 and 1, with at least one real token per row"
            )
        limit = (
            self.input_ids.shape[1]
            if self.decoder_input_ids is None
            else self.decoder_input_ids.shape[1]
        )
        low, high = self.readout.min(), self.readout.max()
        if low < 0 or high >= limit:
            raise DataError(f"readout positions must lie in 0..{limit - 1}; got {low}..{high}")

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def arrays(self) -> dict[str, Int64]:
        """Every field that is given, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def inputs(self) -> dict[str, Int64]:
        """What the backbone reads: every field but the targets."""
        return {name: value for name, value in self.arrays().items() if name != "targets"}

    def graph_inputs(self, info: BundleInfo) -> dict[str, Int64]:
        """The same as the graphs take it.

        A decoder's begin token and context, which all rows must share, become `context_ids` (C,)
        and `context_mask` (C,): 1 for a token, 0 for padding, -1 for the one column of a context
        without tokens.
        """
        found = self.inputs()
        if not info.causal:
            return found
        begin, context = (
            info.prompt_start,
            np.zeros(0, np.int64) if self.context_ids is None else self.context_ids,
        )
        ids, mask = self.input_ids[0, :begin], self.attention_mask[0, :begin]
        found["context_ids"] = np.concatenate([ids, context])
        found["context_mask"] = np.concatenate([mask, np.ones_like(context)])
        if not len(found["context_ids"]):
            found |= {"context_ids": np.zeros(1, np.int64), "context_mask": np.full(1, -1)}
        columns = {
            name: np.ascontiguousarray(found[name][:, begin:])
            for name in ("input_ids", "attention_mask")
        }
        return found | columns | {"readout": self.readout - begin}

    def aligned(self, info: BundleInfo, lengths: Int64, step: int) -> Int64:
        """Lengths of rows, rounded up to where attention sees a multiple of `step` keys.

        Its keys are a row's own, the prompt's in cat mode, and those of a decoder's context, of at
        least one.
        """
        others = info.n_prompt_tokens if info.prompt_mode == "cat" else 0
        if info.causal:
            context = 0 if self.context_ids is None else len(self.context_ids)
            others += max(context, 1 - info.prompt_start)
        return np.asarray(-(-(lengths + others) // step) * step - others)

    def rows(self, index: Int64 | slice) -> Batch:
        """The same batch with some of its rows, in the order of `index`."""
        shared = ("label_token_ids", "context_ids")
        per_row = {
            name: value[index] for name, value in self.arrays().items() if name not in shared
        }
        return replace(self, **per_row)

    def with_decoder_input(self, info: BundleInfo, short: bool = True) -> Batch:
        """The batch with decoder_input_ids (N, D), if `short` only up to the last readout position.

        A decoder with a masked template reads the encoder's input shifted right behind its start
        token (transformers' shift_tokens_right); one with a span template its start token and the
        sentinel. A batch for a backbone without a decoder is returned unchanged.
        """
        if not info.decodes:
            return self
        ids = self.decoder_input_ids
        if ids is None:
            start = np.full((len(self), 1), info.special.decoder_start)
            shifted = info.template_group == "masked"
            follow = (
                self.input_ids[:, :-1] if shifted else np.full((len(self), 1), info.special.mask)
            )
            ids = np.concatenate([start, follow], axis=1)
        return replace(self, decoder_input_ids=ids[:, : self.readout.max() + 1] if short else ids)

    def padded(self, length: int, pad: int) -> Batch:
        """The same rows with padding on the right up to `length` columns, or trimmed to them."""
        missing = ((0, 0), (0, max(0, length - self.input_ids.shape[1])))
        ids = np.pad(self.input_ids[:, :length], missing, constant_values=pad)
        return replace(
            self, input_ids=ids, attention_mask=np.pad(self.attention_mask[:, :length], missing)
        )


def group_by_beginning(info: BundleInfo, batch: Batch) -> list[Int64]:
    """Indices of rows that one call can compute together.

    A decoder's graphs take the begin token, and in add mode the tokens under the prompt, from the
    first row of a call. Raises DataError for a readout position among them.
    """
    n = (
        0
        if not info.causal
        else info.prompt_start
        if "prefix-cache" in info.without
        else info.prefix_columns
    )
    if (batch.readout < n).any():
        raise DataError(
            "a readout position lies within the prompt or before it; a decoder reads behind it"
        )
    start = np.concatenate([batch.input_ids[:, :n], batch.attention_mask[:, :n]], axis=1)
    _, same = np.unique(start, axis=0, return_inverse=True)
    return [np.flatnonzero(same.reshape(-1) == value) for value in range(same.max() + 1)]
