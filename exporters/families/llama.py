"""Llama and its kin: RMSNorm, rotary positions, grouped key and value heads, gated
feed-forwards.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bbt_accel.errors import ExportError
from bbt_accel.exporters.families.backbone import Backbone, at
from bbt_accel.exporters.families.causal import CausalBackbone
from bbt_accel.exporters.families.family import FamilySpec, sizes
from bbt_accel.exporters.families.rotary import angles, rotate, unscaled_positions


class LlamaBackbone(CausalBackbone):
    """LlamaForCausalLM. Kin override what differs."""

    def layer(self, i: int) -> Any:
        return self.model.model.layers[i]

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(input_ids)

    @property
    def heads(self) -> tuple[int, int]:
        return self.model.config.num_attention_heads, self.model.config.num_key_value_heads

    def scale(self, i: int) -> float:
        return float(self.layer(i).self_attn.scaling)

    def angles(self, position: Tensor, dtype: torch.dtype) -> Any:
        return angles(self.model.model.rotary_emb, position, dtype)

    def project(self, i: int, x: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
        query, key, value = self.projected(i, self.layer(i).input_layernorm(x))
        return self.rotate(i, query, angles), torch.cat(
            [self.rotate(i, key, angles), value], dim=-1
        )

    def projected(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.layer(i).self_attn
        return own.q_proj(x), own.k_proj(x), own.v_proj(x)

    def rotate(self, i: int, x: Tensor, angles: Any) -> Tensor:
        """Queries or keys of block i at their positions."""
        return rotate(x, angles, self.layer(i).self_attn.head_dim)

    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer(i)
        y = x + layer.self_attn.o_proj(attended)
        return y + layer.mlp(layer.post_attention_layernorm(y))

    def head(self, x: Tensor) -> Tensor:
        return self.model.model.norm(x)

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias

    def cap(self, logits: Tensor) -> Tensor:
        limit = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if limit is None else torch.tanh(logits / limit) * limit


class SmolLM3Backbone(LlamaBackbone):
    """SmolLM3ForCausalLM: every fourth block has no positions."""

    def rotate(self, i: int, x: Tensor, angles: Any) -> Tensor:
        return super().rotate(i, x, angles) if self.layer(i).self_attn.use_rope else x


class Qwen3Backbone(LlamaBackbone):
    """Qwen3ForCausalLM: a norm of each head's queries and keys."""

    def projected(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.layer(i).self_attn
        query, key = (y.unflatten(-1, (-1, own.head_dim)) for y in (own.q_proj(x), own.k_proj(x)))
        return own.q_norm(query).flatten(2), own.k_norm(key).flatten(2), own.v_proj(x)


class Olmo2Backbone(LlamaBackbone):
    """Olmo2ForCausalLM: norms behind attention and feed-forward instead of in front, and of all
    queries and keys.
    """

    def project(self, i: int, x: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
        own = self.layer(i).self_attn
        query, key = own.q_norm(own.q_proj(x)), own.k_norm(own.k_proj(x))
        return self.rotate(i, query, angles), torch.cat(
            [self.rotate(i, key, angles), own.v_proj(x)], dim=-1
        )

    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer(i)
        y = x + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
        return y + layer.post_feedforward_layernorm(layer.mlp(y))


class Phi3Backbone(LlamaBackbone):
    """Phi3ForCausalLM: queries, keys and values from one matrix."""

    def projected(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, (heads, shared) = self.layer(i).self_attn, self.heads
        query, key, value = own.qkv_proj(x).split(
            [size * own.head_dim for size in (heads, shared, shared)], dim=-1
        )
        return query, key, value


class Gemma3Backbone(Qwen3Backbone):
    """Gemma3ForCausalLM: norms on both sides, scaled embeddings, and frequencies of its own for
    local blocks.
    """

    def angles(self, position: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        rotary = self.model.model.rotary_emb
        return {
            kind: angles(rotary, position, dtype, kind)
            for kind in sorted(set(self.model.config.layer_types))
        }

    def rotate(self, i: int, x: Tensor, angles: Any) -> Tensor:
        return super().rotate(i, x, angles[self.layer(i).self_attn.layer_type])

    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer(i)
        y = x + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
        return y + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(y)))


class EuroBertBackbone(Backbone):
    """EuroBertForMaskedLM: Llama's blocks, of which each token sees all others."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.llama = LlamaBackbone(*arguments)

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.llama.tokens(input_ids)

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        everywhere = torch.arange(x.shape[1], device=x.device)
        query, known = self.llama.project(i, x, self.llama.angles(everywhere, x.dtype))
        if position is not None:
            x = at(x, position)
            query, _ = self.llama.project(i, x, self.llama.angles(position[:, None], x.dtype))
        return self.llama.mix(i, x, self.llama.attend(i, query, known, bias))

    def head(self, x: Tensor) -> Tensor:
        return self.llama.head(x)

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        return self.llama.vocabulary()


def longest_row(config: Any, by_layer: bool = True) -> int:
    """Tokens up to which neither a sliding window nor the scaling of rotary positions for long rows
    has an effect.

    by_layer: whether transformers' class asks `layer_types` which layers have the window; else all
    have it. Raises ExportError for traits that the backbone does not compute.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ExportError(
            f"this {config.model_type} model caps its attention scores, which is not supported"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ExportError(f"this {config.model_type} model is an encoder, which is not supported")
    limits = [unscaled_positions(config)]
    window = getattr(config, "sliding_window", None)
    if window and (
        "sliding_attention" in (getattr(config, "layer_types", None) or ()) or not by_layer
    ):
        limits.append(int(window))
    return min(limits)


_TINY = sizes(
    3, 64, 4, 96, 1000, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0
)
LLAMA = FamilySpec(
    model_type="llama",
    model_class="LlamaForCausalLM",
    backbone=LlamaBackbone,
    architecture="decoder",
    template_group="causal",
    blocks=lambda model: model.model.layers,
    embedding=lambda model: model.model.embed_tokens,
    head=lambda model: model.lm_head,
    begin="bos_token",
    end=None,
    mask=None,
    positions=longest_row,
    prompt_takes_positions=True,
    tiny=_TINY,
    shapes={
        "smollm2-135m": sizes(
            30,
            576,
            9,
            1536,
            49152,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        ),
        "llama-3.2-1b": sizes(
            16,
            2048,
            32,
            8192,
            128256,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            head_dim=64,
            tie_word_embeddings=True,
        ),
    },
)


WINDOWED = partial(longest_row, by_layer=False)


def _kin(
    model_type: str, model_class: str, backbone: type[Backbone], tiny: dict[str, Any], **more: Any
) -> FamilySpec:
    kin = replace(
        LLAMA, model_type=model_type, model_class=model_class, backbone=backbone, shapes={}, **more
    )
    return replace(kin, tiny=_TINY | tiny)


MISTRAL = _kin("mistral", "MistralForCausalLM", LlamaBackbone, {"head_dim": 16}, positions=WINDOWED)
QWEN2 = replace(
    _kin("qwen2", "Qwen2ForCausalLM", LlamaBackbone, {}),
    shapes={
        "qwen2.5-0.5b": sizes(
            24, 896, 14, 4864, 151936, num_key_value_heads=2, tie_word_embeddings=True
        )
    },
)
QWEN3 = replace(
    _kin("qwen3", "Qwen3ForCausalLM", Qwen3Backbone, {"head_dim": 24}),
    shapes={
        "qwen3-0.6b": sizes(
            28,
            1024,
            16,
            3072,
            151936,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    },
)
SMOLLM3 = _kin(
    "smollm3",
    "SmolLM3ForCausalLM",
    SmolLM3Backbone,
    {"no_rope_layer_interval": 2, "bos_token_id": 2},
)
OLMO2 = _kin("olmo2", "Olmo2ForCausalLM", Olmo2Backbone, {})
PHI3 = _kin("phi3", "Phi3ForCausalLM", Phi3Backbone, {}, positions=WINDOWED)
GEMMA3 = _kin(
    "gemma3_text", "Gemma3ForCausalLM", Gemma3Backbone, {"head_dim": 16, "sliding_window": 512}
)
EUROBERT = replace(
    LLAMA,
    model_type="eurobert",
    model_class="EuroBertForMaskedLM",
    backbone=EuroBertBackbone,
    architecture="encoder",
    template_group="masked",
    begin="bos_token",
    end="eos_token",
    mask="mask_token",
    shapes={"eurobert-210m": sizes(12, 768, 12, 3072, 128256, num_key_value_heads=12)},
)
