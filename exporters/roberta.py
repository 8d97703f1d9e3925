"""RoBERTa: BERT's blocks, with its own embeddings and head."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bbt_accel.exporters.bert import BertBackbone


class RobertaBackbone(BertBackbone):
    """RobertaForMaskedLM."""

    family = "roberta"

    @property
    def base(self) -> Any:
        return self.model.roberta

    def head(self, x: Tensor, label_token_ids: Tensor) -> Tensor:
        lm_head = self.model.lm_head
        x = lm_head.layer_norm(F.gelu(lm_head.dense(x)))
        return F.linear(x, lm_head.decoder.weight[label_token_ids], lm_head.decoder.bias[label_token_ids])
