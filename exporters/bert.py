"""BERT, ELECTRA generators and (in roberta.py) RoBERTa: masked LMs whose blocks normalise after the residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bbt_accel.exporters.backbone import Backbone, attend


class BertBackbone(Backbone):
    """BertForMaskedLM."""

    family = "bert"

    @property
    def base(self) -> Any:
        return self.model.bert

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.base.embeddings(input_ids=input_ids)

    def block(self, i: int, query: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        own = self.base.encoder.layer[i].attention.self
        return self.mix(i, query, own.query(query), own.key(x), own.value(x), bias)

    def first_block(self, prompts: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Queries, keys and values are linear in the block's input, W(t + p) + b = (W t + b) + W p.

        The first term is computed once a row and the second once a candidate, instead of both for each pair.
        """
        own, length = self.base.encoder.layer[0].attention.self, tokens.shape[1]

        def both(linear: nn.Linear) -> Tensor:
            of_prompts = self.spread(F.linear(prompts, linear.weight), length)
            return (linear(tokens)[None] + of_prompts).flatten(0, 1)

        return self.mix(0, self.join(prompts, tokens), both(own.query), both(own.key), both(own.value), bias)

    def mix(self, i: int, query: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Block i behind its projections."""
        layer = self.base.encoder.layer[i]
        y = layer.attention.output(attend(q, k, v, layer.attention.self.num_attention_heads, bias), query)
        return layer.output(layer.intermediate(y), y)

    def head(self, x: Tensor) -> Tensor:
        return self.model.cls.predictions.transform(x)

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.cls.predictions.decoder
        return decoder.weight, decoder.bias


class ElectraBackbone(BertBackbone):
    """ElectraForMaskedLM: the generator. The prompt is added after the projection to the hidden size."""

    @property
    def base(self) -> Any:
        return self.model.electra

    def tokens(self, input_ids: Tensor) -> Tensor:
        embedded = super().tokens(input_ids)
        projected = hasattr(self.model.electra, "embeddings_project")
        return self.model.electra.embeddings_project(embedded) if projected else embedded

    def head(self, x: Tensor) -> Tensor:
        return self.model.generator_predictions(x)

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.generator_lm_head
        return decoder.weight, decoder.bias
