"""The first part of a package's graph: from the ids of texts to the rows that the backbone reads.

Each id is scattered to its place in a row: `Layout.pieces` at places that depend on the texts'
lengths, texts between them. What has no place (marks, padding, what is truncated) goes to one more
column, which is dropped.
"""

from __future__ import annotations

import numpy as np
import onnx

from bbt_accel.core.bundle import BundleInfo
from bbt_accel.package.builder import Builder
from bbt_accel.package.layout import Layout
from bbt_accel.package.tokenizer import ids_of, vocabulary

INPUTS = dict.fromkeys(
    ("input_ids", "attention_mask"), ("int64", ("batch_size", "sequence_length"))
)
"""Of every package; names and axes are those that foreign loaders know."""
ROW = ("batch_size", "row_length")


def rows_graph(layout: Layout, info: BundleInfo, special: set[int]) -> onnx.ModelProto:
    """Inputs as `INPUTS`; outputs as `Batch.graph_inputs` has them: input_ids, attention_mask,
    readout, for an encoder-decoder decoder_input_ids; the first two as row_ids and row_mask.

    special: ids that no text may have, although the tokenizer can produce them.
    """
    g = Builder()
    kept, ranks, lengths = texts(g, layout, special)
    empty = g.total(
        [g.op("Mul", g.cast(g.op("Equal", n, 0), "int64"), 2**i) for i, n in enumerate(lengths)]
    )
    lengths = truncated(
        g, lengths, g.op("Gather", g.constant(list(map(layout.room, patterns(layout)))), empty)
    )
    places, ids, length = placed(g, layout, kept, ranks, lengths, empty)
    width = g.op(
        "Min",
        g.op("Max", g.op("ReduceMax", length, keepdims=0), info.shortest_row + layout.ahead),
        layout.limit,
    )
    rows = g.op("Shape", "input_ids", start=0, end=1)
    shape = g.op("Concat", rows, g.op("Unsqueeze", g.op("Add", width, 1), g.constant([0])), axis=0)
    trash = [g.op("Where", g.op("Less", place, 0), width, place) for place in places]
    blank = g.op("Expand", info.special.pad, shape)
    filled = g.op(
        "ScatterElements",
        blank,
        g.op("Concat", *trash, axis=1),
        g.op("Concat", *ids, axis=1),
        axis=1,
    )
    ahead = layout.ahead
    ends = g.op("Unsqueeze", width, g.constant([0]))
    g.op("Slice", filled, g.constant([ahead]), ends, g.constant([1]), name="row_ids")
    position = g.op("Range", ahead, width, 1)
    g.op("Cast", g.op("Less", position, length), to=onnx.TensorProto.INT64, name="row_mask")
    outputs = {"row_ids": ("int64", ROW), "row_mask": ("int64", ROW), "readout": ("int64", ROW[:1])}
    readout(g, info, rows, g.op("Sub", length, ahead))
    if info.decodes:
        decoder_input(g, info, rows)
        outputs["decoder_input_ids"] = ("int64", ("batch_size", "decoder_length"))
    return g.model("rows", INPUTS, outputs, info.opset)


def texts(g: Builder, layout: Layout, special: set[int]) -> tuple[list[str], list[str], list[str]]:
    """For each text: which inputs are its ids (N, S), how many of it are before each (N, S), and
    its length (N, 1).
    """
    mark, pad = ids_of(layout.tokenizer)
    ordinary = np.ones(max(pad, *vocabulary(layout.tokenizer["model"]).values()) + 1, np.int64)
    ordinary[[mark, pad, *special]] = 0
    real = g.cast(g.op("Cast", "attention_mask", to=onnx.TensorProto.BOOL), "int64")
    some = g.op("Mul", real, g.op("Gather", g.constant(ordinary), "input_ids"))
    marks = g.op("CumSum", g.op("Mul", real, g.cast(g.op("Equal", "input_ids", mark), "int64")), 1)
    kept, ranks, lengths = [], [], []
    for i in range(layout.texts):
        own = some
        if layout.texts > 1:  # what is in front of every mark belongs to the first text
            at = g.op("LessOrEqual", marks, 1) if i == 0 else g.op("Greater", marks, i)
            own = g.op("Mul", some, g.cast(at, "int64"))
        kept.append(own)
        ranks.append(g.op("Sub", g.op("CumSum", own, 1), 1))
        lengths.append(g.op("ReduceSum", own, g.constant([1]), keepdims=1))
    return kept, ranks, lengths


