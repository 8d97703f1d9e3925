"""What a checkpoint's small files may say: checked before anything large is read or made."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from bbt_accel.core.bundle import Architecture
from bbt_accel.errors import ExportError

BOUNDS = (
    (
        2**11,
        (
            "num_hidden_layers",
            "num_layers",
            "num_decoder_layers",
            "encoder_layers",
            "decoder_layers",
        ),
    ),
    (2**11, ("num_hidden_groups", "inner_group_num")),  # of ALBERT
    (2**12, ("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads")),
    (2**12, ("decoder_attention_heads",)),
    (
        2**18,
        (
            "hidden_size",
            "embedding_size",
            "d_model",
            "head_dim",
            "d_kv",
            "relative_attention_num_buckets",
        ),
    ),
    (2**20, ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")),
    (2**24, ("vocab_size", "max_position_embeddings", "type_vocab_size")),
)
"""Largest values of a configuration, far beyond those of any published checkpoint."""
RELATIVE_POSITIONS = ("relative_key", "relative_key_query")
"""BERT's; transformers 5 leaves out their weights, without an error. Other models write other
names, and mean none.
"""


def check_config(checkpoint: str | Path, config: Any) -> None:
    """Raises ExportError for sizes that are no numbers or that no checkpoint has, and for what
    transformers ignores.
    """
    positions = getattr(config, "position_embedding_type", None)
    if positions in RELATIVE_POSITIONS:
        raise ExportError(
            f"{checkpoint} has {positions!r:.40} positions; only absolute ones are supported"
        )
    for most, names in BOUNDS:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise ExportError(
                    f"{checkpoint}: config.json has {name} {value!r:.40}; it must lie in 1..{most}"
                )


def check_attention(checkpoint: str | Path, config: Any, architecture: Architecture) -> None:
    """Raises ExportError for an encoder with causal attention, and for a decoder whose tokens see
    all others.
    """
    name, other = ("is_decoder", True) if architecture == "encoder" else ("is_causal", False)
    if architecture != "encoder-decoder" and getattr(config, name, None) is other:
        raise ExportError(
            f"{checkpoint}: config.json has {name} {other}; not supported for {architecture}s"
        )


def check_shards(folder: Path) -> None:
    """Raises ExportError for an index of weights that names files outside the folder, which
    transformers would read.
    """
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ExportError(
                f"{index} is not an index of weights; download the checkpoint again"
            ) from None
        for shard in shards:
            if not isinstance(shard, str) or PurePath(shard).name != shard:
                raise ExportError(f"{index} names {shard!r:.80}, which is not a file of its folder")


def license_of(checkpoint: str | Path, revision: str | None = None) -> str | None:
    """The licence that the model card of a folder or of a hub id names, or a GGUF file; None if
    there is none.

    Of several it is the first.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        if Path(checkpoint).suffix == ".gguf":
            from gguf import GGUFReader

            found = GGUFReader(checkpoint).fields["general.license"].contents()
        else:
            card = Path(checkpoint) / "README.md"
            if not Path(checkpoint).exists():
                card = Path(hf_hub_download(str(checkpoint), "README.md", revision=revision))
            found = ModelCard(card.read_text(encoding="utf-8")).data.license
        found = found[0] if isinstance(found, list) else found
    except Exception:  # without a card, or with a damaged one, nothing is known
        return None
    return found if isinstance(found, str) else None
