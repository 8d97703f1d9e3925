"""How transformers loads a checkpoint: configuration, weights and tokenizer, and none of the
checkpoint's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import find_adapter_config_file

from bbt_accel.errors import ExportError, MissingDependency, first_line
from bbt_accel.exporters.families.checkpoint import check_attention, check_config, check_shards
from bbt_accel.exporters.families.family import FamilySpec
from bbt_accel.exporters.families.registry import families, family_of
from bbt_accel.io.machine import installed

LOADING = Lock()
"""Held while a checkpoint is read."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A bundle's precision → the dtype of its checkpoint."""
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What the model returns, whatever the checkpoint's configuration asks for."""


def place(checkpoint: str | Path, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """A checkpoint as transformers' from_pretrained takes it. Raises MissingDependency for a GGUF
    file without gguf.
    """
    path = Path(checkpoint)
    safe = {
        "trust_remote_code": False
    }  # else transformers asks on a terminal whether to run a checkpoint's code
    if path.suffix != ".gguf":
        return str(checkpoint), safe | {"revision": revision}
    if installed("gguf") is None:
        raise MissingDependency('GGUF files need the package gguf; pip install "bbt-accel[gguf]"')
    if not path.is_file():
        raise ExportError(f"there is no file {checkpoint}")
    return str(path.parent), safe | {"gguf_file": str(path.absolute())}


def load_config(checkpoint: str | Path, revision: str | None = None) -> Any:
    """The configuration of a hub id, a local folder or a GGUF file.

    Raises ExportError if there is none, if it is of another family, or beside an adapter, which
    transformers would load into the model, from a pickle, too; MissingDependency for a GGUF file
    without gguf.
    """
    families()  # installed packages register their configurations with transformers
    where, options = place(checkpoint, revision)
    check_shards(Path(where))
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except Exception as error:  # of a damaged file, any
        raise ExportError(
            f"cannot load {checkpoint} ({first_line(error).rstrip('.')}); "
            "give a local folder, a hub id or a GGUF file"
        ) from None
    if find_adapter_config_file(where, revision=options.get("revision")) is not None:
        raise ExportError(
            f"{checkpoint} has an adapter (adapter_config.json); export the model it is merged into"
        )
    check_attention(checkpoint, config, family_of(config).architecture)
    check_config(checkpoint, config)
    return config


def load_model(
    checkpoint: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The family's own transformers class with sdpa attention where it has that, ready for
    inference.

    Raises ExportError for a checkpoint without an LM head, whose logits would be random.
    """
    transformers.logging.disable_progress_bar()
    config = load_config(checkpoint, revision)
    family = family_of(config)
    where, options = place(checkpoint, revision)
    kind = family.load_class()
    attention = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
    if "gguf_file" not in options:
        options["use_safetensors"] = True  # and no pickle
    elif hasattr(transformers, "GgufConfig"):  # newer releases keep the weights quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # transformers draws a progress bar for GGUF files, terminal or not. Neither redirect_stderr
        # nor from_pretrained is thread-safe.
        with LOADING, redirect_stderr(StringIO()):
            model, report = kind.from_pretrained(
                where,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                **OUTPUTS,
                **options,
            )
    except MemoryError:
        raise
    except Exception as error:
        raise ExportError(
            f"cannot load the weights of {checkpoint} ({problem_of(error)})"
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:
        found = ", ".join(config.architectures or ["an unnamed class"])
        raise ExportError(
            f"{checkpoint} ({found}) has no {family.class_name} head: {missing[0]} is missing; "
            "use a checkpoint that was saved with its LM head"
        )
    check_read(checkpoint, model, family, report["unexpected_keys"])
    return model.eval().requires_grad_(False)


def check_read(
    checkpoint: str | Path, model: nn.Module, family: FamilySpec, unread: Iterable[str]
) -> None:
    """Raises ExportError for weights of a block that were not read, which transformers leaves out
    without an error.

    unread: names of all weights that were not read. Those of poolers, of other heads and of further
    blocks may be.
    """
    blocks = {id(block) for block in family.blocks(model)}
    inside = tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks)
    lost = sorted(
        name for name in unread if name.startswith(inside) and name.endswith((".weight", ".bias"))
    )
    if lost:
        raise ExportError(
            f"{checkpoint} has {lost[0]}, for which its config.json has no place; correct that"
        )


def problem_of(error: Exception) -> str:
    """Why weights are not loaded, where transformers' own words are advice for its callers."""
    if "ignore_mismatched_sizes" in str(error):
        return "they have other sizes than config.json says"
    if isinstance(error, OSError) and "safetensors" in str(error):
        return (
            "there is no model.safetensors, and pickles are not read; "
            "write one with transformers' save_pretrained"
        )
    return first_line(error).rstrip(".")


def load_tokenizer(checkpoint: str | Path, revision: str | None = None) -> Any:
    """The checkpoint's fast tokenizer. Raises ExportError if there is none."""
    where, options = place(checkpoint, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, use_fast=True, **options)
    except Exception as error:
        raise ExportError(
            f"cannot load the tokenizer of {checkpoint} ({first_line(error).rstrip('.')})"
        ) from None
    if not tokenizer.is_fast:
        raise ExportError(
            f"{checkpoint} has no fast tokenizer (tokenizer.json), which bundles need"
        )
    if (
        len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2
    ):  # made up from the configuration
        raise ExportError(
            f"{checkpoint} has no tokenizer; save its tokenizer.json beside the weights"
        )
    return tokenizer
