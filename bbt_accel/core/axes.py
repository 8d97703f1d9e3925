"""The dynamic axes of the graphs, for tracing and for TensorRT's shape profiles."""

from __future__ import annotations

AXES: dict[str, tuple[str | None, ...]] = {
    "prompts": ("candidates",),
    "input_ids": ("rows", "tokens"),
    "attention_mask": ("rows", "tokens"),
    "readout": ("rows",),
    "label_token_ids": ("labels",),
    "decoder_input_ids": ("rows", "decoder_tokens"),
    "context_ids": ("context",),
    "context_mask": ("context",),
    "context": (None, "context"),
    "hidden": ("state", "rows", "text"),
    "prefix": ("state",),
    "z": ("candidates", "dim"),
    "matrix": (None, "dim"),
    "p0": (),
    "label_logits": ("candidates", "rows", "labels"),
    "targets": ("rows", "labels"),
    "classes": ("labels",),
}
"""Input → the name of each leading axis; None, and every further axis, has a fixed size.

`state` is the population of bbtv2's hidden states: 1 from the cache, that of the candidates above
the searched layer. `text` is `tokens` without the prompt where a decoder in add mode keeps the
prompt's states apart.
"""
