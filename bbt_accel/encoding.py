"""From rows to a Batch: template, initial prompt tokens, truncation and readout position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from bbt_accel.batch import Batch, Int64
from bbt_accel.bundle import Bundle
from bbt_accel.data import Row
from bbt_accel.errors import BundleError, DataError, TaskError, first_line
from bbt_accel.tasks import Task, parse_template

FIRST_PROMPT_ID = 1000  # in the vocabulary, as in the original
UNKNOWN = ("<unk>", "[UNK]")
Fields = Mapping[str, str]
Text = list[tuple[str, str | None]]  # literal texts, each with the column that follows it
Fixed = tuple[int, ...]  # token ids that are the same in every row


class Encoder:
    """Encodes rows of `task` for the backbone of `bundle`, with the bundle's own tokenizer.

    A row alternates between texts and fixed token ids, e.g. for a masked LM in add mode: begin token and initial prompt
    ids, text, mask token, text, end token. Only the layout inserts special tokens: one that is spelled out in a user's
    text is ordinary text.

    Raises TaskError when the task does not fit the bundle: no template for its group, label words that begin with the
    same token or are not in the vocabulary, or a template longer than the bundle's maximum length.
    """

    def __init__(self, bundle: Bundle, task: Task) -> None:
        self.bundle, self.task = bundle, task
        self.label_words = task.words(bundle.info.template_group)
        self._tokenizer = _tokenizer(bundle)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special and token.content not in UNKNOWN}
        self._layout = self._lay_out()
        self.label_token_ids: Int64 = self._label_token_ids()
        limit, length = bundle.info.max_length, len(self._ids([dict.fromkeys(task.text, "")])[0])
        if length > limit:
            problem = f"the template of task {task.name} alone exceeds the {limit} tokens of {bundle.path}"
            raise TaskError(f"{problem} by {length - limit}; shorten it")

    def encode(self, rows: Sequence[Row]) -> Batch:
        """All rows, in order, padded on the right to the longest; the target of a row without a label is 0.

        Rows that are too long are truncated at the end of their text columns, the longest column first.
        Raises DataError for no rows, and for a row without one of the columns.
        """
        pad, limit = self.bundle.info.special.pad, self.bundle.info.max_length
        fields = [self._fields(row) for row in rows]
        found = zip(self._ids(fields), fields, strict=True)
        ids = [row if len(row) <= limit else self._shortened(texts, len(row)) for row, texts in found]
        lengths = np.array([len(row) for row in ids])
        attention_mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        padded = np.full(attention_mask.shape, pad, dtype=np.int64)
        padded[attention_mask] = [token for row in ids for token in row]
        readout = np.array([self._readout(row) for row in ids], dtype=np.int64)
        targets = np.array([row.label or 0 for row in rows], dtype=np.int64)
        return Batch(padded, attention_mask.astype(np.int64), readout, targets, self.label_token_ids)

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

    def _fields(self, row: Row) -> dict[str, str]:
        fields = {}
        for column in self.task.text:
            if column not in row.fields:
                raise DataError(f"a row has no {column!r}; task {self.task.name} needs {', '.join(self.task.text)}")
            text = row.fields[column]
            if self.task.clean == "newlines":
                text = text.replace("\\n", " ")
            # A lone surrogate, which JSON can carry, has no UTF-8 form.
            fields[column] = text.encode("utf-8", "replace").decode("utf-8").strip()
        return fields

    def _lay_out(self) -> list[Text | Fixed]:
        info = self.bundle.info
        template = self.task.template(info.template_group)
        if info.prompt_mode == "cat":
            template = template.replace("{prompt} ", "").replace("{prompt}", "")
        elif "{prompt}" not in template:
            template = "{prompt}" + self.task.separator + template
        begin, end = ((() if token is None else (token,)) for token in (info.special.begin, info.special.end))
        layout: list[Text | Fixed] = [begin]
        text: Text = []
        for literal, name in parse_template(template):
            text.append((literal, name if name in self.task.text else None))
            if name == "mask" or name == "prompt":
                layout += [text, (self._mask(),) if name == "mask" else self._prompt_ids()]
                text = []
        return [*layout, text, end]

    def _prompt_ids(self) -> Fixed:
        """Ids 1000 .. 1000+n-1; in a smaller vocabulary its ordinary tokens, repeated if necessary."""
        n, size = self.bundle.info.n_prompt_tokens, self.bundle.info.vocab_size
        wanted = range(FIRST_PROMPT_ID, FIRST_PROMPT_ID + n)
        if wanted.stop <= size and self._special.isdisjoint(wanted):
            return tuple(wanted)
        ordinary = [i for i in range(size) if i not in self._special]
        return tuple(ordinary[i % len(ordinary)] for i in wanted)

    def _ids(self, fields: Sequence[Fields]) -> list[list[int]]:
        """Token ids of each row, before truncation."""
        texts = [_write(part, row) for row in fields for part in self._layout if isinstance(part, list)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        rows: list[list[int]] = [[] for _ in fields]
        for ids in rows:
            for part in self._layout:
                # A unigram vocabulary has its special tokens as pieces too, so a user's text can still produce one.
                ids += part if isinstance(part, tuple) else [i for i in next(encodings).ids if i not in self._special]
        return rows

    def _shortened(self, fields: dict[str, str], length: int) -> list[int]:
        """Token ids of a row of `length` tokens, too many, with its text columns truncated until it fits."""
        limit = self.bundle.info.max_length
        pieces = {name: self._tokenizer.encode(text, add_special_tokens=False) for name, text in fields.items()}
        keep = {name: len(piece) for name, piece in pieces.items()}
        while True:
            # Truncation can change the tokenization around it, hence the loop; each turn removes at least one token.
            for _ in range(min(length - limit, sum(keep.values()))):
                keep[max(keep, key=lambda name: keep[name])] -= 1
            ends = {name: pieces[name].offsets[kept - 1][1] if kept else 0 for name, kept in keep.items()}
            ids = self._ids([{name: text[: ends[name]] for name, text in fields.items()}])[0]
            length = len(ids)
            if length <= limit:
                return ids

    def _label_token_ids(self) -> Int64:
        """The first token of each label word, as it is tokenized at its position in the template."""
        space = " " if self._word_follows_space() else ""
        of_task, path, owner = f"of task {self.task.name}", self.bundle.path, dict[int, str]()
        for word in self.label_words:
            ids = self._tokenizer.encode(space + word, add_special_tokens=False).ids
            token = self._tokenizer.id_to_token(ids[0]) if ids else None
            if token is None or token in UNKNOWN:
                raise TaskError(f"label word {word!r} {of_task} is not in the vocabulary of {path}")
            if ids[0] in owner:
                raise TaskError(
                    f"label words {owner[ids[0]]!r} and {word!r} {of_task} begin with the same token ({token!r}) in "
                    f"{path}; choose other words"
                )
            owner[ids[0]] = word
        return np.array(list(owner), dtype=np.int64)

    def _word_follows_space(self) -> bool:
        """Whether a label word begins with a space: in byte-level vocabularies the space belongs to the word.

        WordPiece drops spaces, and SentencePiece itself puts one before every word.
        """
        if "ByteLevel(" not in repr(self._tokenizer.pre_tokenizer):
            return False
        group = self.bundle.info.template_group
        before = self.task.template(group).partition("{mask}")[0]
        return group == "causal" or not before or before[-1].isspace()


def _tokenizer(bundle: Bundle) -> Tokenizer:
    file = bundle.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"cannot read {file} ({first_line(error)}); export the bundle again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that contains <mask> or </s> is ordinary text
    return tokenizer


def _write(text: Text, fields: Fields) -> str:
    # No space before a fixed token: mask tokens swallow it. At the end, the label word has its own.
    return "".join(literal + (fields[column] if column else "") for literal, column in text).rstrip()
