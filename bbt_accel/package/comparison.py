"""A package against `predict`, as a loader runs it: token ids and scores of every row; other labels
are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bbt_accel.core.batch import Float64, Int64
from bbt_accel.core.comparison import PACKAGE, scaled_errors
from bbt_accel.errors import DataError, PackageError
from bbt_accel.package.manifest import Comparison
from bbt_accel.package.packaged_run import CHECKED, PackagedRun
from bbt_accel.package.tokenizer import PAD
from bbt_accel.predict.inference import BATCH_SIZE, scored_rows, searched_split
from bbt_accel.search.run import Run
from bbt_accel.tasks.data import Row, load_rows, rows_digest
from bbt_accel.tasks.encoding import Encoder

LoadedModel = Callable[[dict[str, Int64]], dict[str, np.ndarray]]
"""A package's model: from its inputs to `logits`, and the values of `CHECKED` by name."""


@dataclass(frozen=True)
class PackageOutput:
    """What a package makes of rows. ids: of each row, as the backbone reads it. scores: float64 (N,
    C).
    """

    ids: list[list[int]]
    scores: Float64


def available_rows(run: Run, most: int | None) -> tuple[list[Row], list[Row]]:
    """The rows that a run could be searched on, and its test rows; none where there are no data.

    most: of each, evenly drawn.
    """
    found = []
    for load in (partial(searchable_rows, run), partial(scored_rows, run, None, "test")):
        try:
            rows = load()
        except DataError:
            rows = []
        found.append(
            rows
            if most is None or len(rows) <= most
            else [rows[i * len(rows) // most] for i in range(most)]
        )
    return found[0], found[1]


def searchable_rows(run: Run) -> list[Row]:
    """The train file, without the rows of it that are test rows. Raises DataError."""
    if run.info.settings.hold_out:
        train, dev, *_ = searched_split(run, run.data_path)
        return [*train, *dev]
    return load_rows(run.task, "train", run.data_path)


def edge_rows(encoder: Encoder) -> list[Row]:
    """Rows at the edges of what a text can be: empty, white space, special tokens, emoji, and
    longer than a row.
    """
    special = " ".join(sorted(filter(None, map(encoder.token_text, encoder.special)))[:16])
    texts = [
        "",
        " \t\n",
        f"{special} it was",
        "it was [MASK] </s> <mask> \\n great",
        "an emoji 👩‍🚀🎉 é, 東京",
    ]
    texts += ["private use \ue000 is \ue001 it \ue002 was"]
    texts += [" \nit was great ", "東京 7"]
    long = "it was great, and a little too long. " * (encoder.limit // 4)
    columns = encoder.task.text
    rows = [Row(dict.fromkeys(columns, text)) for text in (*texts, long)]
    if len(columns) > 1:
        pairs = [
            ("", texts[3]),
            (texts[4], ""),
            (long, "short"),
            ("short", long),
            (long, ""),
            ("", long),
        ]
        pairs += [
            (long.replace("it", "7"), long),
            (long, long.replace("it", "7")),
            ("it \ue000 was", "\ue001 great"),
        ]
        rows += [Row(dict(zip(columns, pair, strict=True))) for pair in pairs]
    return rows


def run_package(
    model: LoadedModel, folder: Path, made: PackagedRun, rows: Sequence[Row]
) -> PackageOutput:
    """As loaders do it: texts or pairs to the tokenizer of the folder, padded ids to the model.

    Raises PackageError where a loader's truncation would change what the backbone reads.
    """
    columns, ids, scores = made.encoder.task.text, list[list[int]](), []
    whole, shortened = open_tokenizer(folder), open_tokenizer(folder)
    shortened.enable_truncation(made.layout.max_length)
    for start in range(0, len(rows), BATCH_SIZE):
        texts = [
            tuple(row.fields[name] for name in columns) for row in rows[start : start + BATCH_SIZE]
        ]
        read, outputs = run_texts(model, whole, texts)
        long = [i for i, row in enumerate(read) if len(row) >= made.layout.longest]
        if long and run_texts(model, shortened, [texts[i] for i in long])[0] != [
            read[i] for i in long
        ]:
            raise PackageError(
                f"{folder} reads other tokens where a loader truncates; shorten the template"
            )
        ids += read
        scores.append(outputs)
    return PackageOutput(ids, np.concatenate(scores))


def open_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer


def run_texts(
    model: LoadedModel, tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]]
) -> tuple[list[list[int]], Float64]:
    """What the backbone reads of each text or pair, and the scores (N, C)."""
    found = tokenizer.encode_batch([pair if len(pair) > 1 else pair[0] for pair in texts])
    given = {
        "input_ids": [e.ids for e in found],
        "attention_mask": [e.attention_mask for e in found],
    }
    outputs = model({name: np.array(value, np.int64) for name, value in given.items()})
    row_ids, mask = (outputs[name] for name in CHECKED)
    ids = [row[own > 0].tolist() for row, own in zip(row_ids, mask, strict=True)]
    return ids, np.asarray(outputs["logits"], np.float64)


def encoded(encoder: Encoder, rows: Sequence[Row]) -> list[list[int]]:
    """Ids of each row as the encoding gives them to the backbone."""
    ids = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = encoder.encode(rows[start : start + BATCH_SIZE]).graph_inputs(encoder.bundle.info)
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ids += [row[mask > 0].tolist() for row, mask in pairs]
    return ids


def compare(
    made: PackagedRun, found: PackageOutput, rows: Sequence[Row], wanted: Float64
) -> Comparison:
    """Raises PackageError at a row with other token ids than `predict` has, or with scores beyond
    `PACKAGE`.

    wanted: its scores (N, C). Other labels, of scores within the tolerance, are counted.
    """
    tolerance = PACKAGE[made.info.precision]
    for number, (own, theirs) in enumerate(
        zip(found.ids, encoded(made.encoder, rows), strict=True)
    ):
        if own != theirs:
            problem, hint = "other token ids", "separate the texts in its template by spaces"
            raise refusal(rows[number], number + 1, problem, hint)
    errors = scaled_errors(found.scores, wanted)
    if not (errors <= tolerance).all():  # also for NaN
        number = int(np.argmax(np.nan_to_num(errors.max(1), nan=np.inf)))
        problem = f"scores that differ by {errors.max():.1e}, more than {tolerance:.0e}"
        raise refusal(rows[number], number + 1, problem, "export the bundle again")
    differ = found.scores.argmax(1) != wanted.argmax(1)
    largest, digest = float(errors.max(initial=0.0)), rows_digest(rows)
    return Comparison(
        rows=len(rows), digest=digest, largest_error=largest, labels_differ=int(differ.sum())
    )


def refusal(row: Row, number: int, problem: str, hint: str) -> PackageError:
    text = " | ".join(row.fields.values())
    return PackageError(
        f"row {number} ({text!r:.80}) has {problem} in the package than in predict; {hint}"
    )
