"""A task's template as constants around the ids of the texts: what the graph of a package puts
around its input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from bbt_accel.errors import PackageError
from bbt_accel.package import tokenizer as foreign
from bbt_accel.tasks.encoding import Encoder

PROBES = ("word", "it was great", "7 apples", "a, b")
"""Texts whose ids are looked for in encoded rows."""
Pieces = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layout:
    """A row is pieces[0], a text, pieces[1], a text, … and the last of the pieces.

    order: which text stands at each place, by its index in the task's columns.
    pieces: by which texts are empty (False: has text), because white space around an empty text
        makes other tokens. Next to an empty text's place all ids are in one piece. All have
        len(order) + 1.
    limit: most tokens of a row, of which `ahead` are a decoder's begin token, which its graphs read
    as context.
    tokenizer: the parsed tokenizer.json of the package.
    """

    order: tuple[int, ...]
    pieces: dict[tuple[bool, ...], Pieces]
    limit: int
    ahead: int
    tokenizer: foreign.Spec

    @property
    def texts(self) -> int:
        return len(next(iter(self.pieces)))

    def beginning(self, empty: tuple[bool, ...]) -> tuple[int, ...]:
        """The ids in front of the first text that is not empty."""
        count = next((j for j, i in enumerate(self.order) if not empty[i]), len(self.order))
        return tuple(i for piece in self.pieces[empty][: count + 1] for i in piece)

    @property
    def longest(self) -> int:
        """Most tokens of a row as the graphs read it."""
        return self.limit - self.ahead

    def room(self, empty: tuple[bool, ...]) -> int:
        """Most tokens of all texts of a row together."""
        return self.limit - sum(map(len, self.pieces[empty]))

    @property
    def max_length(self) -> int:
        """Ids, marks included, beyond which a loader may truncate a text or a pair.

        A loader's rule for pairs differs from the encoding's in one token, so it gets room for two:
        the graph truncates.
        """
        return self.texts * (max(map(self.room, self.pieces)) + 1)


def find_layout(encoder: Encoder) -> Layout:
    """The layout of a task's rows for a bundle.

    Raises PackageError for more than two text columns, which no loader takes, for a template that
    has one twice or not at all, and for one in which a text has other tokens than alone.
    """
    task, path = encoder.task, encoder.bundle.path
    if len(task.text) > 2:
        raise PackageError(
            f"task {task.name} has {len(task.text)} text columns; loaders take a text or a pair "
            "of texts"
        )
    if set(encoder.columns) != set(task.text):
        unused = next(name for name in task.text if name not in encoder.columns)
        raise PackageError(
            f"the template of task {task.name} does not use the column {unused!r}; remove it "
            "from the task"
        )
    if len(encoder.columns) > len(task.text):
        raise PackageError(
            f"the template of task {task.name} has a text twice, which graphs do not truncate"
        )
    order = tuple(task.text.index(name) for name in encoder.columns)
    original = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    patterns = list(product((False, True), repeat=len(task.text)))
    ahead = encoder.bundle.info.prompt_start if encoder.bundle.info.causal else 0
    for spec in foreign.variants(original, task.clean):
        pieces = {
            empty: found
            for empty in patterns
            if (found := find_pieces(encoder, spec, order, empty)) is not None
        }
        if len(pieces) == len(patterns):
            layout = Layout(order, pieces, encoder.limit, ahead, spec)
            if min(map(layout.room, patterns)) < 0:
                raise PackageError(
                    f"the template of task {task.name} leaves no room for its texts; shorten it"
                )
            return layout
    problem = (
        f"in the template of task {task.name} a text has other tokens than alone, with the "
        f"tokenizer of {path}"
    )
    hint = f"separate {{{task.text[0]}}} from what is around it by spaces"
    if len(task.text) > 1:  # a tokenizer treats both texts of a pair alike
        hint = (
            "write a space in front of both texts, also where one begins the template, and "
            "tune again"
        )
    raise PackageError(f"{problem}; {hint}")


def find_pieces(
    encoder: Encoder, spec: foreign.Spec, order: Sequence[int], empty: tuple[bool, ...]
) -> Pieces | None:
    """What is around the texts in rows of which some texts are empty.

    None where a text of a probe has other tokens than alone, or other ones around it than another.
    """
    tokenizer, common = foreign.load(spec), set[Pieces]()
    for shift in range(len(PROBES)):
        texts = ["" if no else PROBES[(i + shift) % len(PROBES)] for i, no in enumerate(empty)]
        tokens = encoder.tokens(dict(zip(encoder.task.text, texts, strict=True)))
        for place, i in enumerate(order):
            alone = tokenizer.encode(texts[i], add_special_tokens=False).ids
            if [token for token, own in tokens if own == place] != alone:
                return None
        common.add(around(tokens, len(order)))
    return common.pop() if len(common) == 1 else None


def around(tokens: Sequence[tuple[int, int | None]], texts: int) -> Pieces:
    """The ids around the texts of a row. Those around an empty text are all in the piece behind
    it.
    """
    pieces, ids = list[tuple[int, ...]](), list[int]()
    for token, place in tokens:
        if place is None:
            ids.append(token)
        elif place >= len(pieces):
            pieces += [()] * (place - len(pieces)) + [tuple(ids)]
            ids = []
    return (*pieces, *[()] * (texts - len(pieces)), tuple(ids))
