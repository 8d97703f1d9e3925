"""The pieces that a bundle's vocabulary makes of texts and label words."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from bbt_accel.core.bundle import Bundle
from bbt_accel.errors import BundleError, first_line

UNKNOWN = ("<unk>", "[UNK]")
SPACE = "▁"
"""How SentencePiece vocabularies write a space."""
Fixed = tuple[int, ...]  # token ids that are the same in every row


class Pieces:
    """The tokenizer of a bundle, and the tokens of texts and label words. Raises BundleError where
    it is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.tokenizer, self._info = read_tokenizer(bundle), bundle.info
        mask = bundle.info.special.mask  # mT5's is no special token of its tokenizer
        self.special = special_ids(self.tokenizer) | ({mask} if mask is not None else set())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. A unigram vocabulary has its special tokens as pieces too; none is
        let through.
        """
        return [
            i
            for i in self.tokenizer.encode(text, add_special_tokens=False).ids
            if i not in self.special
        ]

    def split_special(self, literal: str) -> list[str | Fixed]:
        """A literal text of a decoder's template, with its special tokens as ids."""
        special = self.special if self._info.causal else ()
        names = {str(self.tokenizer.id_to_token(i)): i for i in special}
        if not names:
            return [literal]
        pieces = re.split(
            f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})", literal
        )
        return [(names[piece],) if piece in names else piece for piece in pieces]

    def of_word(self, word: str, template: str) -> list[int]:
        """Tokens of a label word behind the text before it: with the space, where the vocabulary
        has it in the word.

        None of a word of which the vocabulary has only that space.
        """
        behind, alone = self.encode(f"a {word}"), self.encode("a")
        spaced = self.spaced(template.partition("{mask}")[0]) and behind[: len(alone)] == alone
        found = behind[len(alone) :] if spaced else self.encode(word)
        only_space = len(found) > 1 and self.name(found[0]) == SPACE and self.name(found[1]) is None
        return [] if only_space else found

    def spaced(self, before: str) -> bool:
        """Whether a label word behind this text has a space in front of it."""
        if (
            self._info.template_group == "causal"
        ):  # not behind a line break, or behind a special token
            *_, last = (" ", *filter(None, self.split_special(before)))
            return isinstance(last, str) and not last.endswith("\n")
        return not before[-1:].strip(" ")

    def name(self, token: int) -> str | None:
        """A token as it is in the vocabulary; None for one that stands for what is not in it."""
        found = self.tokenizer.id_to_token(token) if token >= 0 else None
        return None if found is None or found in UNKNOWN else str(found)


def read_tokenizer(bundle: Bundle) -> Tokenizer:
    file = bundle.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(
            f"cannot read {file} ({first_line(error)}); export the bundle again"
        ) from None
    return ordinary(tokenizer)


def ordinary(tokenizer: Tokenizer, special_tokens: bool = False) -> Tokenizer:
    """The tokenizer without the truncation and padding that its file may ask for.

    special_tokens: find them in texts; otherwise a text that contains <mask> or </s> is ordinary
    text.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special_tokens
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> set[int]:
    added = tokenizer.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special and token.content not in UNKNOWN}
