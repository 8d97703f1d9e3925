from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from bbt_accel.benchmarks import make_backbone as module
from bbt_accel.benchmarks.make_backbone import SHAPES, make_backbone
from bbt_accel.errors import DataError, UsageError
from bbt_accel.exporters.export import special_tokens
from bbt_accel.exporters.families import load_config, load_model, load_tokenizer

TINY: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "bart": module.bart(16, 1, 2),
    "t5": module.t5(16, 32, 1, 2),
    "gpt2": module.gpt2(16, 1, 2),
}


@pytest.mark.parametrize("shape", ["roberta-base", "bert-base", "bart-base", "t5-small", "gpt2"])
def test_loads_as_a_checkpoint(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SHAPES[shape]["model_type"]
    size = SHAPES[shape]["vocab_size"]
    monkeypatch.setitem(SHAPES, shape, SHAPES[shape] | TINY[family] | {"vocab_size": size})
    make_backbone(shape, tmp_path / "made")
    assert load_config(tmp_path / "made").vocab_size == size
    load_model(tmp_path / "made")
    special = special_tokens(load_config(tmp_path / "made"), load_tokenizer(tmp_path / "made"), family)
    assert (special.mask is None) == (family == "gpt2")
    assert special.pad == 0


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean roberta-base"):
        make_backbone("roberta-bose", tmp_path / "made")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        make_backbone("gpt2", tmp_path / "made", tokenizer=tmp_path)
