"""One shape for every backbone: embed → blocks → readout.

A `Backbone` is composed of the modules of a transformers model (none of their code is repeated) so
that nothing is computed that does not depend on the candidate or is not read. `exporters.reference`
runs the model's own forward; tests and every export validate the one against the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bbt_accel.core.bundle import STATES, BundleInfo, block_of, block_stage, output_name

MASKED = -10000.0
"""Added to the attention score of a padded key: exp() of it is 0 in fp32, and twice of it is finite
in fp16.

A key that is not seen must not have a score that is higher by more than this. Up to three of it are
added, in what fp16 graphs compute in fp16 (`half.LARGEST`).
"""

Inputs = dict[str, Tensor]
"""Inputs or outputs of a stage by name."""
ROWS = ("input_ids", "attention_mask")
READOUT = ("readout", "label_token_ids")
"""The inputs that describe the rows, and where their logits are read."""
FOUND = ("label_logits", *STATES)
"""What the last stage returns, float32: (P, N, C), and states as `BoundBatch.outputs`."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor, scale: float | None = None
) -> Tensor:
    """Multi-head attention of (B, Tq, H) over (B, Tk, H).

    bias: added to the scores, (B or 1, heads or 1, Tq or 1, Tk).
    """

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mask = bias if bias.dtype == query.dtype else bias.to(query.dtype)
    query, key, value = split(query), split(key), split(value)
    if torch.onnx.is_in_onnx_export():
        # Written out, with the scale on the queries alone: one of the patterns that TensorRT's
        # documentation asks for ("Fused Attention"), and ONNX Runtime's fusion finds it too. The
        # exporter would transpose keys by way of their shape; and with √scale on queries and keys
        # TensorRT needs two more kernels for the keys.
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query if factor == 1 else query * factor) @ key.transpose(2, 3)
        return (torch.softmax(scores + mask, dim=-1) @ value).transpose(1, 2).flatten(2)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return context.transpose(1, 2).flatten(2)


def padding_bias(attention_mask: Tensor) -> Tensor:
    """(N, S) of 0 and 1 → (N, 1, 1, S) to add to attention scores."""
    return (1.0 - attention_mask.to(torch.float32))[:, None, None, :] * MASKED


def causal_bias(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, queries, keys): the last query sees every key, the one before it all but the last, and
    so on.
    """
    # From `arange` alone: ONNX Runtime adds what it computes from shapes on the CPU, and copies the
    # sum to the GPU.
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    return (torch.arange(keys, device=device)[None, :] > position).to(torch.float32)[
        None, None
    ] * MASKED


def each(population: int | torch.SymInt, x: Tensor) -> Tensor:
    """(N, ...) → (P·N, ...): the same rows for every candidate."""
    return x[None].expand(population, *x.shape).flatten(0, 1)


def at(x: Tensor, position: Tensor | None) -> Tensor:
    """(B, S, H) at one position per row, (B,) → (B, 1, H); unchanged where position is None."""
    return (
        x if position is None else x.gather(1, position[:, None, None].expand(-1, 1, x.shape[-1]))
    )


def mean_state(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, H) over the tokens of a mask (B, T) of 0 and 1 → (B, H); 0 where it has
    none.
    """
    weight = mask.to(x.dtype) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
    return (weight[:, None] @ x)[:, 0]


def population_first(p: int | torch.SymInt, found: Inputs) -> Inputs:
    """(P·N, …) → (P, N, …)."""
    return {name: value.unflatten(0, (p, -1)) for name, value in found.items()}


def rows_at(bias: Tensor, position: Tensor | None) -> Tensor:
    """(1 or B, h, T or 1, K) at one query position per row, (B,) → (B, h, 1, K); unchanged where
    position is None.
    """
    if position is None or bias.shape[2] == 1:
        return bias
    index = position[:, None, None, None].expand(-1, bias.shape[1], 1, bias.shape[3])
    return bias.expand(position.shape[0], -1, -1, -1).gather(2, index)


def broadcast_add(prompts: Tensor, hidden: Tensor) -> Tensor:
    """(P, 1, S, H) + (Q, N, S, H), where Q is 1 or P → (P, N, S, H).

    Q stays dynamic in the graph: cached layers come with Q = 1, the output of a lower block with Q
    = P. torch.export would specialize on one of the two, so the graph gets ONNX's own broadcasting
    Add.
    """
    if torch.onnx.is_in_onnx_export():
        shape = (prompts.shape[0], *hidden.shape[1:])
        return torch.onnx.ops.symbolic("Add", [prompts, hidden], dtype=hidden.dtype, shape=shape)
    return prompts + hidden


