"""The families that can be exported."""

from __future__ import annotations

from functools import cache
from typing import Any

from bbt_accel.core.plugins import with_plugins
from bbt_accel.errors import ExportError
from bbt_accel.exporters.families.albert import ALBERT
from bbt_accel.exporters.families.bart import BART
from bbt_accel.exporters.families.bert import BERT, CAMEMBERT, ELECTRA, ROBERTA, XLM_ROBERTA
from bbt_accel.exporters.families.distilbert import DISTILBERT
from bbt_accel.exporters.families.family import FamilySpec
from bbt_accel.exporters.families.gpt2 import GPT2
from bbt_accel.exporters.families.gpt_neox import GPT_NEOX
from bbt_accel.exporters.families.llama import (
    EUROBERT,
    GEMMA3,
    LLAMA,
    MISTRAL,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from bbt_accel.exporters.families.modernbert import MODERNBERT
from bbt_accel.exporters.families.mpnet import MPNET
from bbt_accel.exporters.families.t5 import MT5, T5

FAMILIES = (
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
    BERT,
    DISTILBERT,
    ALBERT,
    MPNET,
    ELECTRA,
    MODERNBERT,
    EUROBERT,
    BART,
    T5,
    MT5,
    GPT2,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    OLMO2,
    PHI3,
    GEMMA3,
)
GROUP = "bbt_accel.families"
"""The entry-point group by which installed packages add a `FamilySpec`."""


@cache
def families() -> dict[str, FamilySpec]:
    """Every family by its `model_type`: the built-in ones, then those of installed packages."""
    return with_plugins(FAMILIES, GROUP, FamilySpec, "model_type")


def family_of(config: Any) -> FamilySpec:
    """The family of a loaded configuration. Raises ExportError for an unsupported one."""
    if config.model_type not in families():
        raise ExportError(
            f"{config.model_type} models are not supported; supported are {', '.join(families())}"
        )
    return families()[config.model_type]
