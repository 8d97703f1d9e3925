"""BART: the prompt goes to the encoder, the logits are read from the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbt_accel.exporters.backbone import Backbone, at, attend, causal_bias, each, rows_at


class DecoderBackbone(Backbone):
    """What BART and T5 share: an encoder with the prompt, and a decoder that is read at one position.

    Decoder states are causal, so the decoder's input ends at the readout position. The self-attention of the first
    decoder block sees no encoder state: it is computed once a row, for all candidates. The last block is computed
    for the readout position alone.
    """

    decodes = True

    def finish(
        self, p: int | torch.SymInt, x: Tensor, bias: Tensor, mask: Tensor, readout: Tensor, label_token_ids: Tensor,
        decoder_input_ids: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x = self.encoded(self.block(self.layers - 1, x, x, bias))
        assert decoder_input_ids is not None
        y = self.decode(p, x, each(p, self.cross_bias(mask)), decoder_input_ids, readout)
        return self.read(y, each(p, readout) if "last-block" in self.without else None, label_token_ids)

    def decode(
        self, p: int | torch.SymInt, encoded: Tensor, cross: Tensor, decoder_input_ids: Tensor, readout: Tensor
    ) -> Tensor:
        """(P·N, T, H), (N, D), (N,) → (P·N, 1, H), the readout position; with a whole last block (P·N, D, H)."""
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
        """What stands behind the encoder's last block (T5: a norm)."""
        return x

    def cross_bias(self, mask: Tensor) -> Tensor:
        """(N, T) → (N, 1, 1, T): padding alone, without position biases."""
        return Backbone.attention_bias(self, mask)

    def decoder_bias(self, length: int, device: torch.device) -> Tensor:
        """(1, heads or 1, D, D)."""
        return causal_bias(length, length, device)

    decoder_layers: int

    def decoder_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def self_attention(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    def cross_attention(self, i: int, x: Tensor, encoded: Tensor, bias: Tensor) -> Tensor:
        """Attention over the encoder's output, and the feed-forward."""
        raise NotImplementedError


class BartBackbone(DecoderBackbone):
    """BartForConditionalGeneration."""

    family = "bart"

    @property
    def decoder_layers(self) -> int:  # type: ignore[override]
        return len(self.model.model.decoder.layers)

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.model.encoder.embed_tokens(input_ids)

    def enter(self, x: Tensor) -> Tensor:
        encoder = self.model.model.encoder
        return encoder.layernorm_embedding(x + encoder.embed_positions(x[:, :, 0]))

    def block(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        layer = self.model.model.encoder.layers[i]
        y = layer.self_attn_layer_norm(query + bart_attention(layer.self_attn, query, x, bias))
        return bart_feed_forward(layer, y)

    def decoder_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        decoder = self.model.model.decoder
        y = decoder.embed_tokens(decoder_input_ids) + decoder.embed_positions(decoder_input_ids)
        return decoder.layernorm_embedding(y)

    def self_attention(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        layer = self.model.model.decoder.layers[i]
        return layer.self_attn_layer_norm(query + bart_attention(layer.self_attn, query, x, bias))

    def cross_attention(self, i: int, x: Tensor, encoded: Tensor, bias: Tensor) -> Tensor:
        layer = self.model.model.decoder.layers[i]
        y = layer.encoder_attn_layer_norm(x + bart_attention(layer.encoder_attn, x, encoded, bias))
        return bart_feed_forward(layer, y)

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        return self.model.lm_head.weight, self.model.final_logits_bias[0]


def bart_attention(module: Any, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    context = attend(module.q_proj(query), module.k_proj(x), module.v_proj(x), module.num_heads, bias)
    return module.out_proj(context)


def bart_feed_forward(layer: Any, y: Tensor) -> Tensor:
    hidden = layer.activation_fn(layer.fc1(y))
    return layer.final_layer_norm(y + layer.fc2(hidden))
