"""Write a checkpoint of a published shape with random weights, to measure real sizes without a
download.

python -m bbt_accel.benchmarks.make_backbone SHAPE backbones/SHAPE
bbt-accel bench --backbone backbones/SHAPE --task demo -o reports/SHAPE

Speed and memory are those of the real model; its predictions mean nothing, so neither do scores and
agreement. The shape tiny-FAMILY (tiny-bert, tiny-t5) exports in seconds, for checks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bbt_accel.core.demo import BACKBONE
from bbt_accel.errors import DataError, check_known
from bbt_accel.io.command import exit_on_error
from bbt_accel.io.files import new_folder

DEPTHS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "n_layer",
    "n_layers",
)
"""Names of the number of blocks."""


def make_backbone(
    shape: str,
    output: str | Path,
    tokenizer: Path = BACKBONE,
    seed: int = 0,
    layers: int | None = None,
) -> None:
    """Write a checkpoint with random float32 weights into the new folder `output`.

    shape: a name in the `shapes` of a family, or tiny-FAMILY. tokenizer: a folder with
    tokenizer.json; the shipped one unless given. The vocabulary size stays the published one, so a
    tokenizer may be smaller but not larger; that of a tiny shape is the tokenizer's. layers:
    blocks, instead of the published number. Raises UsageError, DataError.
    """
    import torch
    import transformers

    from bbt_accel.exporters.families.registry import families

    shapes = {
        name: (spec, size) for spec in families().values() for name, size in spec.shapes.items()
    }
    shapes |= {f"tiny-{name}": (spec, spec.tiny) for name, spec in families().items()}
    check_known("shape", shape, shapes)
    spec, published = shapes[shape]
    words = load_words(tokenizer, spec)
    config = {
        name: layers if layers and name in DEPTHS else value for name, value in published.items()
    }
    if tiny := shape.startswith("tiny-"):
        config["vocab_size"] = len(words)
    if len(words) > config["vocab_size"]:
        raise DataError(
            f"{tokenizer} has {len(words)} tokens, more than {shape}; give a smaller --tokenizer"
        )
    start = words.pad_token_id if spec.template_group == "span" else words.sep_token_id
    ids = {
        "pad": words.pad_token_id,
        "bos": words.cls_token_id,
        "eos": words.sep_token_id,
        "decoder_start": start,
    }
    tokens = {f"{name}_token_id": value for name, value in ids.items()}
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = spec.load_class()(
        transformers.AutoConfig.for_model(spec.model_type, **(config | tokens))
    )
    if tiny:  # weights large enough that prompts and rows matter
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    with new_folder(Path(output)) as folder:
        model.save_pretrained(folder, max_shard_size="1000GB")
        words.save_pretrained(folder)


def load_words(folder: Path, spec: Any) -> Any:
    """The vocabulary of any folder, with the special tokens that a family needs."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from bbt_accel.exporters.families.loading import load_tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder} has no tokenizer.json; give another --tokenizer")
    source = load_tokenizer(folder)
    begin = source.cls_token or source.bos_token or source.eos_token
    end = source.sep_token or source.eos_token
    literal = spec.mask if spec.mask and not hasattr(source, spec.mask) else None
    ends = dict.fromkeys(("bos_token", "cls_token"), begin) | dict.fromkeys(
        ("eos_token", "sep_token"), end
    )
    ends |= {
        "pad_token": source.pad_token or end,
        "mask_token": literal or source.mask_token or "<mask>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)), unk_token=source.unk_token, **ends
    )


def main() -> None:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.make_backbone", description=about
    )
    parser.add_argument("shape", help="the name of a published checkpoint")
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument(
        "--tokenizer", type=Path, default=BACKBONE, help="a folder with tokenizer.json"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--layers", type=int, help="blocks, instead of the published number")
    with exit_on_error():
        make_backbone(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
