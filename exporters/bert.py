"""BERT, ELECTRA generators and (in roberta.py) RoBERTa: masked LMs whose blocks normalise after the residual."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bbt_accel.exporters.backbone import Backbone, attend


class BertBackbone(Backbone):
    """BertForMaskedLM."""

    family = "bert"

    @property
    def base(self) -> object:
        return self.model.bert

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.base.embeddings(input_ids=input_ids)  # type: ignore[attr-defined, no-any-return]

    def block(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        layer = self.base.encoder.layer[i]  # type: ignore[attr-defined]
        own = layer.attention.self
        context = attend(own.query(query), own.key(x), own.value(x), own.num_attention_heads, bias)
        y = layer.attention.output(context, query)
        return layer.output(layer.intermediate(y), y)  # type: ignore[no-any-return]

    def head(self, x: Tensor, label_token_ids: Tensor) -> Tensor:
        predictions = self.model.cls.predictions
        decoder = predictions.decoder
        return F.linear(predictions.transform(x), decoder.weight[label_token_ids], decoder.bias[label_token_ids])


class ElectraBackbone(BertBackbone):
    """ElectraForMaskedLM: the generator. The prompt is added after the projection to the hidden size."""

    @property
    def base(self) -> object:
        return self.model.electra

    def tokens(self, input_ids: Tensor) -> Tensor:
        embedded = super().tokens(input_ids)
        projected = hasattr(self.model.electra, "embeddings_project")
        return self.model.electra.embeddings_project(embedded) if projected else embedded  # type: ignore[no-any-return]

    def head(self, x: Tensor, label_token_ids: Tensor) -> Tensor:
        decoder = self.model.generator_lm_head
        x = self.model.generator_predictions(x)
        return F.linear(x, decoder.weight[label_token_ids], decoder.bias[label_token_ids])
