"""Decoders: causal, so the beginning of a row sees nothing behind it and is computed once for all
that share it.

A row is [begin token and context][prompt][text]. The keys and values of the first part
(instruction, demonstrations) are computed once per search, by the stage `context`; those of the
prompt once per candidate; the text once per pair of a row and a candidate. The text alone needs
logits.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bbt_accel.core.bundle import BundleInfo
from bbt_accel.exporters.families.backbone import (
    READOUT,
    ROWS,
    Backbone,
    Inputs,
    at,
    attend,
    broadcast_add,
    causal_bias,
    each,
    mean_state,
    padding_bias,
    population_first,
    rows_at,
)

CONTEXT = ("context", "context_mask")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row.

    position: (T,). mask: (1 or N, T), 1 for a token. angles: `CausalBackbone.angles` of the
    positions.
    bias: (1 or B, 1, T, K), what is added to their attention scores over this segment and all
    before.
    """

    position: Tensor
    mask: Tensor
    angles: Any
    bias: Tensor


class CausalBackbone(Backbone):
    """A decoder with the prompt between the shared context and the text.

    The begin token, where a family has one, is the first token of the context, so that prompt and
    text are all that the other stages read. In add mode all rows of a call have the same n tokens
    under the prompt (engines group rows accordingly). Without `prefix-cache` the prompt is computed
    once per row, as the first n tokens of the text.
    """

    def __init__(self, model: nn.Module, info: BundleInfo) -> None:
        super().__init__(model, info)
        self.first = 0
        self.cached = "prefix-cache" not in self.without
        self.state = ("prefix", "hidden") if self.cached else ("hidden",)

    # What a family defines

    def add_positions(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, T, H) → (B, T, H): position embeddings, where a family has them; position: (T,)."""
        return x

    def angles(self, position: Tensor, dtype: torch.dtype) -> Any:
        """What `project` needs of the positions, (T,) or (B, 1), in all blocks: the angles of
        rotary embeddings.
        """
        return None

    @abstractmethod
    def project(self, i: int, x: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
        """Block i up to its attention: queries (B, T, heads · D), and keys beside values (B, T, 2 ·
        key heads · D).
        """

    @abstractmethod
    def mix(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        """Block i from the weighted values on: x is its input, (B, T, H) → (B, T, H)."""

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of the queries, and of keys and values."""
        return self.model.config.num_attention_heads, self.model.config.num_attention_heads

    def scale(self, i: int) -> float | None:
        """Of the attention scores of block i; None for 1 / √D."""
        return None

    # Stages

    def stages(self, method: str) -> list[str]:
        return ["context", *super().stages(method)]

    def inputs(self, stage: str) -> tuple[str, ...]:
        if stage == "context":
            return "context_ids", "context_mask"
        if stage == "model":
            return ("prompts", *ROWS, *READOUT, *CONTEXT)
        if stage == "embed":
            return "input_ids", "context_mask"
        return (
            "prompts",
            *self.state,
            "attention_mask",
            *(READOUT if stage == "last" else ()),
            *CONTEXT,
        )

    def outputs(self, stage: str) -> tuple[str, ...]:
        return ("context", "context_hidden") if stage == "context" else super().outputs(stage)

    def run(self, stage: str, inputs: Inputs) -> Inputs:
        return self.context(**inputs) if stage == "context" else super().run(stage, inputs)

    def context(self, context_ids: Tensor, context_mask: Tensor) -> Inputs:
        """The tokens (C,) that all rows begin with → keys beside values of every block, (L, C, 2K),
        and what enters it.

        context_mask: (C,), 1 for a token, 0 for padding, -1 for the one column of an empty context.
        """
        length = context_ids.shape[0]
        position = torch.arange(length, device=context_ids.device)
        x = self.add_positions(self.tokens(context_ids[None]), position)
        bias = padding_bias((context_mask > 0)[None]) + causal_bias(length, length, x.device)
        angles = self.angles(position, x.dtype)
        entering, known = [], []
        for i in range(self.layers):
            query, own = self.project(i, x, angles)
            entering.append(x)
            known.append(own)
            if i < self.layers - 1:
                x = self.mix(i, x, self.attend(i, query, own, bias))
        return {"context": torch.cat(known), "context_hidden": torch.cat(entering)}

    def whole(  # type: ignore[override]
        self,
        prompts: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Inputs:
        p = prompts.shape[0]
        tokens = self.tokens(input_ids)
        prefix, text = self.segments(attention_mask, context_mask, tokens.dtype)
        if not self.cached:
            x = self.add_positions(self.join(prompts, tokens), text.position)
            return self.finish_row(p, None, x, prefix, text, context, readout, label_token_ids)
        front = prompts if self.cat else prompts + tokens[:1, : self.n]
        front = self.add_positions(front, prefix.position)
        rows = self.add_positions(tokens if self.cat else tokens[:, self.n :], text.position)
        first = None
        if "shared-first" not in self.without:
            query, own = self.project(0, rows, text.angles)
            first = each(p, query), each(p, own)
        return self.finish_row(
            p, front, each(p, rows), prefix, text, context, readout, label_token_ids, first
        )

    def finish_row(
        self,
        p: int | torch.SymInt,
        front: Tensor | None,
        x: Tensor,
        prefix: Segment,
        text: Segment,
        context: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        first: tuple[Tensor, Tensor] | None = None,
        begin: int = 0,
    ) -> Inputs:
        """All blocks from `begin` on, and the head: front (P, n, H) or None, x (P·N, T, H) →
        `FOUND`.

        mean_state is that of the text behind the prompt, as it enters the last block.
        """
        text = replace(text, bias=each(p, text.bias))
        for i in range(begin, self.layers - 1):
            front, x = self.both(i, front, x, prefix, text, context, first if i == 0 else None)
        position = each(
            p, readout if self.cat == self.cached else readout + self.n * (1 if self.cat else -1)
        )
        only = None if "last-block" in self.without else position
        behind = 0 if self.cached else self.n
        mean = mean_state(x[:, behind:], each(p, text.mask[:, behind:]))
        _, x = self.both(
            self.layers - 1,
            front,
            x,
            prefix,
            text,
            context,
            first if self.layers == 1 else None,
            only,
        )
        found = self.read(x, position if only is None else None, label_token_ids)
        return population_first(p, found | {"mean_state": mean})

    def embed(self, input_ids: Tensor, context_mask: Tensor) -> Inputs:  # type: ignore[override]
        begin, tokens = (context_mask >= 0).sum(), self.tokens(input_ids)
        x = self.add_positions(tokens, begin + torch.arange(tokens.shape[1], device=tokens.device))
        return (
            {"prefix": x[:1, : self.n], "hidden": x[None, :, self.n :]}
            if self.cached
            else {"hidden": x[None]}
        )

    def enter_layer(self, prompts: Tensor, state: Inputs) -> tuple[Tensor | None, Tensor]:
        """The prefix with its prompt (P, n, H), or None, and the text as (P·N, T, H)."""
        if not self.cached:
            return None, self.prompted(prompts, state)
        nothing = prompts.new_zeros(prompts.shape[0], 1, 1, 1)
        text = broadcast_add(nothing, state["hidden"]).flatten(0, 1)
        return broadcast_add(prompts, state["prefix"]), text

    def step(  # type: ignore[override]
        self,
        i: int,
        prompts: Tensor,
        state: Inputs,
        attention_mask: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Inputs:
        p = prompts.shape[0]
        front, x = self.enter_layer(prompts, state)
        prefix, text = self.segments(attention_mask, context_mask, x.dtype)
        front, x = self.both(i, front, x, prefix, replace(text, bias=each(p, text.bias)), context)
        hidden = x.unflatten(0, (p, -1))
        return {"hidden": hidden} if front is None else {"prefix": front, "hidden": hidden}

    def last(  # type: ignore[override]
        self,
        prompts: Tensor,
        state: Inputs,
        attention_mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Inputs:
        front, x = self.enter_layer(prompts, state)
        prefix, text = self.segments(attention_mask, context_mask, x.dtype)
        begin = self.layers - 1
        p = prompts.shape[0]
        return self.finish_row(
            p, front, x, prefix, text, context, readout, label_token_ids, begin=begin
        )

    # One block

    def segments(
        self, attention_mask: Tensor, context_mask: Tensor, dtype: torch.dtype
    ) -> tuple[Segment, Segment]:
        """The prompt, which is empty where the text holds it, and the text."""
        rows = attention_mask.shape[0]
        if self.cached:
            front = attention_mask.new_ones(1, self.n) if self.cat else attention_mask[:1, : self.n]
            text = attention_mask if self.cat else attention_mask[:, self.n :]
        else:
            front, text = attention_mask[:1, :0], self.extend(attention_mask)
        # An empty context's -1 counts twice, so that a position that sees nothing sees padding
        # rather than that.
        known = torch.cat([context_mask[None], front], dim=1)
        seen = torch.cat([known.expand(rows, -1), text], dim=1)
        begin, n = (context_mask >= 0).sum(), front.shape[1]

        def segment(start: Tensor, mask: Tensor, attended: Tensor) -> Segment:
            length = mask.shape[1]
            bias = padding_bias(attended) + causal_bias(length, attended.shape[1], mask.device)
            position = start + torch.arange(length, device=mask.device)
            return Segment(position, mask, self.angles(position, dtype), bias)

        return segment(begin, front, known), segment(begin + n, text, seen)

    def both(
        self,
        i: int,
        front: Tensor | None,
        x: Tensor,
        prefix: Segment,
        text: Segment,
        context: Tensor,
        projected: tuple[Tensor, Tensor] | None = None,
        position: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Block i of the prompt (P, n, H), but for the last block's, and of the text (P·N, T, H).

        projected: `project` of the text, where it is known already. position: compute one position
        of the text alone.
        """
        known = context[i][None]
        if front is not None:
            query, own = self.project(i, front, prefix.angles)
            known = torch.cat([known.expand(front.shape[0], -1, -1), own], dim=1)
            if i < self.layers - 1:
                front = self.mix(i, front, self.attend(i, query, known, prefix.bias))
        query, own = self.project(i, x, text.angles) if projected is None else projected
        rows = x.shape[0] // known.shape[0]
        known = torch.cat([known[:, None].expand(-1, rows, -1, -1).flatten(0, 1), own], dim=1)
        bias = rows_at(text.bias, position)
        if position is not None:
            x = at(x, position)
            query, _ = self.project(
                i, x, self.angles(text.position.index_select(0, position)[:, None], x.dtype)
            )
        return front, self.mix(i, x, self.attend(i, query, known, bias))

    def attend(self, i: int, query: Tensor, known: Tensor, bias: Tensor) -> Tensor:
        """Attention of block i: (B, Tq, heads · D) over keys beside values (B, Tk, 2 · key heads ·
        D), like the first.

        Query heads that share a key head become further queries of it, so that no key is copied
        (Ainslie et al., 2023, "GQA").
        """
        (heads, shared), (key, value) = self.heads, known.chunk(2, dim=-1)
        group = heads // shared
        if group == 1:
            return attend(query, key, value, heads, bias, self.scale(i))
        length = query.shape[1]
        query = (
            query.unflatten(-1, (shared, group, -1))
            .permute(0, 3, 1, 2, 4)
            .flatten(3, 4)
            .flatten(1, 2)
        )
        bias = bias.expand(-1, -1, length, -1).repeat(1, 1, group, 1)
        found = attend(query, key, value, shared, bias, self.scale(i))
        found = found.unflatten(1, (group, length)).unflatten(-1, (shared, -1))
        return found.permute(0, 2, 3, 1, 4).flatten(2)
