"""What a model family is: everything in which one differs from another, in one declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn

from bbt_accel.core.bundle import Architecture, BundleInfo, TemplateGroup
from bbt_accel.exporters.families.backbone import Backbone


@dataclass(frozen=True)
class FamilySpec:
    """A family of checkpoints: those of one `model_type`.

    model_type: as config.json has it. model_class: the class with the LM head, or its name in
    transformers.
    backbone: how it computes, without redundant work.
    architecture, template_group: see `bbt_accel.core.bundle`.
    blocks, embedding, head: where the naive forward (exporters/families/reference.py) finds, in the
        model, the blocks that take a prompt; the module whose output the bbt prompt is added to;
        and the first module of the LM head.
    arguments: changes those of the naive forward, where a family needs other ones to take the
    prompt.
    begin, end, mask: the special tokens of a row, as attributes of the tokenizer or as text; None
        for none. The prompt follows the begin token, except in cat mode of encoders. A decoder has
        it where its tokenizer adds it.
    positions: the longest row that the positions allow, from the configuration; ExportError for
    what is not computed.
    prompt_takes_positions: whether a cat-mode prompt counts towards that limit, as it does when it
        stands in front of the token embeddings.
    tiny: a configuration that exports in seconds and has every kind of node, for checks.
    shapes: configurations of published checkpoints by name, for benchmarks with random weights.
    """

    model_type: str
    model_class: str | type[nn.Module]
    backbone: type[Backbone]
    architecture: Architecture
    template_group: TemplateGroup
    blocks: Callable[[Any], Iterable[nn.Module]]
    embedding: Callable[[Any], nn.Module]
    head: Callable[[Any], nn.Module]
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = dict
    begin: str | None = "cls_token"
    end: str | None = "sep_token"
    mask: str | None = "mask_token"
    positions: Callable[[Any], int] = lambda config: int(config.max_position_embeddings)
    prompt_takes_positions: bool = False
    tiny: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        return self.model_class if isinstance(self.model_class, str) else self.model_class.__name__

    def load_class(self) -> Any:
        """The class with the LM head."""
        return (
            getattr(transformers, self.model_class)
            if isinstance(self.model_class, str)
            else self.model_class
        )

    def compose(self, model: nn.Module, info: BundleInfo) -> Backbone:
        """The backbone of a loaded model for one method, mode and prompt length."""
        return self.backbone(model, info).eval()


def sizes(
    layers: int, hidden: int, heads: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A configuration by the names that most families of transformers share, for `tiny` and
    `shapes`.
    """
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }
