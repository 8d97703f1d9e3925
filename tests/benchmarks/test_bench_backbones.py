"""Backbones of published shapes with random weights, to measure speed with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.errors import DataError, UsageError
from bbt_accel.exporters.families import registry as module
from bbt_accel.exporters.families.loading import load_config, load_model, load_tokenizer
from bbt_accel.exporters.families.registry import families
from bbt_accel.exporters.trace.export import special_tokens


@pytest.mark.parametrize("model_type", families())
def test_a_shape_loads_as_a_checkpoint(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = families()[model_type]
    size = 9000  # the shipped tokenizer has fewer tokens
    small = replace(spec, shapes={"small": spec.tiny | {"vocab_size": size}})
    monkeypatch.setattr(module, "families", lambda: families() | {model_type: small})
    make_backbone("small", tmp_path / "made")
    assert load_config(tmp_path / "made").vocab_size == size
    load_model(tmp_path / "made")
    special = special_tokens(
        load_config(tmp_path / "made"), load_tokenizer(tmp_path / "made"), spec
    )
    assert (special.mask is None) == (spec.template_group == "causal")
    assert special.pad == 0


@pytest.mark.parametrize("model_type", families())
def test_a_tiny_backbone_has_the_vocabulary_of_its_tokenizer(
    model_type: str, tmp_path: Path
) -> None:
    make_backbone(f"tiny-{model_type}", tmp_path / "tiny")
    assert load_config(tmp_path / "tiny").vocab_size == len(load_tokenizer(tmp_path / "tiny"))


def test_the_shapes_of_common_checkpoints_are_known() -> None:
    shapes = {name for spec in families().values() for name in spec.shapes}
    assert {
        "roberta-base",
        "roberta-large",
        "bert-small",
        "bart-large",
        "t5-small",
        "gpt2",
    } <= shapes


def test_an_unknown_shape_and_a_folder_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean roberta-base"):
        make_backbone("roberta-bose", tmp_path / "made")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        make_backbone("gpt2", tmp_path / "made", tokenizer=tmp_path)
