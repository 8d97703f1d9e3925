"""From a checkpoint to a bundle: load, trace, share the weights, check against eager PyTorch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from bbt_accel.bundle import Bundle, BundleInfo, Method, PromptMode, SpecialTokens, new_folder, write_info
from bbt_accel.demo import BACKBONE
from bbt_accel.errors import ExportError, UsageError, first_line
from bbt_accel.exporters import graph
from bbt_accel.exporters.device import write_device_graphs
from bbt_accel.exporters.families import load_model, load_tokenizer, make_backbone
from bbt_accel.savings import check_savings, inside

TOLERANCE = 1e-4
"""Largest difference of label logits from eager PyTorch, relative to the largest logit where that is beyond 1."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many steps are done, and of how many."""


def export_bundle(
    backbone: str | Path,
    output: str | Path,
    *,
    method: Method = "bbt",
    prompt_mode: PromptMode = "add",
    n_prompt_tokens: int = 50,
    revision: str | None = None,
    without: Collection[str] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Export a hub id, a local folder or `demo` into a new bundle folder, and check it.

    without: savings that the graphs are to do without, to be measured, by the names in `bbt_accel.savings`.
    Raises UsageError for a combination that does not exist, ExportError for a checkpoint that cannot be loaded, has
    no LM head, or whose graphs differ from eager PyTorch by more than `TOLERANCE`.
    """
    check_arguments(method, prompt_mode, n_prompt_tokens)
    off = inside(check_savings(without))
    if others := [name for name in without if name not in off]:
        raise UsageError(f"{others[0]} is no part of the graphs: switch it off where they run, in tune and bench")
    tell = progress or (lambda what, done, of: None)
    checkpoint = BACKBONE if str(backbone) == "demo" else backbone
    output = Path(output)
    if output.exists():
        raise UsageError(f"{output} exists already; choose another -o or remove it")
    tell("loading the checkpoint", 0, 1)
    model, tokenizer = load_model(checkpoint, revision), load_tokenizer(checkpoint, revision)
    info = describe(model, tokenizer, str(backbone), revision, method, prompt_mode, n_prompt_tokens)
    info = info.model_copy(update={"without": off})
    with new_folder(output) as folder:
        try:
            model.save_pretrained(folder, max_shard_size="1000GB")  # type: ignore[operator]
        except SafetensorError as refusal:  # no OSError, even where the disk is full
            raise ExportError(
                f"cannot write {output} ({first_line(refusal)}); free some space or choose another -o"
            ) from refusal
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        info = info.model_copy(update={"stages": trace(model, info, folder, tell)})
        write_device_graphs(folder, info)
        write_info(folder, info)
        tell("checking against eager PyTorch", 0, 1)
        error = checked(folder)
        write_info(folder, info.model_copy(update={"max_error": error}))
    return Bundle.read(output, verify=False)


def check_arguments(method: str, prompt_mode: str, n_prompt_tokens: int) -> None:
    if method not in ("bbt", "bbtv2"):
        raise UsageError(f"--method must be bbt or bbtv2, not {method}")
    if prompt_mode not in ("add", "cat"):
        raise UsageError(f"--prompt-mode must be add or cat, not {prompt_mode}")
    if method == "bbtv2" and prompt_mode == "cat":
        raise UsageError("bbtv2 adds its prompts to the hidden states of every layer; use --prompt-mode add")
    if n_prompt_tokens < 1:
        raise UsageError(f"--n-prompt-tokens must be at least 1, not {n_prompt_tokens}")


def trace(model: nn.Module, info: BundleInfo, folder: Path, tell: Progress) -> list[str]:
    """Write the graphs of every stage; returns their names."""
    backbone = make_backbone(model, info)
    weights = graph.SharedWeights(folder / "model.safetensors")
    others = graph.NewWeights(folder / "weights.data")
    of = 1 if info.method == "bbt" else info.n_layers + 1
    names = []
    for done, stage in enumerate(graph.stages(backbone, info.method, info.hidden_size)):
        tell(f"tracing {stage.name}", done, of)
        graph.save_stage(graph.export_stage(stage, backbone), folder, stage.name, weights, others)
        names.append(stage.name)
    return names


def describe(
    model: nn.Module, tokenizer: Any, backbone: str, revision: str | None, method: Method, mode: PromptMode, n: int
) -> BundleInfo:
    """bundle.json, but for what is known only after tracing and checking."""
    config: Any = model.config
    family = {"electra": "bert"}.get(config.model_type, config.model_type)
    longest = max_length(config, family) - (n if mode == "cat" and family in ("bart", "gpt2") else 0)
    if longest < n + 4:
        raise UsageError(f"--n-prompt-tokens {n} leaves no room for text: the backbone has {longest} positions")
    local = Path(backbone).is_dir()
    return BundleInfo(
        backbone=str(Path(backbone).resolve()) if local else backbone,
        revision=revision or (None if local else getattr(config, "_commit_hash", None)),
        family=family,
        method=method,
        prompt_mode=mode,
        n_prompt_tokens=n,
        hidden_size=config.hidden_size,
        n_layers=config.encoder_layers if family == "bart" else config.num_hidden_layers,
        vocab_size=config.vocab_size,
        max_length=longest,
        word_embedding_std=float(np.std(model.get_input_embeddings().weight.numpy(), dtype=np.float64)),  # type: ignore[operator]
        special=special_tokens(config, tokenizer, family),
        precision="fp32",
        target="onnx",
        opset=graph.OPSET,
        stages=[],
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
    )


def max_length(config: Any, family: str) -> int:
    """Positions of the backbone. RoBERTa counts from its padding token's id; T5 has none but its training's."""
    if family == "t5":
        return int(getattr(config, "n_positions", 512))
    if family == "roberta":
        return int(config.max_position_embeddings - config.pad_token_id - 1)
    return int(config.max_position_embeddings)


def special_tokens(config: Any, tokenizer: Any, family: str) -> SpecialTokens:
    mask = "<extra_id_0>" if family == "t5" else tokenizer.mask_token if family != "gpt2" else None
    mask_id = None if mask is None else tokenizer.convert_tokens_to_ids(mask)
    if family != "gpt2" and (mask_id is None or mask_id == tokenizer.unk_token_id):
        raise ExportError(f"the tokenizer has no mask token, which {family} prompts need")
    masked = family in ("roberta", "bert", "bart")
    pads = (config.pad_token_id, tokenizer.pad_token_id, config.eos_token_id, 0)
    return SpecialTokens(
        begin=tokenizer.cls_token_id if masked else None,
        end=tokenizer.sep_token_id if masked else tokenizer.eos_token_id if family == "t5" else None,
        pad=next(p for p in pads if isinstance(p, int) and p < config.vocab_size),
        mask=mask_id,
        mask_text=mask,
        decoder_start=config.decoder_start_token_id if family in ("bart", "t5") else None,
    )


def checked(folder: Path) -> float:
    """Run exporters.validate in a process of its own, which loads what was written and nothing else."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bbt_accel.exporters.validate", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise ExportError(f"the exported graphs could not be checked: {lines[-1]}")
    error = float(json.loads(result.stdout.splitlines()[-1])["max_error"])
    if not error <= TOLERANCE:
        raise ExportError(f"the exported graphs differ from eager PyTorch by {error:.1e}, more than {TOLERANCE:.0e}")
    return error
