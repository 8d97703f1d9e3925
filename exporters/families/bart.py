"""BART."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bbt_accel.exporters.families.backbone import at, attend
from bbt_accel.exporters.families.encoder_decoder import EncoderDecoderBackbone
from bbt_accel.exporters.families.family import FamilySpec


class BartBackbone(EncoderDecoderBackbone):
    """BartForConditionalGeneration."""

    @property
    def decoder_layers(self) -> int:
        return len(self.model.model.decoder.layers)

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.model.encoder.embed_tokens(input_ids)

    def enter(self, x: Tensor) -> Tensor:
        encoder = self.model.model.encoder
        return encoder.layernorm_embedding(x + encoder.embed_positions(x[:, :, 0]))

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        layer, query = self.model.model.encoder.layers[i], at(x, position)
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
    context = attend(
        module.q_proj(query), module.k_proj(x), module.v_proj(x), module.num_heads, bias
    )
    return module.out_proj(context)


def bart_feed_forward(layer: Any, y: Tensor) -> Tensor:
    hidden = layer.activation_fn(layer.fc1(y))
    return layer.final_layer_norm(y + layer.fc2(hidden))


def _shape(width: int, layers: int, heads: int) -> dict[str, Any]:
    side = {"layers": layers, "attention_heads": heads, "ffn_dim": 4 * width}
    both = {
        f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()
    }
    return {"vocab_size": 50265, "max_position_embeddings": 1024, "d_model": width, **both}


BART = FamilySpec(
    model_type="bart",
    model_class="BartForConditionalGeneration",
    backbone=BartBackbone,
    architecture="encoder-decoder",
    template_group="masked",
    blocks=lambda model: model.model.encoder.layers,
    embedding=lambda model: model.model.encoder.embed_tokens,
    head=lambda model: model.lm_head,
    prompt_takes_positions=True,
    tiny=_shape(64, 3, 4) | {"max_position_embeddings": 128, "decoder_layers": 2},
    shapes={"bart-base": _shape(768, 6, 12), "bart-large": _shape(1024, 12, 16)},
)
