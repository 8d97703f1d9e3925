"""MPNet: BERT with relative position biases, shared by all blocks, beside its position
embeddings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bbt_accel.exporters.families.backbone import padding_bias
from bbt_accel.exporters.families.bert import RobertaBackbone, bert_shape
from bbt_accel.exporters.families.family import FamilySpec


class MPNetBackbone(RobertaBackbone):
    """MPNetForMaskedLM. Its LM head is RoBERTa's."""

    @property
    def base(self) -> Any:
        return self.model.mpnet

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        of_positions = self.base.encoder.compute_position_bias(attention_mask[:1])
        return of_positions + padding_bias(attention_mask)

    def projections(self, i: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        own = self.base.encoder.layer[i].attention.attn
        return own.q, own.k, own.v

    def mix(self, i: int, query: Tensor, context: Tensor) -> Tensor:
        layer = self.base.encoder.layer[i]
        y = layer.attention.LayerNorm(layer.attention.attn.o(context) + query)
        return layer.output(layer.intermediate(y), y)


MPNET = FamilySpec(
    model_type="mpnet",
    model_class="MPNetForMaskedLM",
    backbone=MPNetBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.mpnet.encoder.layer,
    embedding=lambda model: model.mpnet.embeddings,
    head=lambda model: model.lm_head,
    positions=lambda config: int(
        config.max_position_embeddings - 2
    ),  # they count from the padding token's id, 1
    tiny=bert_shape(3, 64, 4, 1000, 130),
    shapes={"mpnet-base": bert_shape(12, 768, 12, 30527, 514)},
)
