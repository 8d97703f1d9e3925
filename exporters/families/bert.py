"""BERT, RoBERTa and its multilingual kin, and ELECTRA's generator: masked LMs that normalize after
the residual.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bbt_accel.exporters.families.backbone import Backbone, at, attend
from bbt_accel.exporters.families.family import FamilySpec, sizes


class BertBackbone(Backbone):
    """BertForMaskedLM. Families with the same computation override where its modules are."""

    @property
    def base(self) -> Any:
        return self.model.bert

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.base.embeddings(input_ids=input_ids)

    def projections(self, i: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The linear layers of block i for queries, keys and values."""
        own = self.base.encoder.layer[i].attention.self
        return own.query, own.key, own.value

    def mix(self, i: int, query: Tensor, context: Tensor) -> Tensor:
        """Block i from the weighted values on: the output projection and the feed-forward, each
        with its norm.
        """
        layer = self.base.encoder.layer[i]
        y = layer.attention.output(context, query)
        return layer.output(layer.intermediate(y), y)

    def block(self, i: int, x: Tensor, bias: Tensor, position: Tensor | None = None) -> Tensor:
        (query, key, value), asked = self.projections(i), at(x, position)
        return self.mix(i, asked, attend(query(asked), key(x), value(x), self.heads, bias))

    @property
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    def first_block(self, prompts: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Queries, keys and values are linear in the block's input, W(t + p) + b = (W t + b) + W p.

        The first term is computed once per row and the second once per candidate, instead of both
        for each pair.
        """

        def both(linear: nn.Linear) -> Tensor:
            of_prompts = self.spread(F.linear(prompts, linear.weight), tokens.shape[1])
            return (linear(tokens)[None] + of_prompts).flatten(0, 1)

        query, key, value = map(both, self.projections(0))
        return self.mix(0, self.join(prompts, tokens), attend(query, key, value, self.heads, bias))

    def head(self, x: Tensor) -> Tensor:
        return self.model.cls.predictions.transform(x)

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.cls.predictions.decoder
        return decoder.weight, decoder.bias


class RobertaBackbone(BertBackbone):
    """RobertaForMaskedLM."""

    @property
    def base(self) -> Any:
        return self.model.roberta

    def head(self, x: Tensor) -> Tensor:
        lm_head = self.model.lm_head
        return lm_head.layer_norm(F.gelu(lm_head.dense(x)))

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.lm_head.decoder
        return decoder.weight, decoder.bias


class ElectraBackbone(BertBackbone):
    """ElectraForMaskedLM: the generator. The prompt is added after the projection to the hidden
    size.
    """

    @property
    def base(self) -> Any:
        return self.model.electra

    def tokens(self, input_ids: Tensor) -> Tensor:
        embedded = super().tokens(input_ids)
        projection = getattr(self.model.electra, "embeddings_project", None)
        return embedded if projection is None else projection(embedded)

    def head(self, x: Tensor) -> Tensor:
        return self.model.generator_predictions(x)

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.generator_lm_head
        return decoder.weight, decoder.bias


def bert_shape(
    layers: int, hidden: int, heads: int, vocabulary: int, positions: int, **more: Any
) -> dict[str, Any]:
    """BERT's proportions: the feed-forward is four times as wide as the hidden states."""
    return sizes(
        layers, hidden, heads, 4 * hidden, vocabulary, max_position_embeddings=positions, **more
    )


BERT = FamilySpec(
    model_type="bert",
    model_class="BertForMaskedLM",
    backbone=BertBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.bert.encoder.layer,
    embedding=lambda model: model.bert.embeddings,
    head=lambda model: model.cls,
    tiny=bert_shape(3, 64, 4, 1000, 128),
    shapes={
        "bert-small": bert_shape(4, 512, 8, 30522, 512),
        "bert-base": bert_shape(12, 768, 12, 30522, 512),
        "bert-large": bert_shape(24, 1024, 16, 30522, 512),
    },
)
ROBERTA = FamilySpec(
    model_type="roberta",
    model_class="RobertaForMaskedLM",
    backbone=RobertaBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.roberta.encoder.layer,
    embedding=lambda model: model.roberta.embeddings,
    head=lambda model: model.lm_head,
    # Positions count from the id of the padding token.
    positions=lambda config: int(config.max_position_embeddings - config.pad_token_id - 1),
    tiny=bert_shape(3, 64, 4, 1000, 130, type_vocab_size=1),
    shapes={
        "roberta-base": bert_shape(12, 768, 12, 50265, 514, type_vocab_size=1, layer_norm_eps=1e-5),
        "roberta-large": bert_shape(
            24, 1024, 16, 50265, 514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
    },
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    model_class="XLMRobertaForMaskedLM",
    shapes={
        "xlm-roberta-base": bert_shape(
            12, 768, 12, 250002, 514, type_vocab_size=1, layer_norm_eps=1e-5
        )
    },
)
CAMEMBERT = replace(ROBERTA, model_type="camembert", model_class="CamembertForMaskedLM", shapes={})
ELECTRA = FamilySpec(
    model_type="electra",
    model_class="ElectraForMaskedLM",
    backbone=ElectraBackbone,
    architecture="encoder",
    template_group="masked",
    blocks=lambda model: model.electra.encoder.layer,
    embedding=lambda model: getattr(model.electra, "embeddings_project", model.electra.embeddings),
    head=lambda model: model.generator_predictions,
    tiny=bert_shape(3, 64, 4, 1000, 128, embedding_size=32),
)