class Backbone(nn.Module, ABC):
    """A frozen language model with the prompt of one method and mode. Subclasses define how a
    family computes.
    """

    def __init__(self, model: nn.Module, info: BundleInfo) -> None:
        super().__init__()
        self.model: Any = model
        self.first = info.prompt_start
        self.decodes = info.decodes
        self.n = info.n_prompt_tokens
        self.cat = info.prompt_mode == "cat"
        self.layers = info.n_layers
        self.without = frozenset(info.without)

    # What a family defines

    @abstractmethod
    def tokens(self, input_ids: Tensor) -> Tensor:
        """(N, S) → (N, S, H): what the bbt prompt is added to or prepended to."""

    def enter(self, x: Tensor) -> Tensor:
        """(B, T, H) → (B, T, H): what comes between the prompt and the first block (positions, a
        norm).
        """
        return x

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        """(N, T) → (N, heads or 1, T or 1, T)."""
        return padding_bias(attention_mask)

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        """Block i of x (B, T, H), attending to all of it, with (B, heads or 1, T or 1, T) added to
        the scores.

        position: compute one position per row alone, (B,) → (B, 1, H); then the bias is that
        position's. Decoders define `project` and `mix` instead (`CausalBackbone`).
        """
        raise NotImplementedError

    def first_block(self, prompts: Tensor, tokens: Tensor, bias: Tensor) -> Tensor | None:
        """Block 0 of bbt's add mode from (P, n, H) and (N, S, H), where that takes less work than
        from their sum.
        """
        return None

    def head(self, x: Tensor) -> Tensor:
        """The LM head up to its last matmul: (B, T, H) → (B, T, H)."""
        return x

    @abstractmethod
    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,) of the LM head's last matmul."""

    state: tuple[str, ...] = ("hidden",)
    """Names of what one stage of bbtv2 passes to the next: hidden states, float32, population
    first.
    """

    def stages(self, method: str) -> list[str]:
        """Names of the stages, in the order in which they run.

        `model` is all of bbt; bbtv2 runs `embed`, then `block_00`, `block_01`, … and `last`.
        """
        if method == "bbt":
            return ["model"]
        return ["embed", *(block_stage(i) for i in range(self.layers - 1)), "last"]

    def inputs(self, stage: str) -> tuple[str, ...]:
        """Names of a stage's inputs."""
        tail = (*READOUT, "decoder_input_ids") if self.decodes else READOUT
        if stage == "model":
            return ("prompts", *ROWS, *tail)
        if stage == "embed":
            return ("input_ids",)
        return ("prompts", *self.state, "attention_mask", *(tail if stage == "last" else ()))

    def outputs(self, stage: str) -> tuple[str, ...]:
        """Names of a stage's outputs. A block's are those of its state with `_out`."""
        if stage in ("model", "last"):
            return FOUND
        return self.state if stage == "embed" else tuple(map(output_name, self.state))

    def run(self, stage: str, inputs: Inputs) -> Inputs:
        """One stage by its name, from inputs by name to outputs by name."""
        if stage == "model":
            return self.whole(**inputs)
        if stage == "embed":
            return self.embed(**inputs)
        state: Inputs = {name: inputs[name] for name in self.state}
        rest: Inputs = {name: value for name, value in inputs.items() if name not in state}
        if stage == "last":
            return self.last(state=state, **rest)
        moved = self.step(block_of(stage), state=state, **rest)
        return {output_name(name): value for name, value in moved.items()}

    # The computation, the same for all

    def spread(self, prompts: Tensor, length: int) -> Tensor:
        """(P, n, H) → (P, 1, length, H): the prompt at its positions, zero elsewhere."""
        return F.pad(prompts, (0, 0, self.first, length - self.n - self.first))[:, None]

    def extend(self, attention_mask: Tensor) -> Tensor:
        """In cat mode the mask gets ones for the prompt."""
        if not self.cat:
            return attention_mask
        ones = attention_mask.new_ones((attention_mask.shape[0], self.n))
        return torch.cat([ones, attention_mask], dim=1)  # ONNX Runtime pads no integers on CUDA

    def join(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """bbt: (P, n, H) and (N, S, H) → (P·N, T, H), ready for block 0."""
        p, rows = prompts.shape[0], tokens.shape[0]
        if self.cat:
            front = prompts[:, None].expand(-1, rows, -1, -1).flatten(0, 1)
            x = torch.cat([front, each(p, tokens)], dim=1)
        else:
            x = (tokens[None] + self.spread(prompts, tokens.shape[1])).flatten(0, 1)
        return self.enter(x)

    def whole(
        self,
        prompts: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
    ) -> Inputs:
        """bbt, all blocks: float32 (P, n, H) and int64 rows → `FOUND`."""
        p = prompts.shape[0]
        mask = self.extend(attention_mask)
        tokens = self.tokens(input_ids)
        bias = each(p, self.attention_bias(mask))
        shared = not self.cat and self.layers > 1 and "shared-first" not in self.without
        first = self.first_block(prompts, tokens, bias) if shared else None
        x = self.join(prompts, tokens) if first is None else first
        for i in range(0 if first is None else 1, self.layers - 1):
            x = self.block(i, x, bias)
        return population_first(
            p, self.finish(p, x, bias, mask, readout, label_token_ids, decoder_input_ids)
        )

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
        """The last block and the head, at the readout position alone: (P·N, T, H) → `FOUND`, of P·N
        rows.

        mean_state is that of the block's input, because of its output one position alone is
        computed.
        """
        mean = {"mean_state": mean_state(x, each(p, mask))}
        position = each(p, readout + self.n if self.cat else readout)
        if "last-block" in self.without:
            return self.read(self.block(self.layers - 1, x, bias), position, label_token_ids) | mean
        x = self.block(self.layers - 1, x, rows_at(bias, position), position)
        return self.read(x, None, label_token_ids) | mean

    def read(self, x: Tensor, position: Tensor | None, label_token_ids: Tensor) -> Inputs:
        """The LM head at one position per row, (B, T, H) and (B,) → label logits (B, C) and the
        head's state (B, H).

        position None: x is that position alone.
        """
        weight, bias = self.vocabulary()
        if "label-head" in self.without:
            head = self.head(x)
            logits = at(F.linear(head, weight, bias), position)[:, 0].index_select(
                -1, label_token_ids
            )
            return {"label_logits": self.cap(logits), "readout_state": at(head, position)[:, 0]}
        head = self.head(at(x, position))[:, 0]
        # index_select becomes Gather. Indexing becomes GatherND, which breaks CUDA graphs before
        # ONNX Runtime 1.31.
        weight = weight.index_select(0, label_token_ids)
        bias = None if bias is None else bias.index_select(0, label_token_ids)
        return {"label_logits": self.cap(F.linear(head, weight, bias)), "readout_state": head}

    def cap(self, logits: Tensor) -> Tensor:
        """What follows the LM head's last matmul, element by element."""
        return logits

    # bbtv2: the same in stages, each with its own prompt

    def embed(self, input_ids: Tensor) -> Inputs:
        """(N, S) → the state that enters block 0, without a prompt; its population is 1."""
        return {"hidden": self.enter(self.tokens(input_ids))[None]}

    def prompted(self, prompts: Tensor, state: Inputs) -> Tensor:
        hidden = state["hidden"]
        return broadcast_add(self.spread(prompts, hidden.shape[2]), hidden).flatten(0, 1)

    def step(self, i: int, prompts: Tensor, state: Inputs, attention_mask: Tensor) -> Inputs:
        """Block i with its prompt (P, n, H) added to its input, for a state of population 1 or
        P.
        """
        p = prompts.shape[0]
        x = self.block(
            i, self.prompted(prompts, state), each(p, self.attention_bias(attention_mask))
        )
        return {"hidden": x.unflatten(0, (p, -1))}

    def last(
        self,
        prompts: Tensor,
        state: Inputs,
        attention_mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
    ) -> Inputs:
        """The last block with its prompt, and the readout → `FOUND`."""
        p = prompts.shape[0]
        bias = each(p, self.attention_bias(attention_mask))
        x = self.prompted(prompts, state)
        return population_first(
            p, self.finish(p, x, bias, attention_mask, readout, label_token_ids, decoder_input_ids)
        )
