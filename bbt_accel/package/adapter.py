"""Packages for PEFT: a cat-mode prompt of a decoder or an encoder-decoder as a prompt-tuning
adapter.

PEFT puts its vectors in front of the embedded input. A decoder's row begins with its begin token
and context, so their embeddings are the first of the vectors, and the input is tokenized without
special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.errors import MissingDependency, PackageError
from bbt_accel.io.machine import installed
from bbt_accel.package.comparison import PackageOutput, encoded
from bbt_accel.package.configuration import write_json
from bbt_accel.package.manifest import ADAPTER_CONFIG
from bbt_accel.package.packaged_run import PackagedRun
from bbt_accel.predict.inference import BATCH_SIZE
from bbt_accel.search.readout import READS
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import without_prompt
from bbt_accel.tasks.task import parse_template, written

ADAPTER = "adapter_model.safetensors"
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
"""Architecture → PEFT's type of task, of which masked language models have none."""
READABLE = tuple(name for name, blocks in READS.items() if blocks == ("class_logits",))
"""Readouts that take no more than label logits: the adapter's user adds the bias, if there is
one.
"""


def check_peft(made: PackagedRun) -> None:
    """Raises PackageError, with the reason, for what PEFT's prompt tuning cannot represent."""
    info, why = made.info, None
    if info.method != "bbt":
        why = (
            "bbtv2 adds a prompt in every layer, prompt tuning has one at the input; export "
            "with --method bbt"
        )
    elif info.architecture not in TASKS:
        why = "PEFT has no prompt tuning for masked language models; use --format onnx"
    elif info.prompt_mode != "cat":
        why = (
            "the prompt is added to tokens, prompt tuning puts it in front of them; export "
            "with --prompt-mode cat"
        )
    elif info.backbone.endswith(".gguf"):
        why = "PEFT loads no GGUF files; export the checkpoint that it was made from"
    elif made.readout.name not in READABLE:
        why = (
            f"the readout {made.readout.name} reads more than label words' logits; tune with "
            "--readout verbalizer"
        )
    elif info.precision != "fp32" or info.target == "openvino":
        why = (
            f"{made.bundle.path} is in {info.precision} for {info.target}; pass a bundle in "
            "fp32 with --bundle"
        )
    elif installed("peft") is None:
        raise MissingDependency(
            'the adapter is compared in PEFT itself; pip install "bbt-accel[peft]"'
        )
    if why is not None:
        raise PackageError(f"this run cannot be an adapter: {why}")


def write_peft(made: PackagedRun, labels: list[str], folder: Path) -> str:
    """adapter_config.json and the vectors; a readout's bias as an array beside them."""
    check_peft(made)
    model, info = load_backbone(made), made.info
    vectors = np.concatenate([beginning(made, model), made.prompt])
    tensors = {"prompt_embeddings": np.ascontiguousarray(vectors, np.float32)}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": TASKS[info.architecture],
        "base_model_name_or_path": info.backbone,
        "revision": info.revision,
        "num_virtual_tokens": len(vectors),
        "token_dim": info.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(model.config, "num_attention_heads", 1),
        "num_layers": info.n_layers,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    bias = made.readout.arrays.get("bias")
    reading = {
        "labels": labels,
        "label_token_ids": made.encoder.label_token_ids.tolist(),
        "classes": made.readout.classes.tolist(),
        "bias": None if bias is None else bias.tolist(),
        "template": written(
            without_prompt(parse_template(made.encoder.task.template(info.template_group)))
        ),
        "decoder_input_ids": decoder_start(made),
    }
    write_json(folder / "readout.json", reading)
    return ADAPTER


def decoder_start(made: PackagedRun) -> list[int] | None:
    """What the decoder of a span-corruption model reads."""
    special = made.info.special
    if made.info.template_group != "span" or special.decoder_start is None or special.mask is None:
        return None
    return [special.decoder_start, special.mask]


def load_backbone(made: PackagedRun) -> Any:
    from bbt_accel.exporters.families.loading import load_model

    return load_model(made.bundle.path)


def beginning(made: PackagedRun, model: Any) -> Float32:
    """Embeddings of the tokens in front of a decoder's prompt, (K, H)."""
    import torch

    context = made.context()
    ids = np.asarray(context.get("context_ids", []), np.int64)
    ids = ids[
        np.asarray(context.get("context_mask", []), np.int64) >= 0
    ]  # an empty context has a column all the same
    embedded: Float32 = model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy()
    return embedded


def run_peft(
    made: PackagedRun, folder: Path, model: str, rows: Sequence[Row], threads: int | None
) -> PackageOutput:
    """The adapter in PEFT, on the checkpoint of the bundle: label logits of rows as the encoding
    writes them.
    """
    import torch
    from peft import PeftModel

    from bbt_accel.exporters.trace.sessions import limited_threads

    scores = []
    with limited_threads(threads), torch.inference_mode():
        tuned = PeftModel.from_pretrained(load_backbone(made), str(folder)).eval()
        for start in range(0, len(rows), BATCH_SIZE):
            batch = made.encoder.encode(rows[start : start + BATCH_SIZE]).with_decoder_input(
                made.info
            )
            scores.append(made.readout.scores({"label_logits": label_logits(made, tuned, batch)}))
    return PackageOutput(
        encoded(made.encoder, rows), np.concatenate([np.asarray(s, np.float64) for s in scores])
    )


def label_logits(made: PackagedRun, tuned: Any, batch: Batch) -> Float32:
    """float32 (N, M): at the readout, in the decoder's output or behind the adapter's vectors."""
    import torch

    given = batch.graph_inputs(made.info)
    names = ["input_ids", "attention_mask", *(["decoder_input_ids"] if made.info.decodes else [])]
    logits = tuned(**{name: torch.from_numpy(given[name]) for name in names}).logits
    ahead = 0 if made.info.decodes else logits.shape[1] - given["input_ids"].shape[1]
    position = torch.from_numpy(given["readout"]) + ahead
    found: Float32 = logits[torch.arange(len(batch)), position][
        :, made.encoder.label_token_ids
    ].numpy()
    return found
