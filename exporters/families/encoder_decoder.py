"""Encoder-decoders: the prompt goes to the encoder, the logits are read from the decoder."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from bbt_accel.exporters.families.backbone import (
    Backbone,
    Inputs,
    at,
    causal_bias,
    each,
    mean_state,
    rows_at,
)


class EncoderDecoderBackbone(Backbone):
    """An encoder with the prompt, and a decoder whose logits are read at one position.

    Decoder states are causal, so the decoder's input ends at the readout position. The
    self-attention of the first
    decoder block sees no encoder state: it is computed once per row, for all candidates. The last
    block is computed for the readout position alone.
    """

    def finish(
        self,
        p: int | torch.SymInt,
        x: Tensor,
        bias: Tensor,
        mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        decoder_input_ids: Tensor | None,
    ) -> Inputs:
        """mean_state is that of the encoder's output."""
        x = self.encoded(self.block(self.layers - 1, x, bias))
        assert decoder_input_ids is not None
        y = self.decode(p, x, each(p, self.cross_bias(mask)), decoder_input_ids, readout)
        found = self.read(
            y, each(p, readout) if "last-block" in self.without else None, label_token_ids
        )
        return found | {"mean_state": mean_state(x, each(p, mask))}

    def decode(
        self,
        p: int | torch.SymInt,
        encoded: Tensor,
        cross: Tensor,
        decoder_input_ids: Tensor,
        readout: Tensor,
    ) -> Tensor:
        """(P·N, T, H), (N, D), (N,) → (P·N, 1, H), the readout position; with a whole last block
        (P·N, D, H).
        """
        y = self.decoder_tokens(decoder_input_ids)
        bias = self.decoder_bias(decoder_input_ids.shape[1], y.device)
        position, last = readout, self.decoder_layers - 1
        shared = "shared-first" not in self.without
        if not shared:
            y, position = each(p, y), each(p, position)
        for i in range(last + 1):
            alone = i == last and "last-block" not in self.without
            query, own = (at(y, position), rows_at(bias, position)) if alone else (y, bias)
            y = self.self_attention(i, query, y, own)
            if i == 0 and shared:
                y, position = each(p, y), each(p, position)
            y = self.cross_attention(i, y, encoded, cross)
        return y

    def encoded(self, x: Tensor) -> Tensor:
        """What follows the encoder's last block, e.g. a norm."""
        return x

    def cross_bias(self, mask: Tensor) -> Tensor:
        """(N, T) → (N, 1, 1, T): padding alone, without position biases."""
        return Backbone.attention_bias(self, mask)

    def decoder_bias(self, length: int, device: torch.device) -> Tensor:
        """(1, heads or 1, D, D)."""
        return causal_bias(length, length, device)

    @property
    @abstractmethod
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""

    @abstractmethod
    def decoder_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        """(N, D) → (N, D, H): what enters the decoder's first block."""

    @abstractmethod
    def self_attention(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """The self-attention of decoder block i, residual and norm included."""

    @abstractmethod
    def cross_attention(self, i: int, x: Tensor, encoded: Tensor, bias: Tensor) -> Tensor:
        """Attention over the encoder's output, and the feed-forward, of decoder block i."""
