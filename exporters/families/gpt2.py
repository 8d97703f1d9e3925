"""GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bbt_accel.exporters.families.causal import CausalBackbone
from bbt_accel.exporters.families.family import FamilySpec


class GPT2Backbone(CausalBackbone):
    """GPT2LMHeadModel."""

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.transformer.wte(input_ids)

    def add_positions(self, x: Tensor, position: Tensor) -> Tensor:
        return x + self.model.transformer.wpe(position)

    def project(self, i: int, x: Tensor, angles: None) -> tuple[Tensor, Tensor]:
        layer = self.model.transformer.h[i]
        projected, size = linear(layer.attn.c_attn, layer.ln_1(x)), layer.attn.embed_dim
        return projected[..., :size], projected[..., size:]

    def scale(self, i: int) -> float:
        return float(self.model.transformer.h[i].attn.scaling)

    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.model.transformer.h[i]
        y = x + linear(layer.attn.c_proj, attended)
        hidden = layer.mlp.act(linear(layer.mlp.c_fc, layer.ln_2(y)))
        return y + linear(layer.mlp.c_proj, hidden)

    def head(self, x: Tensor) -> Tensor:
        return self.model.transformer.ln_f(x)

    def vocabulary(self) -> tuple[Tensor, None]:
        return self.model.lm_head.weight, None


def linear(module: Any, x: Tensor) -> Tensor:
    """GPT-2's Conv1D without its flattening, which prevents fusions; or a layer that peft has put
    in its place.
    """
    return x @ module.weight + module.bias if type(module) is Conv1D else module(x)


def _shape(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads}


GPT2 = FamilySpec(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    backbone=GPT2Backbone,
    architecture="decoder",
    template_group="causal",
    blocks=lambda model: model.transformer.h,
    embedding=lambda model: model.transformer.wte,
    head=lambda model: model.lm_head,
    begin=None,
    end=None,
    mask=None,
    prompt_takes_positions=True,
    tiny=_shape(64, 3, 4) | {"n_positions": 128},
    shapes={
        "gpt2": _shape(768, 12, 12),
        "gpt2-medium": _shape(1024, 24, 16),
        "gpt2-large": _shape(1280, 36, 20),
    },
)
