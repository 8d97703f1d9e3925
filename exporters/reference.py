"""The naive forward: transformers' own class on the whole padded batch, nothing left out.

What every engine is held to, and the baseline of every benchmark. The prompt is put in place with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import shift_tokens_right

from bbt_accel.bundle import BundleInfo


class Reference:
    """One candidate at a time through `model`, as a user of transformers would write it."""

    def __init__(self, model: nn.Module, info: BundleInfo) -> None:
        self.model: Any = model
        self.info = info
        self.first = 1 if info.family in ("roberta", "bert", "bart") else 0

    @torch.inference_mode()
    def label_logits(
        self, prompt: Tensor, input_ids: Tensor, attention_mask: Tensor, readout: Tensor, label_token_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """float32 (n, H) or (L, n, H), int64 rows → float32 (N, C)."""
        info = self.info
        mask = (
            F.pad(attention_mask, (info.n_prompt_tokens, 0), value=1) if info.prompt_mode == "cat" else attention_mask
        )
        arguments = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        if info.family == "bart" and decoder_input_ids is None:
            config = self.model.config
            decoder_input_ids = shift_tokens_right(input_ids, config.pad_token_id, config.decoder_start_token_id)
        if info.family == "t5" and decoder_input_ids is None:
            start = torch.tensor([[info.special.decoder_start, info.special.mask]], device=input_ids.device)
            decoder_input_ids = start.expand(len(input_ids), -1)
        if info.family in ("bart", "t5"):
            arguments["decoder_input_ids"] = decoder_input_ids
        elif info.prompt_mode == "cat":
            readout = readout + info.n_prompt_tokens
        if info.family == "gpt2" and info.method == "bbt":
            arguments["inputs_embeds"] = self.with_prompt(
                prompt, self.model.transformer.wte(arguments.pop("input_ids"))
            )
            logits = self.model(**arguments).logits
        else:
            with self.hooks(prompt):
                logits = self.model(**arguments).logits
        rows = torch.arange(len(readout), device=readout.device)
        return logits[rows, readout][:, label_token_ids].float()

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """What enters each block when all prompts are zero: L tensors (N, S, H)."""
        seen: list[Tensor] = []
        handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in self.blocks()]
        zero = torch.zeros(self.info.prompt_shape, device=input_ids.device)
        try:
            readout = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
            self.label_logits(zero, input_ids, attention_mask, readout, readout[:1])
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def blocks(self) -> list[nn.Module]:
        model, family = self.model, self.info.family
        if family == "gpt2":
            return list(model.transformer.h)
        if family == "t5":
            return list(model.encoder.block)
        if family == "bart":
            return list(model.model.encoder.layers)
        return list(model.base_model.encoder.layer)

    def embedding(self) -> nn.Module:
        """The module whose output the bbt prompt is added to or put in front of."""
        model, family = self.model, self.info.family
        if family == "bart":
            return model.model.encoder.embed_tokens
        if family == "t5":
            return model.encoder.embed_tokens
        base = model.base_model
        return getattr(base, "embeddings_project", base.embeddings)

    def with_prompt(self, prompt: Tensor, x: Tensor) -> Tensor:
        """(n, H) and (N, S, H) → (N, S, H) in add mode, (N, n + S, H) in cat mode."""
        if self.info.prompt_mode == "cat":
            return torch.cat([prompt.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = x.clone()
        x[:, self.first : self.first + self.info.n_prompt_tokens] += prompt.to(x.dtype)
        return x

    @contextmanager
    def hooks(self, prompt: Tensor) -> Iterator[None]:
        """The prompt in place: at the embedding for bbt, before each block for bbtv2."""

        def before(layer: int) -> Callable[..., Any]:
            return lambda _, args: (self.with_prompt(prompt[layer], args[0]), *args[1:])

        if self.info.method == "bbt":
            handles = [self.embedding().register_forward_hook(lambda _, args, out: self.with_prompt(prompt, out))]
        else:
            handles = [block.register_forward_pre_hook(before(i)) for i, block in enumerate(self.blocks())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
