"""From rows to a Batch: context, template, initial prompt tokens, truncation and readout
position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from bbt_accel.core.batch import Batch, Int64
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.pieces import Fixed, Pieces
from bbt_accel.core.settings import Settings
from bbt_accel.errors import BundleError, DataError, TaskError
from bbt_accel.io.tables import as_utf8
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.splits import choose_demonstrations
from bbt_accel.tasks.task import Task, parse_template

FEATURE_WORDS = 512  # whose logits are features of the readout `words`
FIRST_PROMPT_ID = 1000  # in the vocabulary, as in the original
CHARACTERS, MOST_CHARACTERS = (
    16,
    1024,
)  # of a text for each token that a row may have, see `Encoder._beginning`
EDGE = 256  # characters before the end of a text whose tokens may depend on what would follow
Fields = Mapping[str, str]
Text = list[tuple[str, str | None]]  # literal texts, each with the field that follows it


class Encoder:
    """Encodes rows of `task` for the backbone of `bundle`, with the bundle's own tokenizer.

    A row alternates between texts and fixed token ids, e.g. for a masked LM in add mode: begin
    token and initial prompt ids, text, mask token, text, end token. Only the layout inserts special
    tokens: one that is spelled out in a user's text is ordinary text. Those of a chat template may
    be spelled out in the task's causal template and context.

    demonstrations: rows that stand, with their labels, in front of every row of a decoder, behind
        the task's instruction; `Batch.context_ids` holds both. max_tokens: of a row with its
        context, at most; unless given what the backbone takes.
    Raises TaskError when the task does not fit the bundle: no template for its group, label words
    that begin with the same token or are not in the vocabulary, or a template and context longer
    than the bundle's maximum length.
    """

    def __init__(
        self,
        bundle: Bundle,
        task: Task,
        demonstrations: Sequence[Row] = (),
        max_tokens: int | None = None,
    ) -> None:
        self.bundle, self.task, self.demonstrations = bundle, task, list(demonstrations)
        self._longest = min(bundle.info.max_length, max_tokens or bundle.info.max_length)
        words = task.all_words(bundle.info.template_group)
        self.label_words = task.words(bundle.info.template_group)
        self.classes: Int64 = np.repeat(
            np.arange(len(words)), [len(of_class) for of_class in words]
        )
        """The class of each of `label_token_ids`."""
        self._pieces = Pieces(bundle)
        self._tokenizer, self.special = self._pieces.tokenizer, self._pieces.special
        self._layout = self._lay_out()
        self.partial_words: dict[str, str] = {}
        """Label words of several tokens, of which only the first is read; and that token."""
        self.label_token_ids: Int64 = self._label_token_ids()
        self.context_ids = self._context_ids(demonstrations) if bundle.info.causal else None
        self.limit = self._longest - (0 if self.context_ids is None else len(self.context_ids))
        length = len(self.ids([dict.fromkeys(task.text, "")])[0])
        if length > self.limit:
            what = "template" if self.context_ids is None else "template and context"
            whose = bundle.path if self._longest == bundle.info.max_length else "row_tokens"
            problem = f"the {what} of task {task.name} alone exceeds the {self._longest} tokens"
            raise TaskError(f"{problem} of {whose} by {length - self.limit}; shorten it")

    def encode(self, rows: Sequence[Row]) -> Batch:
        """All N rows, in order, padded on the right to the S tokens of the longest.

        input_ids and attention_mask are int64 (N, S), readout and targets (N,). The target of a row
        without a label is 0.

        Rows that are too long are truncated at the end of their text columns, the longest column
        first; what cannot be part of a row is truncated before it is tokenized.
        Raises DataError for no rows, and for a row without one of the columns.
        """
        pad, limit = self.bundle.info.special.pad, self.limit
        fields = [self.fields(row) for row in rows]
        found = zip(self.ids(fields), fields, strict=True)
        ids = [row if len(row) <= limit else self._shortened(texts) for row, texts in found]
        lengths = np.array([len(row) for row in ids])
        attention_mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        padded = np.full(attention_mask.shape, pad, dtype=np.int64)
        padded[attention_mask] = [token for row in ids for token in row]
        readout = np.array([self._readout(row) for row in ids], dtype=np.int64)
        targets = np.array([row.label or 0 for row in rows], dtype=np.int64)
        mask, context = attention_mask.astype(np.int64), self.context_ids
        return Batch(padded, mask, readout, targets, self.label_token_ids, context_ids=context)

    def feature_token_ids(self, seed: int) -> Int64:
        """Vocabulary words whose logits serve as features, drawn by `seed` from all ordinary
        tokens: int64 (F,).

        Drawn, because words that are chosen by the rows would fit those rows.
        """
        ordinary = self._ordinary()
        return np.random.default_rng(seed).choice(
            ordinary, min(FEATURE_WORDS, len(ordinary)), replace=False
        )

    def _ordinary(self) -> Int64:
        """Ids of the tokens that are not special. A word embedding may have more rows than the
        tokenizer has tokens.
        """
        known = [*self._tokenizer.get_vocab().values()]
        ordinary = np.setdiff1d(known, [*self.special])
        return ordinary[ordinary < self.bundle.info.vocab_size]

    def _readout(self, ids: list[int]) -> int:
        group = self.bundle.info.template_group
        if group == "masked":
            return ids.index(self._mask())
        return len(ids) - 1 if group == "causal" else 1  # behind the decoder's start token

    def _mask(self) -> int:
        mask = self.bundle.info.special.mask
        if mask is None:
            raise BundleError(f"{self.bundle.path} has no mask token; export it again")
        return mask

    def fields(self, row: Row) -> dict[str, str]:
        """The texts of a row by column, as the template takes them. Raises DataError for a missing
        column.
        """
        fields = {}
        for column in self.task.text:
            if column not in row.fields:
                raise DataError(
                    f"a row has no {column!r}; task {self.task.name} needs "
                    f"{', '.join(self.task.text)}"
                )
            fields[column] = self._beginning(as_utf8(self.task.cleaned(row.fields[column])).strip())
        return fields

    def _beginning(self, text: str) -> str:
        """A text, or so much of its beginning that more tokens than a row can have are certain:
        time and memory.

        Tokens are counted without those at the end, which what follows could still change (a word
        piece tokenizer knows words of up to 100 characters). Text beyond `MOST_CHARACTERS` for each
        token of a row is not read at all.
        """
        most = self._longest
        size = CHARACTERS * most + EDGE
        while size < min(len(text), MOST_CHARACTERS * most):
            if sum(end <= size - EDGE for end in self._ends(text[:size])) > most:
                break
            size *= 4
        return text[: min(size, MOST_CHARACTERS * most)]

    def _ends(self, text: str) -> list[int]:
        """Where the tokens of a text end in it, of those that a row takes."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return [
            end
            for i, (_, end) in zip(found.ids, found.offsets, strict=True)
            if i not in self.special
        ]

    def _lay_out(self) -> list[Text | Fixed]:
        info = self.bundle.info
        written = self.task.template(info.template_group)
        template = parse_template(written)
        if info.prompt_mode == "cat":
            template = without_prompt(template)
        elif not any(name == "prompt" for _, name in template):
            template = [("", "prompt"), *parse_template(self.task.separator + written)]
        begin, end = (
            (() if token is None else (token,)) for token in (info.special.begin, info.special.end)
        )
        return [begin, *self._parts(template), end]

    def _parts(self, template: Text) -> list[Text | Fixed]:
        """The texts and fixed token ids of a template."""
        parts: list[Text | Fixed] = []
        text: Text = []
        for literal, name in template:
            for piece in self._pieces.split_special(literal):
                if isinstance(piece, tuple):
                    parts, text = [*parts, text, piece], []
                else:
                    text.append((piece, None))
            fixed = name in ("mask", "prompt")
            text.append(("", None if fixed else name))
            if fixed:
                parts += [text, (self._mask(),) if name == "mask" else self._prompt_ids()]
                text = []
        return [*parts, text]

    def _context_ids(self, demonstrations: Sequence[Row]) -> Int64 | None:
        """Tokens of the instruction and the demonstrations; None if there are neither."""
        context = self.task.context
        if demonstrations and "label" in self.task.text:
            problem = "text: a column of demonstrations cannot have the name 'label'"
            raise TaskError(f"task {self.task.name}: {problem}; rename it")
        template = without_prompt(
            parse_template(context.template or self._demonstration_template())
        )
        texts: list[tuple[Text, Fields]] = (
            [([(context.instruction, None)], {})] if context.instruction else []
        )
        texts += [
            (template, self.fields(row) | {"label": self.label_words[row.label or 0]})
            for row in demonstrations
        ]
        parts: list[str | Fixed] = []
        for text, fields in texts:
            for part in self._parts(text):
                parts.append(part if isinstance(part, tuple) else _write(part, fields))
            parts += self._pieces.split_special(context.separator)
        ids = [
            i
            for part in _joined(parts)
            for i in (part if isinstance(part, tuple) else self._pieces.encode(part))
        ]
        return np.array(ids, np.int64) if ids else None

    def _demonstration_template(self) -> str:
        """The causal template with the label word behind it."""
        template = self.task.template("causal")
        space = " " if self._pieces.spaced(template) and not template[-1:].isspace() else ""
        return f"{template}{space}{{label}}"

    @property
    def columns(self) -> list[str]:
        """The text columns in the order in which a row has them, each as often as it has it."""
        return [name for part in self._layout if isinstance(part, list) for _, name in part if name]

    def token_text(self, number: int) -> str | None:
        """How the vocabulary writes a token."""
        return self._tokenizer.id_to_token(number)

    def _prompt_ids(self) -> Fixed:
        """The ids of the text that the prompt starts from; else 1000 .. 1000+n-1.

        In a smaller vocabulary than that its ordinary tokens, repeated if necessary.
        """
        if self.bundle.info.prompt_ids is not None:
            return tuple(self.bundle.info.prompt_ids)
        n, size = self.bundle.info.n_prompt_tokens, self.bundle.info.vocab_size
        wanted = range(FIRST_PROMPT_ID, FIRST_PROMPT_ID + n)
        if (
            wanted.stop <= size
            and self.special.isdisjoint(wanted)
            and all(map(self.token_text, wanted))
        ):
            return tuple(wanted)
        ordinary = self._ordinary().tolist()
        if not ordinary:
            raise BundleError(
                f"{self.bundle.path} has a vocabulary of special tokens alone; export it again"
            )
        return tuple(ordinary[i % len(ordinary)] for i in wanted)

    def ids(self, fields: Sequence[Fields]) -> list[list[int]]:
        """Token ids of each row, before truncation."""
        texts = [
            self._written(part, row)
            for row in fields
            for part in self._layout
            if isinstance(part, list)
        ]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        rows: list[list[int]] = [[] for _ in fields]
        for ids in rows:
            for part in self._layout:
                # A unigram vocabulary has its special tokens as pieces too, so a user's text can
                # still produce one.
                ids += (
                    part
                    if isinstance(part, tuple)
                    else [i for i in next(encodings).ids if i not in self.special]
                )
        return rows

    def _shortened(self, fields: Fields) -> list[int]:
        """Token ids of a row that is too long, without the last tokens of its texts, the longest
        first.
        """
        tokens = self.tokens(fields)
        of_place = Counter(place for _, place in tokens if place is not None)
        kept = {
            place: of_place[place]
            for name in fields
            for place, own in enumerate(self.columns)
            if own == name
        }
        for _ in range(min(len(tokens) - self.limit, sum(kept.values()))):
            kept[max(kept, key=lambda place: kept[place])] -= 1
        ids = []
        for token, place in tokens:
            if place is None or kept[place] > 0:
                ids.append(token)
            if place is not None:
                kept[place] -= 1
        return ids if len(ids) <= self.limit else self.ids([dict.fromkeys(fields, "")])[0]

    def tokens(self, fields: Fields) -> list[tuple[int, int | None]]:
        """Token ids of a row before truncation, each with the text that it ends in, as an index
        into `columns`.

        None for a token of the template. A token that is the space in front of a text belongs to
        that text.
        """
        found, places = list[tuple[int, int | None]](), 0
        for part in self._layout:
            if isinstance(part, tuple):
                found += [(token, None) for token in part]
            else:
                found += [
                    (t, None if i is None else places + i) for t, i in self._tokens_of(part, fields)
                ]
                places += sum(name is not None for _, name in part)
        return found

    def _tokens_of(self, part: Text, fields: Fields) -> Iterator[tuple[int, int | None]]:
        text, spans = self._written(part, fields), _spans(part, fields)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        found = [
            pair
            for pair in zip(encoding.ids, encoding.offsets, strict=True)
            if pair[0] not in self.special
        ]
        for (token, (start, end)), (_, (_, following)) in pairwise(
            [*found, (0, (0, len(text) + 1))]
        ):
            own = next((i for i, (first, last) in enumerate(spans) if first < end <= last), None)
            if own is None and following > end and not text[start:end].strip():
                behind = next(
                    (i for i, (first, last) in enumerate(spans) if end == first < last), None
                )
                if behind is not None and self._opens(token, text[slice(*spans[behind])]):
                    own = behind
            yield token, own

    def _opens(self, token: int, text: str) -> bool:
        """Whether a token is the first of a text, by itself or behind a space."""
        return any(token in self._pieces.encode(before + text)[:1] for before in ("", " "))

    def _written(self, part: Text, fields: Fields) -> str:
        """The text of a part of a row. Mask tokens swallow the space before them, and a label word
        has its own.
        """
        return _write(part, fields).rstrip(" " if self.bundle.info.causal else None)

    def _label_token_ids(self) -> Int64:
        """The first token of each label word, as it is tokenized at its position in the
        template.
        """
        of_task, path, owner = f"of task {self.task.name}", self.bundle.path, dict[int, str]()
        template = self.task.template(self.bundle.info.template_group)
        for word in (
            word
            for of_class in self.task.all_words(self.bundle.info.template_group)
            for word in of_class
        ):
            first, *others = self._pieces.of_word(word, template) or [-1]
            piece = self._pieces.name(first)
            if piece is None:
                raise TaskError(f"label word {word!r} {of_task} is not in the vocabulary of {path}")
            if first in owner:
                raise TaskError(
                    f"label words {owner[first]!r} and {word!r} {of_task} begin with the same "
                    f"token ({piece!r}) in {path}; choose other words"
                )
            owner[first] = word
            if others:
                self.partial_words[word] = piece
        return np.array(list(owner), dtype=np.int64)


