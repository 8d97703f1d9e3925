"""DistilBERT: half of BERT's blocks, under other names, and no segment embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bbt_accel.exporters.families.bert import BertBackbone
from bbt_accel.exporters.families.family import FamilySpec


class DistilBertBackbone(BertBackbone):
    """DistilBertForMaskedLM."""

    @property
    def base(self) -> Any:
        return self.model.distilbert

    def projections(self, i: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        own = self.base.transformer.layer[i].attention
        return own.q_lin, own.k_lin, own.v_lin

    def mix(self, i: int, query: Tensor, context: Tensor) -> Tensor:
        layer = self.base.transformer.layer[i]
        y = layer.sa_layer_norm(layer.attention.out_lin(context) + query)
        return layer.output_layer_norm(layer.ffn(y) + y)

    def head(self, x: Tensor) -> Tensor:
        return self.model.vocab_layer_norm(self.model.activation(self.model.vocab_transform(x)))

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.vocab_projector
        return decoder.weight, decoder.bias


def _shape(layers: int, hidden: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "dim": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "hidden_dim": 4 * hidden,
    }


DISTILBERT = FamilySpec(
    model_type="distilbert",
    model_class="DistilBertForMaskedLM",
    backbone=DistilBertBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.distilbert.transformer.layer,
    embedding=lambda model: model.distilbert.embeddings,
    head=lambda model: model.vocab_transform,
    tiny=_shape(3, 64, 4, 1000) | {"max_position_embeddings": 128},
    shapes={"distilbert-base": _shape(6, 768, 12, 30522)},
)
