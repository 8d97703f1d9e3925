"""Which transformers class and which backbone stand for a checkpoint, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from bbt_accel.bundle import BundleInfo
from bbt_accel.errors import ExportError, first_line
from bbt_accel.exporters.backbone import Backbone
from bbt_accel.exporters.bart import BartBackbone
from bbt_accel.exporters.bert import BertBackbone, ElectraBackbone
from bbt_accel.exporters.gpt2 import GPT2Backbone, GPT2WholeBackbone
from bbt_accel.exporters.roberta import RobertaBackbone
from bbt_accel.exporters.t5 import T5Backbone

FAMILIES: dict[str, tuple[str, type[Backbone]]] = {
    "roberta": ("RobertaForMaskedLM", RobertaBackbone),
    "bert": ("BertForMaskedLM", BertBackbone),
    "electra": ("ElectraForMaskedLM", ElectraBackbone),
    "bart": ("BartForConditionalGeneration", BartBackbone),
    "t5": ("T5ForConditionalGeneration", T5Backbone),
    "gpt2": ("GPT2LMHeadModel", GPT2Backbone),
}
"""By the checkpoint's `model_type`."""


def load_config(checkpoint: str | Path, revision: str | None = None) -> Any:
    """The configuration of a hub id or local folder. Raises ExportError if there is none, or of a foreign family."""
    try:
        config = AutoConfig.from_pretrained(str(checkpoint), revision=revision)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"cannot load {checkpoint} ({first_line(error).rstrip('.')}); give a local folder or a hub id"
        ) from None
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ExportError(f"{checkpoint} is a {config.model_type} model; supported families are {known}")
    return config


def load_model(checkpoint: str | Path, revision: str | None = None) -> nn.Module:
    """The family's own transformers class in float32 with sdpa attention, ready for inference.

    Raises ExportError for a checkpoint without an LM head, whose logits would be random.
    """
    transformers.logging.disable_progress_bar()
    config = load_config(checkpoint, revision)
    name = FAMILIES[config.model_type][0]
    try:
        model, report = getattr(transformers, name).from_pretrained(
            str(checkpoint), revision=revision, dtype=torch.float32, attn_implementation="sdpa",
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"cannot load the weights of {checkpoint} ({first_line(error).rstrip('.')})") from None
    missing = sorted(report["missing_keys"])
    if missing:
        found = ", ".join(config.architectures or ["an unnamed class"])
        raise ExportError(
            f"{checkpoint} ({found}) has no {name} head: {missing[0]} is missing; "
            "use a checkpoint that was saved with its LM head"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: str | Path, revision: str | None = None) -> Any:
    """The checkpoint's fast tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), revision=revision, use_fast=True)
    except (OSError, ValueError, ImportError) as error:
        raise ExportError(f"cannot load the tokenizer of {checkpoint} ({first_line(error).rstrip('.')})") from None
    if not tokenizer.is_fast:
        raise ExportError(f"{checkpoint} has no fast tokenizer (tokenizer.json), which bundles need")
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:  # made up from the configuration
        raise ExportError(f"{checkpoint} has no tokenizer; save its tokenizer.json beside the weights")
    return tokenizer


def make_backbone(model: nn.Module, info: BundleInfo) -> Backbone:
    """The backbone of a loaded model for one method, mode and prompt length."""
    model_type: str = model.config.model_type  # type: ignore[union-attr, assignment]
    cls = FAMILIES[model_type][1]
    if model_type == "gpt2" and "prefix-cache" in info.without:
        cls = GPT2WholeBackbone
    return cls(model, info).eval()