def encoder_with_demonstrations(
    bundle: Bundle, task: Task, train: Sequence[Row], settings: Settings
) -> tuple[Encoder, list[Row]]:
    """The encoder of a search, whose demonstrations are some of the train rows of a decoder; and
    the other train rows.

    Raises what `Encoder` and `choose_demonstrations` raise.
    """
    count = settings.demonstrations if bundle.info.causal else 0
    shown, others = choose_demonstrations(train, task.n_classes, count, settings.seed)
    return Encoder(bundle, task, shown), others


def _write(text: Text, fields: Fields) -> str:
    return "".join(literal + (fields[name] if name else "") for literal, name in text)


def _spans(text: Text, fields: Fields) -> list[tuple[int, int]]:
    """Where the fields of a text begin and end in it."""
    spans, end = [], 0
    for literal, name in text:
        start = end + len(literal)
        end = start + (len(fields[name]) if name else 0)
        if name:
            spans.append((start, end))
    return spans


def without_prompt(template: Text) -> Text:
    """A template without the placeholder of the prompt, and without the space behind it."""
    kept: Text = []
    text, behind = "", False
    for literal, name in template:
        text += literal.removeprefix(" ") if behind else literal
        behind = name == "prompt"
        if not behind:
            kept.append((text, name))
            text = ""
    return [*kept, (text, None)]


def _joined(parts: Iterable[str | Fixed]) -> list[str | Fixed]:
    """The same with texts that follow each other as one, because tokens may span them."""
    joined: list[str | Fixed] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
