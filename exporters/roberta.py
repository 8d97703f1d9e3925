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

    def head(self, x: Tensor) -> Tensor:
        lm_head = self.model.lm_head
        return lm_head.layer_norm(F.gelu(lm_head.dense(x)))

    def vocabulary(self) -> tuple[Tensor, Tensor]:
        decoder = self.model.lm_head.decoder
        return decoder.weight, decoder.bias
