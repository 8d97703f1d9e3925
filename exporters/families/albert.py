"""ALBERT: one block, or one group of blocks, many times, and embeddings that are narrower than the
hidden states.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bbt_accel.exporters.families.bert import BertBackbone
from bbt_accel.exporters.families.family import FamilySpec, sizes


def albert_blocks(model: Any) -> list[nn.Module]:
    """The block that computes each layer: the same one again and again."""
    config, groups = model.config, model.albert.encoder.albert_layer_groups
    per_group = config.num_hidden_layers / config.num_hidden_groups
    layers = (groups[int(i / per_group)].albert_layers for i in range(config.num_hidden_layers))
    return [block for layer in layers for block in layer]


def whole_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """A mask of all pairs of positions: from another one the model would make one for the row
    without its prompt.
    """
    mask = arguments["attention_mask"].bool()
    return arguments | {"attention_mask": mask[:, None, None].expand(-1, 1, mask.shape[1], -1)}


class AlbertBackbone(BertBackbone):
    """AlbertForMaskedLM. The prompt is added after the projection to the hidden size."""

    def __init__(self, model: nn.Module, info: Any) -> None:
        super().__init__(model, info)
        self.blocks = albert_blocks(
            model
        )  # a plain list: a ModuleList would name the shared weights twice

    @property
    def base(self) -> Any:
        return self.model.albert

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.base.encoder.embedding_hidden_mapping_in(super().tokens(input_ids))

    def projections(self, i: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        own: Any = self.blocks[i].attention
        return own.query, own.key, own.value

    def mix(self, i: int, query: Tensor, context: Tensor) -> Tensor:
        block: Any = self.blocks[i]
        y = block.attention.LayerNorm(block.attention.dense(context) + query)
        return block.full_layer_layer_norm(block.ff_chunk(y) + y)

    def head(self, x: Tensor) -> Tensor:
        head = self.model.predictions
        return head.LayerNorm(head.activation(head.dense(x)))

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.predictions.decoder
        return decoder.weight, decoder.bias


ALBERT = FamilySpec(
    model_type="albert",
    model_class="AlbertForMaskedLM",
    backbone=AlbertBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=albert_blocks,
    embedding=lambda model: model.albert.encoder.embedding_hidden_mapping_in,
    head=lambda model: model.predictions,
    arguments=whole_mask,
    tiny=sizes(3, 64, 4, 256, 1000, embedding_size=32, max_position_embeddings=128),
    shapes={"albert-base": sizes(12, 768, 12, 3072, 30000)},
)