def patterns(layout: Layout) -> list[tuple[bool, ...]]:
    """Which texts are empty: the patterns in the order of their numbers, in which text i counts
    2^i.
    """
    return sorted(layout.pieces, key=lambda empty: sum(2**i for i, no in enumerate(empty) if no))


def truncated(g: Builder, lengths: list[str], room: str) -> list[str]:
    """Lengths (N, 1) as the encoding truncates them to a room (N, 1): the longest first, of equal
    ones the first.
    """
    excess = g.op("Max", g.op("Sub", g.total(lengths), room), 0)
    if len(lengths) == 1:
        return [g.op("Sub", lengths[0], excess)]
    a, b = lengths
    longer = g.op("Sub", a, b)
    of_a = g.op("Min", excess, g.op("Max", longer, 0))
    of_b = g.op("Min", excess, g.op("Max", g.op("Neg", longer), 0))
    rest = g.op("Sub", g.op("Sub", excess, of_a), of_b)
    half = g.op("Div", rest, 2)
    first = g.op("Sub", g.op("Sub", a, of_a), g.op("Sub", rest, half))
    return [first, g.op("Sub", g.op("Sub", b, of_b), half)]


def placed(
    g: Builder, layout: Layout, kept: list[str], ranks: list[str], lengths: list[str], empty: str
) -> tuple[list[str], list[str], str]:
    """For every piece and text its places (N, …), -1 for none, and its ids, likewise; and the rows'
    lengths (N, 1).
    """
    places, ids = list[str](), list[str]()
    start = g.op("Mul", empty, 0)
    for j in range(len(layout.order) + 1):
        own = [layout.pieces[pattern][j] for pattern in patterns(layout)]
        longest = max(map(len, own))
        if longest:
            table = np.array([[*piece, *[0] * (longest - len(piece))] for piece in own])
            flat = g.op("Squeeze", empty, g.constant([1]))
            size = g.op("Gather", g.constant(list(map(len, own))), empty)
            offset = g.constant(np.arange(longest)[None])
            places.append(place(g, g.op("Less", offset, size), g.op("Add", start, offset)))
            ids.append(g.op("Gather", g.constant(table), flat))
            start = g.op("Add", start, size)
        if j < len(layout.order):
            i = layout.order[j]
            inside = g.op("Mul", kept[i], g.cast(g.op("Less", ranks[i], lengths[i]), "int64"))
            places.append(place(g, g.op("Greater", inside, 0), g.op("Add", start, ranks[i])))
            ids.append("input_ids")
            start = g.op("Add", start, lengths[i])
    return places, ids, start


def place(g: Builder, used: str, position: str) -> str:
    return g.op("Where", used, position, -1)


def readout(g: Builder, info: BundleInfo, rows: str, length: str) -> None:
    """The position whose logits are read: of the mask token, of a decoder's last token, or behind
    the start token.
    """
    if info.template_group == "masked":
        found = g.cast(g.op("Equal", "row_ids", int(info.special.mask or 0)), "int64")
        g.op("ArgMax", found, axis=1, keepdims=0, name="readout")
    elif info.causal:
        g.op("Squeeze", g.op("Sub", length, 1), g.constant([1]), name="readout")
    else:
        g.op("Expand", 1, rows, name="readout")


def decoder_input(g: Builder, info: BundleInfo, rows: str) -> None:
    """decoder_input_ids as `Batch.with_decoder_input` derives them, up to the last readout
    position.
    """
    start = g.op("Concat", rows, g.constant([1]), axis=0)
    begin = g.op("Expand", int(info.special.decoder_start or 0), start)
    if info.template_group == "masked":
        last = g.op("Unsqueeze", g.op("ReduceMax", "readout", keepdims=0), g.constant([0]))
        follow = g.op("Slice", "row_ids", g.constant([0]), last, g.constant([1]))
    else:
        follow = g.op("Expand", int(info.special.mask or 0), start)
    g.op("Concat", begin, follow, axis=1, name="decoder_input_ids")
