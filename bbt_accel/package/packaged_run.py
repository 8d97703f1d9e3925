"""A run as one graph: the parts of `compose` from a run's bundle, prompt, template and readout."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir

from bbt_accel.core.batch import Float32, Int64
from bbt_accel.core.bundle import Bundle, state_name
from bbt_accel.errors import PackageError
from bbt_accel.exporters.trace.sessions import open_stage, prompt_feeds
from bbt_accel.package.compose import Constants, Part, composed
from bbt_accel.package.layout import Layout, find_layout
from bbt_accel.package.rows import rows_graph
from bbt_accel.package.scores import scores_graph
from bbt_accel.search.readout import Readout
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder

ROWS = {"row_ids": "input_ids", "row_mask": "attention_mask"}
"""Outputs of the first part, and what the stages call them."""
CHECKED = {name: f"rows.{own}" for own, name in ROWS.items()}
"""What is compared with the encoding, and the names of these values inside the graph."""


class PackagedRun:
    """What a package is made of: a bundle, a template, a prompt and a readout."""

    def __init__(self, bundle: Bundle, encoder: Encoder, prompt: Float32, readout: Readout) -> None:
        self.bundle, self.info = bundle, bundle.info
        self.encoder, self.prompt, self.readout = encoder, prompt, readout

    @cached_property
    def layout(self) -> Layout:
        """Raises PackageError for a template that has none."""
        layout = find_layout(self.encoder)
        check_beginning(self.info.prefix_columns, layout, self.encoder.task.name)
        return layout

    @property
    def room(self) -> int:
        """Most tokens of all texts of a row together."""
        return self.encoder.limit - len(
            self.encoder.ids([dict.fromkeys(self.encoder.task.text, "")])[0]
        )

    @property
    def label_token_ids(self) -> Int64:
        return np.concatenate([self.encoder.label_token_ids, self.readout.token_ids])

    def front(self) -> onnx.ModelProto:
        """From ids of texts to what the first stage reads."""
        return rows_graph(self.layout, self.info, self.encoder.special)

    def back(self) -> onnx.ModelProto:
        return scores_graph(self.readout, self.info.opset)

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
            states = {o.name: state_name(o.name) for o in model.graph.output}
            parts.append(Part(name, model, used, states))
        parts.append(Part("scores", self.back()))
        classes = int(self.readout.classes.max()) + 1
        return composed(parts, {"logits": ("float32", ("batch_size", classes))}, self.bundle.path)


def check_beginning(columns: int, layout: Layout, task: str) -> None:
    """A decoder's prompt is computed once for all rows of a call, whose first columns must be the
    same.

    Raises PackageError for a template with a text under the prompt.
    """
    beginnings = {layout.beginning(empty) for empty in layout.pieces}
    if min(map(len, beginnings)) < columns or len({ids[:columns] for ids in beginnings}) > 1:
        raise PackageError(
            f"task {task} has a text under the prompt; put {{prompt}} in front of it"
        )
