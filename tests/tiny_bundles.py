"""Bundles without graphs: a tokenizer.json of a few hundred pieces and the facts that the encoding
needs.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from bbt_accel.core.bundle import Bundle, BundleInfo, SpecialTokens

SIZE = 1100
FILLER = [f"filler{i}" for i in range(SIZE)]


FAMILIES: dict[str, tuple[str, str, Callable[[int], Tokenizer], tuple[object, ...]]] = {
    "roberta": ("encoder", "masked", lambda size: _byte_level(size), (0, 2, 1, 4, "<mask>", None)),
    "bart": (
        "encoder-decoder",
        "masked",
        lambda size: _byte_level(size),
        (0, 2, 1, 4, "<mask>", 2),
    ),
    "gpt2": (
        "decoder",
        "causal",
        lambda size: _byte_level(size),
        (None, None, 1, None, None, None),
    ),
    "llama": (
        "decoder",
        "causal",
        lambda size: _begins(_byte_level(size)),
        (0, None, 1, None, None, None),
    ),
    "bert": ("encoder", "masked", lambda size: _word_pieces(size), (2, 3, 0, 4, "[MASK]", None)),
    "t5": (
        "encoder-decoder",
        "span",
        lambda size: _unigram(size),
        (None, 1, 0, 3, "<extra_id_0>", 0),
    ),
    "mt5": (
        "encoder-decoder",
        "span",
        lambda size: _sentinel_piece(size),
        (None, 1, 0, 3, "▁<extra_id_0>", 0),
    ),
}
"""Name → architecture, template group, tokenizer, and the values of `SpecialTokens`."""


def tiny_bundle(
    folder: Path,
    family: str = "roberta",
    prompt_mode: str = "add",
    n: int = 10,
    max_length: int = 64,
    size: int = SIZE,
) -> Bundle:
    make, special = FAMILIES[family][2:]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make(size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Bundle(folder, bundle_info(family, prompt_mode, n, max_length, size, special))


def linked(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle as the hub's cache has it: every file is a link to one elsewhere, with another
    name.
    """
    snapshot, blobs = folder / "snapshot", folder / "blobs"
    shutil.copytree(bundle.path, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    return Bundle.read(snapshot)


def bundle_info(
    family: str,
    prompt_mode: str,
    n: int,
    max_length: int,
    vocab_size: int,
    special: tuple[object, ...],
) -> BundleInfo:
    return BundleInfo(
        backbone=f"tiny-{family}",
        revision=None,
        family=family,
        architecture=FAMILIES[family][0],  # type: ignore[arg-type]
        template_group=FAMILIES[family][1],  # type: ignore[arg-type]
        method="bbt",
        prompt_mode=prompt_mode,  # type: ignore[arg-type]
        n_prompt_tokens=n,
        hidden_size=8,
        n_layers=2,
        vocab_size=vocab_size,
        max_length=max_length,
        word_embedding_std=0.1,
        special=SpecialTokens.model_validate(
            dict(zip(SpecialTokens.model_fields, special, strict=True))
        ),
        precision="fp32",
        target="onnx",
        opset=20,
        stages=["model"],
        versions={},
    )


def _byte_level(size: int) -> Tokenizer:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    starts = [f"Ġ{c}" for c in string.ascii_letters]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *starts, *FILLER][:size]
    merges = [("Ġ", c) for c in string.ascii_letters]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    tokenizer.add_special_tokens([*specials[:4], AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


def _begins(tokenizer: Tokenizer) -> Tokenizer:
    """The same with a begin token in front of each row, and the special tokens of a chat
    template.
    """
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def _word_pieces(size: int) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits
    words = ["bad", "great", "it", "was"]
    pieces = [
        *specials,
        *string.punctuation,
        *letters,
        *(f"##{c}" for c in letters),
        *words,
        *FILLER,
    ][:size]
    tokenizer = Tokenizer(
        models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _sentinel_piece(size: int) -> Tokenizer:
    """As published for mT5: a sentinel is a piece behind a space, and no special token."""
    spec = json.loads(_unigram(size).to_str())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] != "<extra_id_0>"
    ]
    spec["model"]["vocab"][3][0] = "▁<extra_id_0>"
    return Tokenizer.from_str(json.dumps(spec))


def _unigram(size: int) -> Tokenizer:
    specials = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    words = [f"▁{w}" for w in ("negative", "positive", "text", "It", "was", ".")]
    pieces = [*specials, "▁", *string.ascii_letters, *string.digits, ".:,?", *words, *FILLER][:size]
    scored = [(p, 0.0 if p in specials else -2.0) for p in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.add_special_tokens(specials)
    return tokenizer
