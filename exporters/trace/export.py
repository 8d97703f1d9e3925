"""From a checkpoint to a bundle: load, trace, share the weights, validate against eager PyTorch."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from bbt_accel.core.backbone_names import hub_id, is_local
from bbt_accel.core.bundle import (
    INITIAL_PROMPT,
    Bundle,
    BundleInfo,
    Method,
    PromptMode,
    SpecialTokens,
    write_info,
)
from bbt_accel.core.comparison import EXPORT
from bbt_accel.core.demo import BACKBONE
from bbt_accel.core.optimizations import check_optimizations, in_graph
from bbt_accel.core.option_types import PROMPT_TOKENS
from bbt_accel.core.pieces import SPACE, ordinary, special_ids
from bbt_accel.errors import (
    EngineError,
    ExportError,
    UsageError,
    check_known,
    first_line,
    translated,
)
from bbt_accel.exporters.families.checkpoint import license_of
from bbt_accel.exporters.families.family import FamilySpec
from bbt_accel.exporters.families.loading import load_model, load_tokenizer
from bbt_accel.exporters.families.registry import family_of
from bbt_accel.exporters.trace import graph
from bbt_accel.exporters.trace.device_graphs import write_device_graphs
from bbt_accel.exporters.trace.validate import validate
from bbt_accel.io import processes
from bbt_accel.io.files import new_folder, require_new
from bbt_accel.io.progress import Tell, silent
from bbt_accel.tasks.task import load_task


def export_bundle(
    backbone: str | Path,
    output: str | Path,
    *,
    method: Method = "bbt",
    prompt_mode: PromptMode = "add",
    n_prompt_tokens: int = PROMPT_TOKENS,
    prompt_init: str | None = None,
    revision: str | None = None,
    without: Collection[str] = (),
    on_progress: Tell = silent,
) -> Bundle:
    """Export a hub id, a local folder, a .gguf file or `demo` into a new bundle folder, and
    validate it.

    method: bbt for a prompt at the input, bbtv2 for one in every layer. prompt_mode: add, to the
        embeddings of the first tokens; cat, in front of the input (bbt alone). revision: commit,
        tag or branch of a hub id.
    prompt_init: a text that the prompt starts from, or a task's .toml file whose [prompt] init has
        it; its tokens determine n_prompt_tokens. In cat mode p0 is their embeddings; in add mode
        the prompt is added to them.
    without: optimizations that the graphs leave out, for an ablation, by the names in
    `bbt_accel.core.optimizations`.
    on_progress: called with the current step, the number of steps done, and their total.
    Raises UsageError for a combination that does not exist, ExportError for a checkpoint that
    cannot be loaded, has no LM head, or whose graphs differ from eager PyTorch by more than
    `comparison.EXPORT`, BbtError for an output that exists.
    """
    check_arguments(method, prompt_mode, n_prompt_tokens)
    check_revision(str(backbone), revision)
    off = in_graph(check_optimizations(without))
    if others := [name for name in without if name not in off]:
        raise UsageError(f"{others[0]} is no part of the graphs; switch it off in tune and bench")
    checkpoint = BACKBONE if str(backbone) == "demo" else backbone
    output = Path(output)
    require_new(output)
    on_progress("loading the checkpoint", 0, 1)
    model, tokenizer = load_model(checkpoint, revision), load_tokenizer(checkpoint, revision)
    text, ids = initial_text(
        prompt_init, tokenizer, family_of(model.config).architecture == "decoder"
    )
    with translated(ExportError, f"cannot export {backbone}, whose files do not fit each other"):
        info = describe(
            model,
            tokenizer,
            str(backbone),
            revision,
            method,
            prompt_mode,
            len(ids) or n_prompt_tokens,
        )
    found = {
        "license": license_of(checkpoint, revision),
        "prompt_init": text,
        "prompt_ids": ids or None,
    }
    info = info.model_copy(update={"without": off, **found})
    with new_folder(output) as folder:
        try:
            model.save_pretrained(folder, max_shard_size="1000GB")  # type: ignore[operator]
            if ids and prompt_mode == "cat":
                embedded = (
                    family_of(model.config).compose(model, info).tokens(torch.tensor([ids]))[0]
                )
                save_file({"prompt": embedded.contiguous()}, folder / INITIAL_PROMPT)
        except SafetensorError as refusal:  # no OSError, even where the disk is full
            raise ExportError(
                f"cannot write {output} ({first_line(refusal)}); free some space"
            ) from refusal
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        with translated(ExportError, f"cannot trace {backbone}"):
            info = info.model_copy(update={"stages": trace(model, info, folder, on_progress)})
        write_device_graphs(folder, info)
        write_info(folder, info)
        del model
        gc.collect()  # the process that validates loads what was written
        on_progress("validating against eager PyTorch", 0, 1)
        error = validated(folder)
        write_info(folder, info.model_copy(update={"max_error": error}))
    return Bundle.read(output, verify=False)


def check_revision(backbone: str, revision: str | None) -> None:
    if revision is not None and hub_id(backbone, revision) is None:
        raise UsageError(f"--revision is for a checkpoint on the hub, which {backbone} is not")


def check_arguments(method: str, prompt_mode: str, n_prompt_tokens: int) -> None:
    check_known("--method", method, get_args(Method))
    check_known("--prompt-mode", prompt_mode, get_args(PromptMode))
    if method == "bbtv2" and prompt_mode == "cat":
        raise UsageError(
            "bbtv2 adds its prompts to the hidden states of every layer; use --prompt-mode add"
        )
    if not (isinstance(n_prompt_tokens, Integral) and n_prompt_tokens >= 1):
        raise UsageError(
            f"--n-prompt-tokens must be a whole number of at least 1, not {n_prompt_tokens!r}"
        )


def initial_text(
    prompt_init: str | None, tokenizer: Any, causal: bool
) -> tuple[str | None, list[int]]:
    """The text that a prompt starts from, and its token ids. Raises UsageError for one without
    tokens.

    As in rows, only a decoder's text may have special tokens: a second mask token would become the
    readout position.
    """
    text = prompt_init
    if text is not None and text.endswith(".toml"):
        task = load_task(text)
        if task.prompt is None:
            raise UsageError(f"--prompt-init {text}: the task file has no [prompt] init")
        text = task.prompt.init
    own = ordinary(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), special_tokens=causal)
    dropped = set() if causal else special_ids(own)
    ids = (
        []
        if text is None
        else [i for i in own.encode(text, add_special_tokens=False).ids if i not in dropped]
    )
    if text is not None and not ids:
        raise UsageError("--prompt-init has no tokens; give a text")
    return text, ids


def trace(model: nn.Module, info: BundleInfo, folder: Path, on_progress: Tell) -> list[str]:
    """Write the graphs of every stage; returns their names."""
    backbone = family_of(model.config).compose(model, info)
    weights = graph.SharedWeights(folder / graph.CHECKPOINT)
    others = graph.NewWeights(folder / "weights.data")
    of = len(backbone.stages(info.method))
    names = []
    for done, stage in enumerate(graph.stages(backbone, info.method, info.hidden_size)):
        on_progress(f"tracing {stage.name}", done, of)
        graph.save_stage(graph.export_stage(stage, backbone), folder, stage.name, weights, others)
        names.append(stage.name)
    return names


def describe(
    model: nn.Module,
    tokenizer: Any,
    backbone: str,
    revision: str | None,
    method: Method,
    mode: PromptMode,
    n: int,
) -> BundleInfo:
    """bundle.json, but for what is known only after tracing and validation."""
    config: Any = model.config
    family = family_of(config)
    longest = family.positions(config) - (
        n if mode == "cat" and family.prompt_takes_positions else 0
    )
    if longest < n + (
        7 if family.architecture == "decoder" else 4
    ):  # the last check is with a short context
        raise UsageError(
            f"--n-prompt-tokens {n} leaves no room for text: the backbone has {longest} positions"
        )
    local = is_local(backbone)
    return BundleInfo(
        backbone=str(Path(backbone).resolve()) if local else backbone,
        revision=revision or (None if local else getattr(config, "_commit_hash", None)),
        family=family.model_type,
        architecture=family.architecture,
        template_group=family.template_group,
        method=method,
        prompt_mode=mode,
        n_prompt_tokens=n,
        hidden_size=config.hidden_size,
        n_layers=len(list(family.blocks(model))),
        vocab_size=config.vocab_size,
        max_length=longest,
        word_embedding_std=embedding_std(model),
        special=special_tokens(config, tokenizer, family),
        precision="fp32",
        target="onnx",
        opset=graph.OPSET,
        stages=[],
        versions={
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "onnx", "onnxscript")
        },
    )


def embedding_std(model: Any) -> float:
    """Standard deviation of the word embeddings as they enter the model: some families scale
    them.
    """
    embedding = model.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    return scale * float(np.std(embedding.weight.numpy(), dtype=np.float64))


def special_tokens(config: Any, tokenizer: Any, family: FamilySpec) -> SpecialTokens:
    """The special tokens of the family's rows. Raises ExportError where the tokenizer lacks the
    mask token.
    """

    mask_text, mask = mask_token(tokenizer, family)
    begin, end = token_id(tokenizer, family.begin), token_id(tokenizer, family.end)
    if family.begin is not None and (begin is None or family.architecture == "decoder"):
        begin = written(tokenizer, in_front=True)
    if family.end is not None and end is None:
        end = written(tokenizer, in_front=False)
    start = getattr(config, "decoder_start_token_id", None)
    if family.architecture == "encoder-decoder" and start is None:
        raise ExportError(
            "config.json has no decoder_start_token_id, with which a decoder's input begins; add it"
        )
    pads = (config.pad_token_id, tokenizer.pad_token_id, config.eos_token_id, 0)
    return SpecialTokens(
        begin=begin,
        end=end,
        pad=next(
            p for p in pads if isinstance(p, int) and 0 <= p < config.vocab_size
        ),  # some say -1
        mask=mask,
        mask_text=mask_text,
        decoder_start=start if family.architecture == "encoder-decoder" else None,
    )


def token_id(tokenizer: Any, name: str | None) -> int | None:
    """The id of a token, by an attribute of the tokenizer or by its text; None where there is
    none.
    """
    text = None if name is None else getattr(tokenizer, name, name)
    found: int | None = None if text is None else tokenizer.convert_tokens_to_ids(text)
    return found


def mask_token(tokenizer: Any, family: FamilySpec) -> tuple[str | None, int | None]:
    """The mask token of a family's rows, and its id. Raises ExportError where the tokenizer lacks
    it.
    """
    if family.mask is None:
        return None, None
    sentinel = (
        [] if hasattr(tokenizer, family.mask) else [f"{SPACE}{family.mask}"]
    )  # mT5's has its space in front
    for name in (*sentinel, family.mask):
        found = token_id(tokenizer, name)
        if found not in (None, tokenizer.unk_token_id):
            return getattr(tokenizer, name, name), found
    raise ExportError(
        f"the tokenizer has no mask token, which prompts of a {family.model_type} model need"
    )


def written(tokenizer: Any, in_front: bool) -> int | None:
    """The token that the tokenizer itself writes in front of a text, or behind it. Raises
    ExportError for several.
    """
    whole, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    found = whole[:start] if in_front else whole[start + len(text) :]
    if len(found) > 1:
        raise ExportError(
            f"the tokenizer writes {len(found)} tokens around a text; at most one is supported"
        )
    return next(iter(found), None)


def validated(folder: Path) -> float:
    """The bundle's error, measured in a process of its own, which loads what was written and
    nothing else.

    Raises ExportError when it is beyond `comparison.EXPORT`, or cannot be measured.
    """
    try:
        error = float(processes.call(validate, path=folder))
    except EngineError as problem:
        raise ExportError(f"the exported graphs could not be validated: {problem}") from None
    if not error <= EXPORT:
        raise ExportError(f"the exported graphs differ from eager PyTorch by {error:.1e}")
    return error
