"""GPT-2: causal, so the prompt in front sees no text, and its states are computed once per candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbt_accel.exporters.backbone import (
    Backbone,
    State,
    at,
    attend,
    broadcast_add,
    causal_bias,
    each,
    padding_bias,
    rows_at,
)
from bbt_accel.exporters.family import FamilySpec


class GPT2WholeBackbone(Backbone):
    """GPT2LMHeadModel with the prompt computed once per row like the text behind it: without `prefix-cache`."""

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.model.transformer.wte(input_ids)

    def enter(self, x: Tensor) -> Tensor:
        return x + self.model.transformer.wpe.weight[: x.shape[1]]

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        length = attention_mask.shape[1]
        return padding_bias(attention_mask) + causal_bias(length, length, attention_mask.device)

    def block(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        layer = self.model.transformer.h[i]
        size, attn = layer.attn.embed_dim, layer.attn
        qkv = linear(attn.c_attn, layer.ln_1(x))
        asked = qkv if query is x else linear(attn.c_attn, layer.ln_1(query))
        key, value = qkv[..., size:].chunk(2, dim=-1)
        context = attend(asked[..., :size], key, value, attn.num_heads, bias, attn.scaling)
        return self.feed_forward(layer, query + linear(attn.c_proj, context))

    @staticmethod
    def feed_forward(layer: Any, x: Tensor) -> Tensor:
        hidden = layer.mlp.act(linear(layer.mlp.c_fc, layer.ln_2(x)))
        return x + linear(layer.mlp.c_proj, hidden)

    def head(self, x: Tensor) -> Tensor:
        return self.model.transformer.ln_f(x)

    def vocabulary(self) -> tuple[Tensor, None]:
        return self.model.lm_head.weight, None


class GPT2Backbone(GPT2WholeBackbone):
    """GPT2LMHeadModel.

    The first n positions ("prefix", (P, n, H)) and the text behind them ("hidden", (P, N, T, H)) are separate states.
    In add mode all rows of a call begin with the same n tokens (engines group rows accordingly).
    """

    def masks(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of the prefix (1, n) and of the text (N, T)."""
        if self.cat:
            return attention_mask.new_ones(1, self.n), attention_mask
        return attention_mask[:1, : self.n], attention_mask[:, self.n :]

    def text_bias(self, attention_mask: Tensor) -> Tensor:
        """(N, 1, T, n + T)."""
        prefix, text = self.masks(attention_mask)
        length = text.shape[1]
        keys = torch.cat([prefix.expand(text.shape[0], -1), text], dim=1)
        return padding_bias(keys) + causal_bias(length, self.n + length, text.device)

    def prefix_bias(self, attention_mask: Tensor) -> Tensor:
        """(1, 1, n, n)."""
        prefix, _ = self.masks(attention_mask)
        return padding_bias(prefix) + causal_bias(self.n, self.n, prefix.device)

    def enter_both(self, prompts: Tensor | None, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token and position embeddings → prefix (P or 1, n, H) and text (N, T, H)."""
        tokens = self.tokens(input_ids)
        if self.cat:
            assert prompts is not None
            prefix, text = prompts, tokens
        else:
            prefix, text = tokens[:1, : self.n], tokens[:, self.n :]
            prefix = prefix if prompts is None else prefix + prompts
        position = self.model.transformer.wpe.weight
        length = text.shape[1]
        return prefix + position[: self.n], text + position[self.n : self.n + length]

    def project(self, i: int, x: Tensor) -> Tensor:
        """Queries, keys and values of block i, side by side."""
        layer = self.model.transformer.h[i]
        return linear(layer.attn.c_attn, layer.ln_1(x))

    def both_blocks(
        self, i: int, prefix: Tensor, text: Tensor, query: Tensor, prefix_bias: Tensor | None, text_bias: Tensor,
        text_qkv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Block i: prefix (P, n, H), text (P·N, T, H), query positions of the text (P·N, Tq, H).

        With prefix_bias None the prefix is not needed any further, and only its keys and values are computed.
        text_qkv: `project` of the text, where it is known already.
        """
        layer = self.model.transformer.h[i]
        size, heads, scale = layer.attn.embed_dim, layer.attn.num_heads, layer.attn.scaling
        rows = text.shape[0] // prefix.shape[0]
        prefix_qkv = self.project(i, prefix)
        text_qkv = self.project(i, text) if text_qkv is None else text_qkv
        asked = text_qkv if query is text else self.project(i, query)
        shared = prefix_qkv[..., size:][:, None].expand(-1, rows, -1, -1).flatten(0, 1)
        key, value = torch.cat([shared, text_qkv[..., size:]], dim=1).chunk(2, dim=-1)
        context = attend(asked[..., :size], key, value, heads, text_bias, scale)
        text = self.feed_forward(layer, query + linear(layer.attn.c_proj, context))
        if prefix_bias is not None:
            query, key, value = prefix_qkv.chunk(3, dim=-1)
            context = attend(query, key, value, heads, prefix_bias, scale)
            prefix = self.feed_forward(layer, prefix + linear(layer.attn.c_proj, context))
        return prefix, text

    def label_logits(
        self, prompts: Tensor, input_ids: Tensor, attention_mask: Tensor, readout: Tensor, label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        p = prompts.shape[0]
        prefix, rows = self.enter_both(prompts, input_ids)
        text = each(p, rows)
        prefix_bias, text_bias = self.prefix_bias(attention_mask), each(p, self.text_bias(attention_mask))
        first = None if "shared-first" in self.without else each(p, self.project(0, rows))
        for i in range(self.layers - 1):
            prefix, text = self.both_blocks(i, prefix, text, text, prefix_bias, text_bias, first if i == 0 else None)
        return self.finish_both(p, prefix, text, text_bias, readout, label_token_ids)

    def finish_both(
        self, p: int | torch.SymInt, prefix: Tensor, text: Tensor, bias: Tensor, readout: Tensor,
        label_token_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        """The last block and the head at the readout position → (P, N, C)."""
        position: Tensor | None = each(p, readout if self.cat else readout - self.n)
        assert position is not None
        query = text
        if "last-block" not in self.without:
            query, bias, position = at(text, position), rows_at(bias, position), None
        _, last = self.both_blocks(self.layers - 1, prefix, text, query, None, bias)
        return self.read(last, position, label_token_ids).unflatten(0, (p, -1))

    def embed(self, input_ids: Tensor) -> State:
        prefix, text = self.enter_both(None, input_ids)
        return {"prefix": prefix, "hidden": text[None]}

    def prompted_both(self, prompts: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Prefix with its prompt (P, n, H), and the text as (P·N, T, H)."""
        nothing = prompts.new_zeros(prompts.shape[0], 1, 1, 1)
        text = broadcast_add(nothing, state["hidden"]).flatten(0, 1)
        return broadcast_add(prompts, state["prefix"]), text

    def step(self, i: int, prompts: Tensor, state: State, attention_mask: Tensor) -> State:
        p = prompts.shape[0]
        prefix, text = self.prompted_both(prompts, state)
        bias = each(p, self.text_bias(attention_mask))
        prefix, text = self.both_blocks(i, prefix, text, text, self.prefix_bias(attention_mask), bias)
        return {"prefix": prefix, "hidden": text.unflatten(0, (p, -1))}

    def last(
        self, prompts: Tensor, state: State, attention_mask: Tensor, readout: Tensor, label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        p = prompts.shape[0]
        prefix, text = self.prompted_both(prompts, state)
        bias = each(p, self.text_bias(attention_mask))
        return self.finish_both(p, prefix, text, bias, readout, label_token_ids)


def linear(module: Any, x: Tensor) -> Tensor:
    """GPT-2's Conv1D without its flattening, which prevents fusions."""
    return x @ module.weight + module.bias


def _shape(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads}


GPT2 = FamilySpec(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    backbone=GPT2Backbone,
    without_prefix_cache=GPT2WholeBackbone,
    architecture="decoder",
    template_group="causal",
    blocks=lambda model: model.transformer.h,
    embedding=lambda model: model.transformer.wte,
    head=lambda model: model.lm_head,
    first_prompt=0,
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
