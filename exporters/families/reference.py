"""The naive forward: transformers' own class on the whole padded batch, one candidate at a time.

Every engine is validated against it, and it is the baseline of benchmarks. Hooks put the prompt in
place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bbt_accel.core.bundle import BundleInfo
from bbt_accel.exporters.families.backbone import Inputs, at
from bbt_accel.exporters.families.registry import family_of


class Reference:
    """One candidate at a time through `model`, as a user of transformers would write it.

    Its hooks stay on the model, so the model serves nothing else.
    head_at_readout: compute the LM head at the readout position alone, as a careful user would.
    """

    def __init__(self, model: nn.Module, info: BundleInfo, head_at_readout: bool = False) -> None:
        self.model: Any = model
        self.info = info
        self.head_at_readout = head_at_readout
        self.family = family_of(model.config)
        self.forward: Callable[..., Any] = model
        self.prompt, self.start = torch.zeros(info.prompt_shape), info.prompt_start
        """What the hooks put in place, (n, H) or (L, n, H), and where."""
        self.layer = 0
        self.readout = torch.zeros(1, dtype=torch.int64)
        self.entering = self.read = torch.zeros(0)
        """What entered the last block, (N, T, H), and the LM head's last matmul."""
        self.embeds = info.causal and info.method == "bbt"
        """Whether the model gets embeddings: a decoder takes its positions from the length of its
        input.
        """
        self.add_hooks()

    def add_hooks(self) -> None:
        """The prompt at the embedding for bbt, before each block for bbtv2; and states on their
        way.
        """
        if self.info.method == "bbtv2":
            for block in dict.fromkeys(self.family.blocks(self.model)):
                block.register_forward_pre_hook(self.before_block)
        elif not self.embeds:
            embedding = self.family.embedding(self.model)
            embedding.register_forward_hook(lambda _, args, out: self.with_prompt(self.prompt, out))
        if self.head_at_readout:
            head = self.family.head(self.model)
            head.register_forward_pre_hook(lambda _, args: (at(args[0], self.readout), *args[1:]))
        last, vocabulary = (
            list(self.family.blocks(self.model))[-1],
            self.model.get_output_embeddings(),
        )
        self.watched = [
            last.register_forward_pre_hook(lambda _, args: setattr(self, "entering", args[0])),
            vocabulary.register_forward_pre_hook(lambda _, args: setattr(self, "read", args[0])),
        ]

    def before_block(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Layers are counted, because some families compute several with one block."""
        self.layer += 1
        return self.with_prompt(self.prompt[self.layer - 1], args[0]), *args[1:]

    def compile(self) -> None:
        """Run the model under torch.compile; `run` then returns label logits alone."""
        for handle in self.watched:
            handle.remove()
        self.watched = []
        self.forward = torch.compile(self.model, dynamic=False)

    @torch.inference_mode()
    def run(
        self,
        prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        readout: Tensor,
        label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        context_ids: Tensor | None = None,
    ) -> Inputs:
        """float32 (n, H) or (L, n, H), int64 rows → `FOUND` of one candidate, float32."""
        info, cat, self.start = self.info, self.info.prompt_mode == "cat", self.info.prompt_start
        if context_ids is not None:
            context = context_ids.expand(len(input_ids), -1)
            input_ids = insert(input_ids, self.start, context)
            attention_mask = insert(attention_mask, self.start, torch.ones_like(context))
            readout, self.start = readout + len(context_ids), self.start + len(context_ids)
        mask = attention_mask
        if cat:
            mask = insert(mask, self.start, mask.new_ones(len(mask), info.n_prompt_tokens))
        arguments = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if info.decodes:
            given = decoder_input_ids is not None
            arguments["decoder_input_ids"] = (
                decoder_input_ids if given else self.decoder_input(input_ids)
            )
        elif cat:
            readout = readout + info.n_prompt_tokens
        if self.embeds:
            tokens = self.family.embedding(self.model)(arguments.pop("input_ids"))
            arguments["inputs_embeds"] = self.with_prompt(prompt, tokens)
        self.prompt, self.readout, self.layer = prompt, readout, 0
        output = self.forward(**self.family.arguments(arguments))
        rows = torch.arange(len(readout), device=readout.device)
        position = torch.zeros_like(readout) if self.head_at_readout else readout
        found = {"label_logits": output.logits[rows, position][:, label_token_ids].float()}
        if not self.watched:
            return found
        behind = self.start + info.n_prompt_tokens if info.causal else 0
        states = output.encoder_last_hidden_state if info.decodes else self.entering
        real = mask[:, behind:, None].float()
        mean = (states[:, behind:].float() * real).sum(1) / real.sum(1).clamp(min=1)
        return found | {"readout_state": self.read[rows, position].float(), "mean_state": mean}

    def label_logits(self, prompt: Tensor, **rows: Tensor) -> Tensor:
        """Those of `run`: float32 (N, C)."""
        return self.run(prompt, **rows)["label_logits"]

    def decoder_input(self, input_ids: Tensor) -> Tensor:
        """(N, S) → (N, D): the input shifted right, or the start token and the sentinel."""
        special = self.info.special
        start = torch.full_like(input_ids[:, :1], special.decoder_start or 0)
        shifted = self.info.template_group == "masked"
        follow = input_ids[:, :-1] if shifted else torch.full_like(start, special.mask or 0)
        return torch.cat([start, follow], dim=1)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, context_ids: Tensor | None
    ) -> list[Tensor]:
        """What enters each block when all prompts are zero: L tensors (N, S, H), or (N, K + S, H)
        with a context.
        """
        seen: list[Tensor] = []
        blocks = dict.fromkeys(self.family.blocks(self.model))
        handles = [
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for block in blocks
        ]
        zero = torch.zeros(self.info.prompt_shape, device=input_ids.device)
        try:
            readout = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
            self.run(zero, input_ids, attention_mask, readout, readout[:1], context_ids=context_ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def with_prompt(self, prompt: Tensor, x: Tensor) -> Tensor:
        """(n, H) and (N, S, H) → (N, S, H) in add mode, (N, n + S, H) in cat mode."""
        if self.info.prompt_mode == "cat":
            return insert(x, self.start, prompt.to(x.dtype).expand(len(x), -1, -1))
        x = x.clone()
        x[:, self.start : self.start + self.info.n_prompt_tokens] += prompt.to(x.dtype)
        return x


def insert(x: Tensor, position: int, part: Tensor) -> Tensor:
    """(N, S, …) with (N, K, …) in front of a position."""
    return torch.cat([x[:, :position], part, x[:, position:]], dim=1)
