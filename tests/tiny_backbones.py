"""Random checkpoints of every family: exported in a second, with weights large enough that prompts
matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load, save_file
from tiny_bundles import tiny_bundle
from transformers import PreTrainedTokenizerFast

PARITY = Path(__file__).parent / "fixtures" / "parity.npz"
VOCABULARY = 320
POSITIONS = 64
_BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "vocab_size": VOCABULARY, "n_positions": POSITIONS, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20,
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "bos_token_id": 0,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 24, "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ROBERTA = _BERT | {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}
_GATED_T5 = _T5 | {"feed_forward_proj": "gated-gelu"}


def _partly_rotary(share: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    return {"rope_parameters": rope}


BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "roberta": ("roberta", "RobertaForMaskedLM", _ROBERTA),
    "bert": ("bert", "BertForMaskedLM", _BERT | {"num_hidden_layers": 1}),
    "electra": (
        "bert", "ElectraForMaskedLM", _BERT | {"embedding_size": 12, "num_hidden_layers": 3},
    ),
    "bart": ("bart", "BartForConditionalGeneration", _BART),
    "t5": ("t5", "T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "relu"}),
    "t5-v1.1": (
        "t5", "T5ForConditionalGeneration",
        _GATED_T5 | {"tie_word_embeddings": False, "num_decoder_layers": 1},
    ),
    "gpt2": (
        "gpt2", "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY,
         "n_positions": POSITIONS, "bos_token_id": 2, "eos_token_id": 2},
    ),
    "xlm-roberta": ("roberta", "XLMRobertaForMaskedLM", _ROBERTA),
    "camembert": ("roberta", "CamembertForMaskedLM", _ROBERTA),
    "distilbert": (
        "bert", "DistilBertForMaskedLM",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": VOCABULARY,
         "max_position_embeddings": POSITIONS},
    ),
    "albert": (
        "bert", "AlbertForMaskedLM", _BERT | {"embedding_size": 12, "num_hidden_layers": 3},
    ),
    "mpnet": ("roberta", "MPNetForMaskedLM", _BERT | {"max_position_embeddings": POSITIONS + 2}),
    "modernbert": (
        "bert", "ModernBertForMaskedLM",
        {**_BERT, "num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 0,
         "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    ),
    "eurobert": ("roberta", "EuroBertForMaskedLM", _LLAMA | {"mask_token_id": 4}),
    "mt5": ("mt5", "MT5ForConditionalGeneration", _GATED_T5),
    "gpt_neox": (
        "gpt2", "GPTNeoXForCausalLM",
        _BERT | {"bos_token_id": 2, "eos_token_id": 2} | _partly_rotary(0.25),
    ),
    "llama": ("llama", "LlamaForCausalLM", _LLAMA),
    "mistral": ("llama", "MistralForCausalLM", _LLAMA | {"num_key_value_heads": 1}),
    "qwen2": ("gpt2", "Qwen2ForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "qwen3": ("gpt2", "Qwen3ForCausalLM", _LLAMA),
    "smollm3": (
        "llama", "SmolLM3ForCausalLM",
        _LLAMA | {"num_hidden_layers": 3, "no_rope_layer_interval": 2},
    ),
    "olmo2": ("gpt2", "Olmo2ForCausalLM", _LLAMA | {"head_dim": 4}),
    "phi3": ("llama", "Phi3ForCausalLM", _LLAMA | {"head_dim": 8} | _partly_rotary(0.5)),
    "gemma3": (
        "llama", "Gemma3ForCausalLM",
        _LLAMA | {"layer_types": ["sliding_attention", "full_attention"],
                  "sliding_window": POSITIONS, "final_logit_softcapping": 5.0,
                  "query_pre_attn_scalar": 5},
    ),
}  # fmt: skip
"""Name → family, transformers class, configuration."""
VARIANTS = [
    ("roberta", "bbt", "add"), ("roberta", "bbt", "cat"), ("roberta", "bbtv2", "add"),
    ("bert", "bbt", "add"), ("bert", "bbt", "cat"), ("bert", "bbtv2", "add"),
    ("electra", "bbt", "add"), ("electra", "bbt", "cat"), ("electra", "bbtv2", "add"),
    ("bart", "bbt", "add"), ("bart", "bbt", "cat"), ("bart", "bbtv2", "add"),
    ("t5", "bbt", "add"), ("t5-v1.1", "bbt", "cat"), ("t5", "bbtv2", "add"),
    ("gpt2", "bbt", "add"), ("gpt2", "bbt", "cat"), ("gpt2", "bbtv2", "add"),
]  # fmt: skip
"""Backbone, method and mode: every family with each, once."""
EACH = (("bbt", "add"), ("bbt", "cat"), ("bbtv2", "add"))
RELATIVES = [
    (name, method, mode)
    for name in list(BACKBONES)[list(BACKBONES).index("xlm-roberta") :]
    for method, mode in EACH
]
"""The families that share most of their computation with one in `VARIANTS`, in the same way."""
N_PROMPT = 3


def marks(variant: tuple[str, str, str]) -> list[Any]:
    """Relatives are slow tests, for each is an export of its own; but Llama stands for what the
    others have not.

    What it adds to a prompt of tokens, GPT-2 has.
    """
    fast = [*VARIANTS, ("llama", "bbt", "cat"), ("llama", "bbtv2", "add")]
    return [] if variant in fast else [pytest.mark.slow]


def tiny_model(name: str, cls: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, biases and norms. `cls`: another class of the same
    configuration.
    """
    _, own, settings = BACKBONES[name]
    kind: Any = getattr(transformers, cls or own)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += 0.2 * torch.randn_like(model.final_logits_bias)
    return model


def save_tokenizer(family: str, folder: Path, size: int = VOCABULARY) -> None:
    special = tiny_bundle(folder, family, size=size).info.special
    text = {}
    if family in ("roberta", "bart"):
        text = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        text["mask_token"] = "<mask>"
    elif family == "bert":
        text = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    elif family in ("t5", "mt5"):
        text = {"eos_token": "</s>"}
    elif family == "gpt2":
        text = {"bos_token": "</s>", "eos_token": "</s>"}
    elif family == "llama":
        text = {"bos_token": "<s>", "eos_token": "</s>"}
    unknown, pad = ("[UNK]", "[PAD]") if family == "bert" else ("<unk>", "<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token=unknown, pad_token=pad, **text
    )
    assert tokenizer.pad_token_id == special.pad
    tokenizer.save_pretrained(folder)


def save_backbone(
    name: str, folder: Path, cls: str | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write checkpoint and tokenizer; returns the folder."""
    tiny_model(name, cls, seed, **changes).save_pretrained(folder)
    save_tokenizer(BACKBONES[name][0], folder)
    return folder


def save_recorded_backbone(name: str, folder: Path) -> Path:
    """The same from the weights in fixtures/parity.npz, if it has them: no version of a library
    changes those.
    """
    with np.load(PARITY) as parity:
        if f"{name}/config" not in parity:
            return save_backbone(name, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(str(parity[f"{name}/config"]))
        weights = load(parity[f"{name}/weights"].tobytes())
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(BACKBONES[name][0], folder)
    return folder
