"""ModernBERT: pre-norm blocks with gated feed-forwards, and attention that is local in most of
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbt_accel.exporters.families.backbone import MASKED, Backbone, at, attend, padding_bias
from bbt_accel.exporters.families.family import FamilySpec, sizes
from bbt_accel.exporters.families.rotary import angles, rotate, unscaled_positions

LOCAL = "sliding_attention"


class ModernBertBackbone(Backbone):
    """ModernBertForMaskedLM."""

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.model.embeddings(input_ids=input_ids)

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        """(N, 2, T, T): for blocks with global, then for those with local attention."""
        position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        apart = (position[:, None] - position[None]).abs()
        local = (apart > self.model.config.sliding_window).to(torch.float32) * MASKED
        return padding_bias(attention_mask) + torch.stack([torch.zeros_like(local), local])[None]

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        model, layer = self.model.model, self.model.model.layers[i]
        kind, size = layer.attention_type, layer.attn.head_dim
        everywhere = torch.arange(x.shape[1], device=x.device)
        turned = angles(model.rotary_emb, everywhere, x.dtype, kind)
        asked = (
            turned
            if position is None
            else angles(model.rotary_emb, position[:, None], x.dtype, kind)
        )
        query, key, value = layer.attn.Wqkv(layer.attn_norm(x)).chunk(3, dim=-1)
        query, key = rotate(at(query, position), asked, size), rotate(key, turned, size)
        own = bias[:, 1:] if kind == LOCAL else bias[:, :1]
        y = at(x, position) + layer.attn.Wo(
            attend(query, key, value, self.model.config.num_attention_heads, own)
        )
        return y + layer.mlp(layer.mlp_norm(y))

    def head(self, x: Tensor) -> Tensor:
        return self.model.head(self.model.model.final_norm(x))

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        decoder = self.model.decoder
        return decoder.weight, decoder.bias


def all_positions(arguments: dict[str, Any]) -> dict[str, Any]:
    """Positions of the whole row: the model itself would count those of the row without its
    prompt.
    """
    mask = arguments["attention_mask"]
    return arguments | {"position_ids": torch.arange(mask.shape[1], device=mask.device)[None]}


MODERNBERT = FamilySpec(
    model_type="modernbert",
    model_class="ModernBertForMaskedLM",
    backbone=ModernBertBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.model.layers,
    embedding=lambda model: model.model.embeddings,
    head=lambda model: model.head,
    arguments=all_positions,
    positions=unscaled_positions,
    prompt_takes_positions=True,
    tiny=sizes(3, 64, 4, 96, 1000, max_position_embeddings=128, local_attention=16, pad_token_id=0),
    shapes={
        "modernbert-base": sizes(22, 768, 12, 1152, 50368),
        "modernbert-large": sizes(28, 1024, 16, 2624, 50368),
    },
)
