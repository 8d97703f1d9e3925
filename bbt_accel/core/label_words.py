"""Label words for labels that have none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.pieces import Pieces
from bbt_accel.errors import TaskError


def distinct_words(bundle: Bundle, template: str, labels: Sequence[str]) -> list[str]:
    """A label word for each label, so that no two begin with the same token: the label, one of its
    words, or a letter.

    A letter where the vocabulary does not tell the labels apart, e.g. numbers that begin with the
    same piece. Raises TaskError where not even letters do.
    """
    pieces = Pieces(bundle)

    def candidates(words: Iterable[str]) -> dict[int, str]:
        """The words that the vocabulary has, by their first token."""
        found: dict[int, str] = {}
        for word in words:
            first, *_ = pieces.of_word(word, template) or [-1]
            if pieces.name(first) is not None:
                found.setdefault(first, word)
        return found

    own = [candidates((label, *re.findall(r"[^\W_]+", label))) for label in labels]
    letters = candidates(ascii_uppercase)
    shared = Counter(token for tokens in own for token in tokens)
    owned, found = set[int](), list[str]()
    for label, tokens in zip(labels, own, strict=True):
        ordered = sorted(
            tokens.items(), key=lambda pair: shared[pair[0]] > 1
        )  # those of no other label first
        ordered += [pair for pair in letters.items() if pair[0] not in shared]
        chosen = next(((token, word) for token, word in ordered if token not in owned), None)
        if chosen is None:
            problem = f"no word of label {label!r} begins with a token of its own in {bundle.path}"
            raise TaskError(f"{problem}; give a label word for each of {', '.join(labels):.200}")
        owned.add(chosen[0])
        found.append(chosen[1])
    return found
