"""The last part of a package's graph: from what the backbone returns to class scores, by the
readout of a run.
"""

from __future__ import annotations

import numpy as np
import onnx

from bbt_accel.core.bundle import STATES
from bbt_accel.core.logits import one_word_each, word_shares
from bbt_accel.package.builder import Builder
from bbt_accel.search.readout import READS, Readout, reads_states

EXACT = "float64"
"""Readouts are fitted and applied in float64."""


def scores_graph(readout: Readout, opset: int) -> onnx.ModelProto:
    """label_logits (1, N, M) and states (1, N, …) → logits (N, C), float32: `Readout.scores`, whose
    softmax gives the probabilities."""
    g = Builder()
    words = len(readout.token_ids) + len(readout.classes)
    inputs: dict[str, tuple[str, tuple[str | int, ...]]] = {
        "label_logits": ("float32", (1, "batch_size", words))
    }
    if reads_states(readout.name):
        # Each of its own width: the LM heads of some families read a state of another than
        # hidden_size.
        inputs |= {name: ("float32", (1, "batch_size", f"{name}_size")) for name in STATES}
    given = {name: g.cast(g.op("Squeeze", name, g.constant([0])), EXACT) for name in inputs}
    blocks = [features(g, readout, given, block) for block in READS[readout.name]]
    found = (
        prototypes(g, readout, *blocks)
        if readout.name == "prototype"
        else linear(g, readout, blocks)
    )
    g.op("Cast", found, to=onnx.TensorProto.FLOAT, name="logits")
    classes = int(readout.classes.max()) + 1
    return g.model("scores", inputs, {"logits": ("float32", ("batch_size", classes))}, opset)


def class_logits(g: Builder, readout: Readout, label_logits: str) -> str:
    """(N, M or more) → (N, C): the mean over the words of each class."""
    words = columns(g, label_logits, 0, len(readout.classes))
    if one_word_each(readout.classes):
        return words
    return g.op("MatMul", words, g.constant(word_shares(readout.classes), EXACT))


def columns(g: Builder, value: str, begin: int, end: int) -> str:
    return g.op("Slice", value, g.constant([begin]), g.constant([end]), g.constant([1]))


def features(g: Builder, readout: Readout, given: dict[str, str], block: str) -> str:
    """One of the blocks that the readout reads, (N, F)."""
    words = len(readout.classes)
    if block == "word_logits":
        return columns(g, given["label_logits"], words, words + len(readout.token_ids))
    return (
        class_logits(g, readout, given["label_logits"]) if block == "class_logits" else given[block]
    )


def linear(g: Builder, readout: Readout, blocks: list[str]) -> str:
    """The blocks side by side, times the weight and plus the bias where there are any."""
    found = blocks[0] if len(blocks) == 1 else g.op("Concat", *blocks, axis=1)
    for kind, name in (("MatMul", "weight"), ("Add", "bias")):
        if name in readout.arrays:
            found = g.op(kind, found, g.constant(readout.arrays[name], EXACT))
    return found


def prototypes(g: Builder, readout: Readout, state: str, logits: str) -> str:
    """−‖norm(W h) − z_k‖ + r_k + λ L_k, as `readout.prototype_scores`."""
    a = {name: g.constant(value, EXACT) for name, value in readout.arrays.items()}
    h = g.op("MatMul", state, a["weight"])
    length = g.op("Max", norm(g, h), g.constant(np.array(1e-12), EXACT))
    h = g.op("Unsqueeze", g.op("Div", h, length), g.constant([1]))
    # The axis goes last: where a sum drops it, OpenVINO computes other numbers for several rows.
    distance = g.op("Squeeze", norm(g, g.op("Sub", h, a["prototypes"])), g.constant([-1]))
    logits = g.op("Add", logits, a["bias"])
    return g.op("Add", g.op("Sub", a["radius"], distance), g.op("Mul", a["share"], logits))


def norm(g: Builder, x: str) -> str:
    """Along the last axis, which stays."""
    squares = g.op("ReduceSum", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
    return g.op("Sqrt", squares)
