"""Rotary position embeddings (Su et al., 2021, "RoFormer"), on hidden states whose heads are side
by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of the positions (T,) or (B, 1), each (1 or B, T or 1, D)."""


def angles(
    module: Any, position: Tensor, dtype: torch.dtype, layer_type: str | None = None
) -> Angles:
    """The angles of a transformers rotary module, in fp32 as there, then cast to the dtype of the
    hidden states.

    The module's own forward also adapts its frequencies to long rows; families limit rows to where
    it does not.
    layer_type: for modules that have frequencies of their own for each type of layer.
    """
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequency, scaling = (
        getattr(module, f"{prefix}inv_freq"),
        getattr(module, f"{prefix}attention_scaling"),
    )
    position = position if position.dim() == 2 else position[None]
    turns = position[..., None].to(torch.float32) * frequency.to(torch.float32)
    turns = torch.cat([turns, turns], dim=-1)
    return (turns.cos() * scaling).to(dtype), (turns.sin() * scaling).to(dtype)


def unscaled_positions(config: Any) -> int:
    """Tokens up to which the module's own forward does not adapt its frequencies to long rows."""
    rope = config.rope_parameters
    scaled = [one for one in ((rope,) if "rope_type" in rope else rope.values()) if one]
    originals = [
        one["original_max_position_embeddings"] for one in scaled if one["rope_type"] == "longrope"
    ]
    return min(map(int, (config.max_position_embeddings, *originals)))


def rotate(x: Tensor, at: Angles, head_size: int) -> Tensor:
    """(B, T, heads · D) with each head turned by its position's angles; those may cover the first
    part of a head.
    """
    cos, sin = (a[:, :, None] for a in at)
    heads, turned = x.unflatten(-1, (-1, head_size)), cos.shape[-1]
    part = heads if turned == head_size else heads[..., :turned]
    left, right = part.chunk(2, dim=-1)
    part = part * cos + torch.cat([-right, left], dim=-1) * sin
    return (
        part if turned == head_size else torch.cat([part, heads[..., turned:]], dim=-1)
    ).flatten(2)
