"""Write a checkpoint of a published shape with random weights, to measure real sizes without a download.

python -m bbt_accel.benchmarks.make_backbone roberta-large backbones/roberta-large
bbt-accel bench --backbone backbones/roberta-large --task demo -o reports/roberta-large

Speed and memory are those of the real model; its predictions mean nothing, so neither do scores and agreement.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from bbt_accel.bundle import new_folder
from bbt_accel.cli import one_line
from bbt_accel.demo import BACKBONE
from bbt_accel.errors import DataError, UsageError
from bbt_accel.exporters.families import FAMILIES


def encoder(model_type: str, vocabulary: int, positions: int, large: bool, **more: Any) -> dict[str, Any]:
    """BERT's two sizes."""
    hidden, layers, heads = (1024, 24, 16) if large else (768, 12, 12)
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        **more,
    }


def roberta(large: bool) -> dict[str, Any]:
    return encoder("roberta", 50265, 514, large, type_vocab_size=1, layer_norm_eps=1e-5)


def bart(width: int, layers: int, heads: int) -> dict[str, Any]:
    sides = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in bart_side(width, layers, heads)
    }
    return {"model_type": "bart", "vocab_size": 50265, "max_position_embeddings": 1024, "d_model": width, **sides}


def bart_side(width: int, layers: int, heads: int) -> list[tuple[str, int]]:
    return [("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width)]


def t5(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": inner,
        "d_kv": 64,
        "num_layers": layers,
        "num_heads": heads,
    }


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads}


SMALL = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "intermediate_size": 2048}
SHAPES = {
    "roberta-base": roberta(False),
    "roberta-large": roberta(True),
    "bert-small": encoder("bert", 30522, 512, False) | SMALL,
    "bert-base": encoder("bert", 30522, 512, False),
    "bert-large": encoder("bert", 30522, 512, True),
    "bart-base": bart(768, 6, 12),
    "bart-large": bart(1024, 12, 16),
    "t5-small": t5(512, 2048, 6, 8),
    "t5-base": t5(768, 3072, 12, 12),
    "t5-large": t5(1024, 4096, 24, 16),
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "gpt2-large": gpt2(1280, 36, 20),
}
"""Published checkpoint → its configuration, where that is not the default of transformers."""


DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer")
"""What configurations call the number of blocks."""


def make_backbone(
    shape: str, output: Path, tokenizer: Path = BACKBONE, seed: int = 0, layers: int | None = None
) -> None:
    """Write a checkpoint with random float32 weights into the new folder `output`.

    shape: a key of `SHAPES`. tokenizer: a folder with tokenizer.json; the shipped one unless given. The vocabulary
    size stays the published one, so a tokenizer may be smaller but not larger. layers: blocks, instead of the
    published number. Raises UsageError, DataError.
    """
    import torch
    import transformers

    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(SHAPES)}"
        raise UsageError(f"there is no shape {shape!r}; {hint}")
    words = load_tokenizer(tokenizer, SHAPES[shape]["model_type"])
    if len(words) > SHAPES[shape]["vocab_size"]:
        raise DataError(f"{tokenizer} has {len(words)} tokens, more than {shape}; give a smaller --tokenizer")
    ids = {
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.cls_token_id,
        "eos_token_id": words.sep_token_id,
        "decoder_start_token_id": words.pad_token_id if shape.startswith("t5") else words.sep_token_id,
    }
    arguments: dict[str, Any] = {k: layers if layers and k in DEPTHS else v for k, v in SHAPES[shape].items()}
    model_type = arguments.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **arguments, **ids)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[model_type][0])(config)
    with new_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size="1000GB")
        words.save_pretrained(folder)


def load_tokenizer(folder: Path, model_type: str) -> Any:
    """The vocabulary of any folder with the special tokens that a family needs."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder} has no tokenizer.json; give another --tokenizer")
    source = AutoTokenizer.from_pretrained(str(folder))
    begin = source.cls_token or source.bos_token or source.eos_token
    end = source.sep_token or source.eos_token
    mask = "<extra_id_0>" if model_type == "t5" else source.mask_token or "<mask>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)),
        cls_token=begin,
        bos_token=begin,
        sep_token=end,
        eos_token=end,
        pad_token=source.pad_token or end,
        unk_token=source.unk_token,
        mask_token=mask,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="make_backbone", description="Write a random-weight checkpoint.")
    parser.add_argument("shape", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--tokenizer", type=Path, default=BACKBONE, help="a folder with tokenizer.json")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--layers", type=int, help="blocks, instead of the published number")
    given = parser.parse_args()
    with one_line():
        make_backbone(given.shape, given.output, given.tokenizer, given.seed, given.layers)


if __name__ == "__main__":
    main()
