"""GPT-NeoX: Pythia and its kin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bbt_accel.exporters.families.causal import CausalBackbone
from bbt_accel.exporters.families.family import sizes
from bbt_accel.exporters.families.llama import LLAMA
from bbt_accel.exporters.families.rotary import angles, rotate


class GPTNeoXBackbone(CausalBackbone):
    """GPTNeoXForCausalLM: each head's queries, keys and values side by side; feed-forward beside
    the attention.
    """

    def layer(self, i: int) -> Any:
        return self.model.gpt_neox.layers[i]

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.gpt_neox.embed_in(input_ids)

    def angles(self, position: Tensor, dtype: torch.dtype) -> Any:
        return angles(self.model.gpt_neox.rotary_emb, position, dtype)

    def project(self, i: int, x: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
        layer = self.layer(i)
        size = layer.attention.head_size
        projected = layer.attention.query_key_value(layer.input_layernorm(x)).unflatten(
            -1, (-1, 3, size)
        )
        query, key, value = (part.flatten(2) for part in projected.unbind(-2))
        return rotate(query, angles, size), torch.cat([rotate(key, angles, size), value], dim=-1)

    def scale(self, i: int) -> float:
        return float(self.layer(i).attention.scaling)

    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer(i)
        y = x + layer.attention.dense(attended)
        return y + layer.mlp(
            layer.post_attention_layernorm(x if layer.use_parallel_residual else y)
        )

    def head(self, x: Tensor) -> Tensor:
        return self.model.gpt_neox.final_layer_norm(x)

    def vocabulary(self) -> tuple[Tensor, None]:
        return self.model.lm_head.weight, None


GPT_NEOX = replace(
    LLAMA,
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    backbone=GPTNeoXBackbone,
    blocks=lambda model: model.gpt_neox.layers,
    embedding=lambda model: model.gpt_neox.embed_in,
    tiny=sizes(3, 64, 4, 96, 1000, max_position_embeddings=128, bos_token_id=0, eos_token_id=0),
    shapes={
        "pythia-160m": sizes(12, 768, 12, 3072, 50304),
        "pythia-410m": sizes(24, 1024, 16, 4096, 50304),
    },
)
