"""T5: relative position biases instead of position embeddings, pre-norm blocks, unscaled attention
scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bbt_accel.exporters.families.backbone import at, attend, causal_bias, padding_bias
from bbt_accel.exporters.families.encoder_decoder import EncoderDecoderBackbone
from bbt_accel.exporters.families.family import FamilySpec


class T5Backbone(EncoderDecoderBackbone):
    """T5ForConditionalGeneration: version 1.0, and the gated 1.1 of Flan-T5 and mT5."""

    @property
    def decoder_layers(self) -> int:
        return len(self.model.decoder.block)

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.encoder.embed_tokens(input_ids)

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        length = attention_mask.shape[1]
        position = self.model.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return position + padding_bias(attention_mask)

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        attention, feed_forward = self.model.encoder.block[i].layer
        normed = attention.layer_norm(x)
        y = at(x, position) + t5_attention(
            attention.SelfAttention, at(normed, position), normed, bias
        )
        return feed_forward(y)

    def encoded(self, x: Tensor) -> Tensor:
        return self.model.encoder.final_layer_norm(x)

    def decoder_tokens(self, decoder_input_ids: Tensor) -> Tensor:
        return self.model.decoder.embed_tokens(decoder_input_ids)

    def decoder_bias(self, length: int, device: torch.device) -> Tensor:
        position = self.model.decoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return position + causal_bias(length, length, device)

    def self_attention(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        attention = self.model.decoder.block[i].layer[0]
        normed = attention.layer_norm(x)
        return query + t5_attention(
            attention.SelfAttention, attention.layer_norm(query), normed, bias
        )

    def cross_attention(self, i: int, x: Tensor, encoded: Tensor, bias: Tensor) -> Tensor:
        _, attention, feed_forward = self.model.decoder.block[i].layer
        y = x + t5_attention(attention.EncDecAttention, attention.layer_norm(x), encoded, bias)
        return feed_forward(y)

    def head(self, x: Tensor) -> Tensor:
        x = self.model.decoder.final_layer_norm(x)
        scaled = getattr(self.model.config, "scale_decoder_outputs", False)  # T5 1.0 alone
        return x * self.model.model_dim**-0.5 if scaled else x

    def vocabulary(self) -> tuple[Tensor, None]:
        return self.model.lm_head.weight, None


def t5_attention(module: Any, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    context = attend(module.q(query), module.k(x), module.v(x), module.n_heads, bias, scale=1.0)
    return module.o(context)


def _shape(
    width: int, inner: int, layers: int, heads: int, d_kv: int = 64, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": inner,
        "d_kv": d_kv,
        "num_layers": layers,
        "num_heads": heads,
        **more,
    }


T5 = FamilySpec(
    model_type="t5",
    model_class="T5ForConditionalGeneration",
    backbone=T5Backbone,
    architecture="encoder-decoder",
    template_group="span",
    blocks=lambda model: model.encoder.block,
    embedding=lambda model: model.encoder.embed_tokens,
    head=lambda model: model.lm_head,
    begin=None,
    end="eos_token",
    mask="<extra_id_0>",
    # Relative positions have no limit; this is the length that it was trained on.
    positions=lambda config: int(getattr(config, "n_positions", 512)),
    tiny=_shape(64, 96, 3, 4, 16, num_decoder_layers=2),
    shapes={
        "t5-small": _shape(512, 2048, 6, 8),
        "t5-base": _shape(768, 3072, 12, 12),
        "t5-large": _shape(1024, 4096, 24, 16),
    },
)
MT5 = replace(
    T5,
    model_type="mt5",
    model_class="MT5ForConditionalGeneration",
    shapes={
        "mt5-small": _shape(512, 1024, 8, 6, feed_forward_proj="gated-gelu")
        | {"vocab_size": 250112}
    },
)
