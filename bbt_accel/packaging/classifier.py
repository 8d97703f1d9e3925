"""A run as one graph: the parts of `compose` from a run's bundle, prompt, template and readout."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from bbt_accel.batch import Float32, Int64
from bbt_accel.bundle import Bundle
from bbt_accel.data import Row
from bbt_accel.encoding import Encoder
from bbt_accel.errors import PackageError
from bbt_accel.exporters.sessions import open_stage, prompt_feeds
from bbt_accel.packaging.compose import Constants, Part, composed
from bbt_accel.packaging.layout import Layout
from bbt_accel.packaging.rows import rows_graph
from bbt_accel.packaging.scores import scores_graph
from bbt_accel.readout import Readout

ROWS = {"row_ids": "input_ids", "row_mask": "attention_mask"}
"""Outputs of the first part, and what the stages call them."""
CHECKED = {name: f"rows.{own}" for own, name in ROWS.items()}
"""What is compared with the encoding, and the names of these values inside the graph."""
OUTPUTS = {"logits": ("float32", ("batch_size", "classes"))}


class Classifier:
    """What a package is made of: a bundle, a prompt, a template with its layout, and a readout."""

    def __init__(self, bundle: Bundle, encoder: Encoder, layout: Layout, prompt: Float32, readout: Readout) -> None:
        self.bundle, self.info = bundle, bundle.info
        self.encoder, self.layout, self.prompt, self.readout = encoder, layout, prompt, readout
        check_beginning(self)

    @property
    def label_token_ids(self) -> Int64:
        return np.concatenate([self.encoder.label_token_ids, self.readout.token_ids])

    def front(self) -> onnx.ModelProto:
        """From ids of texts to what the first stage reads."""
        return rows_graph(self.layout, self.info, self.encoder.special)

    def back(self) -> onnx.ModelProto:
        return scores_graph(self.readout, self.info.hidden_size, self.info.opset)

    def stages(self) -> dict[str, Constants]:
        """The stages that depend on the row, in order, and their constant inputs."""
        context = self.context()
        given = {"label_token_ids": self.label_token_ids, **context}
        names = [name for name in self.info.stages if name != "context"]
        return {name: given | prompt_feeds(self.info, name, self.prompt[None]) for name in names}

    def context(self) -> Constants:
        """Keys and values of a decoder's context, which does not depend on the row."""
        if not self.info.causal:
            return {}
        batch = self.encoder.encode([Row(dict.fromkeys(self.encoder.task.text, ""))])
        feeds = batch.graph_inputs(self.info)
        found = {name: feeds[name] for name in ("context_ids", "context_mask")}
        return found | open_stage(self.bundle, "context")(found)

    def graph(self) -> ir.Model:
        """The whole in ONNX, from a bundle whose stages are."""
        parts = [Part("rows", self.front(), renamed=ROWS)]
        for name, constants in self.stages().items():
            model = onnx.load(self.bundle.path / f"{name}.onnx", load_external_data=False)
            own = {i.name for i in model.graph.input}
            used = {name: value for name, value in constants.items() if name in own}
            states = {o.name: o.name.removesuffix("_out") for o in model.graph.output}
            parts.append(Part(name, model, used, states))
        parts.append(Part("scores", self.back()))
        return composed(parts, OUTPUTS, self.bundle.path)


def check_beginning(made: Classifier) -> None:
    """A decoder's prompt is computed once for all rows of a call, whose beginning must be the same.

    Raises PackageError for a template with a text under the prompt.
    """
    columns = made.info.prefix_columns
    beginnings = {made.layout.beginning(empty) for empty in made.layout.pieces}
    if min(map(len, beginnings)) < columns or len({ids[:columns] for ids in beginnings}) > 1:
        raise PackageError(f"task {made.encoder.task.name} has a text under the prompt; put {{prompt}} in front of it")
