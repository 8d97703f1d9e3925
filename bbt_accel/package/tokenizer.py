"""The tokenizer of a package: from one text, or a pair of texts, to the ids of the text alone.

The template is in the graph, so the tokenizer adds no special token but a mark in front of each
text, which tells the graph where one begins, and without which an empty text would have no ids at
all. A text can hold no special token: one that is spelled out is ordinary text. Marks and padding
have names that no text has. What the encoding does to a text before it is tokenized (cleaning,
strip, the space in front of it) are normalizers, because loaders read no other code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

Spec = dict[str, Any]
"""A parsed tokenizer.json."""
MARK, PAD, RENAMED = (
    "\ue000bbt-accel text\ue000",
    "\ue000bbt-accel padding\ue000",
    "\ue000bbt-accel special\ue000",
)
WHITESPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""What Python's str.strip removes; other languages' white space differs from it in a few
characters.
"""
BEGIN, END = r"(?<![\s\S])", r"(?![\s\S])"
"""Of the whole text, in every dialect of regular expressions."""


def variants(original: Spec, clean: str | None) -> Iterator[Spec]:
    """Tokenizers that give a text the ids that it has inside a template; which one does depends on
    the template.

    With nothing in front of the text; with a space; and with nothing where the vocabulary itself
    puts a space there.
    clean: see `Task`.
    """
    yield foreign(original, clean, "")
    yield foreign(original, clean, " ")
    bare = copy.deepcopy(original)
    bare["normalizer"], bare["pre_tokenizer"] = (
        without_space(bare["normalizer"]),
        without_space(bare["pre_tokenizer"]),
    )
    yield foreign(bare, clean, "")


def foreign(original: Spec, clean: str | None, lead: str) -> Spec:
    """The tokenizer of a package, with `lead` in front of every text that is not empty."""
    spec = copy.deepcopy(original)
    known = vocabulary(spec["model"])
    spec["added_tokens"] = list(ordinary_tokens(spec["added_tokens"], known))
    taken = [*known.values(), *(token["id"] for token in original["added_tokens"])]
    mark = max(taken) + 1
    spec["added_tokens"] += [added_token(mark, MARK), added_token(mark + 1, PAD)]
    steps = [replacing({"String": "\\n"}, " ")] if clean == "newlines" else []
    if lead:
        steps.append({"type": "Prepend", "prepend": lead})
    steps.append(replacing({"Regex": f"{BEGIN}[{WHITESPACE}]+"}, lead))
    # Behind one of its characters a run of white space is not searched again.
    steps.append(replacing({"Regex": f"(?<![{WHITESPACE}])[{WHITESPACE}]+{END}"}, ""))
    own = spec["normalizer"]
    steps += own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
    spec |= {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "truncation": None,
        "padding": None,
    }
    text = [
        [{"SpecialToken": {"id": MARK, "type_id": 0}}, {"Sequence": {"id": name, "type_id": 0}}]
        for name in "AB"
    ]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": text[0],
        "pair": text[0] + text[1],
        "special_tokens": {MARK: {"id": MARK, "ids": [mark], "tokens": [MARK]}},
    }
    return spec


def vocabulary(model: Spec) -> dict[str, int]:
    """The pieces of a tokenizer's model, and their ids."""
    pieces = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(pieces)} if isinstance(pieces, list) else pieces


def ordinary_tokens(added: list[Spec], known: dict[str, int]) -> Iterator[Spec]:
    """Added tokens that a text may hold; special ones that only the list itself knows get a name
    that no text has.
    """
    for token in sorted(added, key=lambda token: token["id"]):
        if not token["special"]:
            yield token
        elif token["content"] not in known:  # else later ones would move to its id
            yield added_token(token["id"], RENAMED + token["content"])


def added_token(number: int, content: str) -> Spec:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": number, "content": content, **flags}


def replacing(pattern: Spec, content: str) -> Spec:
    return {"type": "Replace", "pattern": pattern, "content": content}


def without_space(step: Spec | None) -> Spec | None:
    """A normalizer or pre-tokenizer that puts nothing in front of a text."""
    if step is None or step["type"] == "Prepend":
        return None
    step = dict(step)
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            step[parts] = [
                kept for part in step[parts] if (kept := without_space(part)) is not None
            ]
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    return step


def load(spec: Spec) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(spec))


def ids_of(spec: Spec) -> tuple[int, int]:
    """Of the mark and of padding."""
    found = {token["content"]: token["id"] for token in spec["added_tokens"]}
    return found[MARK], found[PAD]


def configuration(spec: Spec, max_length: int) -> Spec:
    """tokenizer_config.json. max_length: ids, marks included, beyond which loaders truncate."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in spec["added_tokens"]
        },
    }
