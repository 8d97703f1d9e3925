"""The files that people have: GGUF, sharded safetensors, half precision."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from tiny_backbones import save_tokenizer, tiny_model

from bbt_accel import export_bundle
from bbt_accel.core.bundle import Architecture
from bbt_accel.errors import ExportError, MissingDependency
from bbt_accel.exporters.families import loading
from bbt_accel.exporters.families.checkpoint import check_attention, check_config
from bbt_accel.exporters.families.llama import LLAMA, MISTRAL, PHI3, QWEN2
from bbt_accel.exporters.families.modernbert import MODERNBERT
from bbt_accel.exporters.trace import export, validate

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _validate_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "validated", validate.validate)


def test_a_sharded_checkpoint_becomes_one_file(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama", max_shard_size="8KB")
    save_tokenizer("llama", tmp_path / "llama")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    bundle = export_bundle(tmp_path / "llama", tmp_path / "bundle", n_prompt_tokens=3)
    assert [file.name for file in bundle.path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_in_half_precision_is_exported_in_fp32(tmp_path: Path, dtype: str) -> None:
    model = tiny_model("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "llama")
    save_tokenizer("llama", tmp_path / "llama")
    bundle = export_bundle(tmp_path / "llama", tmp_path / "bundle", n_prompt_tokens=3)
    assert bundle.info.max_error is not None
    assert bundle.info.max_error < 1e-4
    exported: Any = loading.load_model(bundle.path)
    exported = exported.get_input_embeddings().weight
    assert exported.dtype == torch.float32
    assert torch.equal(exported, model.get_input_embeddings().weight.float())


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "llama")
    save_tokenizer("llama", tmp_path / "llama")
    bundle = export_bundle(tmp_path / "llama", tmp_path / "bundle", n_prompt_tokens=3)
    weights = bundle.path / "weights.data"
    assert not weights.exists() or weights.stat().st_size < 320 * 16 * 4


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    tiny_model("llama").save_pretrained(folder, max_shard_size="8KB")
    save_tokenizer("llama", folder)
    return folder


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "checkpoint")


def refused(checkpoint: Path, complaint: str) -> None:
    with pytest.raises(ExportError, match=complaint) as caught:
        export_bundle(checkpoint, checkpoint.with_name("bundle"), n_prompt_tokens=3)
    assert "\n" not in str(caught.value)
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", 3, None]
)
def test_an_index_that_names_files_elsewhere_is_refused(checkpoint: Path, shard: object) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = shard
    index.write_text(json.dumps(content))
    refused(checkpoint, "which is not a file of its folder")


def test_an_adapter_is_neither_loaded_nor_left_out(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, "export the model it is merged into")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    refused(checkpoint, "is not an index of weights")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**7), ("num_hidden_layers", "2"), ("num_hidden_layers", 0),
        ("hidden_size", 2**40), ("vocab_size", -5), ("vocab_size", 1.5), ("num_attention_heads",
        True),
        ("max_position_embeddings", [9]), ("rope_parameters", "x"), ("hidden_act",
        "no such function"),
        ("model_type", 7), ("rms_norm_eps", {}), ("num_key_value_heads", 3), ("head_dim", -1),
    ],
)  # fmt: skip
def test_a_configuration_of_nonsense_is_one_line(
    checkpoint: Path, name: str, value: object
) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    refused(checkpoint, re.escape(str(checkpoint)))


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_whose_weights_transformers_leaves_out_are_refused(kind: str) -> None:
    check_config("checkpoint", SimpleNamespace(position_embedding_type="absolute"))
    with pytest.raises(
        ExportError, match=f"has '{kind}' positions; only absolute ones are supported"
    ):
        check_config("checkpoint", SimpleNamespace(position_embedding_type=kind))


def test_other_names_of_positions_mean_none() -> None:
    check_config("mmBERT", SimpleNamespace(position_embedding_type="sans_pos"))


@pytest.mark.parametrize(
    ("architecture", "trait"),
    [("encoder", {"is_decoder": True}), ("decoder", {"is_causal": False})],
)
def test_attention_of_another_architecture_is_refused(
    architecture: Architecture, trait: dict[str, bool]
) -> None:
    check_attention("checkpoint", SimpleNamespace(is_decoder=False, is_causal=True), architecture)
    with pytest.raises(
        ExportError,
        match=f"config.json has {next(iter(trait))} .* not supported for {architecture}s",
    ):
        check_attention("checkpoint", SimpleNamespace(**trait), architecture)


def test_weights_that_the_configuration_has_no_place_for_are_refused(tmp_path: Path) -> None:
    tiny_model("llama", attention_bias=True).save_pretrained(tmp_path / "llama")
    save_tokenizer("llama", tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_bias": False}))
    refused(
        tmp_path / "llama",
        r"has model\.layers\.0\.self_attn\..*\.bias, for which its config\.json has no place",
    )


def test_poolers_other_heads_and_further_blocks_may_be_left_out(tmp_path: Path) -> None:
    tiny_model("bert", "BertForPreTraining", num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    model: Any = loading.load_model(tmp_path)
    assert len(model.bert.encoder.layer) == 1


def test_what_a_configuration_wants_to_be_returned_does_not_matter(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    content = json.loads(file.read_text()) | {"return_dict": False, "output_hidden_states": True}
    file.write_text(json.dumps(content))
    found = loading.load_model(checkpoint)(torch.tensor([[0, 5]]))
    assert found.logits.shape == (1, 2, 320)
    assert found.hidden_states is None


def test_rows_of_modernbert_end_where_its_frequencies_would_change() -> None:
    rope = {
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default"},
    }
    assert (
        MODERNBERT.positions(SimpleNamespace(max_position_embeddings=256, rope_parameters=rope))
        == 64
    )


def test_a_window_that_the_class_does_not_use_bounds_nothing() -> None:
    rope = {"rope_type": "default"}
    config = SimpleNamespace(max_position_embeddings=4096, sliding_window=64, rope_parameters=rope)
    assert (LLAMA.positions(config), MISTRAL.positions(config)) == (4096, 64)


def test_a_window_that_every_layer_has_bounds_the_rows_whatever_layer_types_says() -> None:
    rope = {"rope_type": "default"}
    config = SimpleNamespace(
        max_position_embeddings=4096,
        sliding_window=64,
        layer_types=["full_attention"] * 2,
        rope_parameters=rope,
    )
    assert (MISTRAL.positions(config), PHI3.positions(config), QWEN2.positions(config)) == (
        64,
        64,
        4096,
    )


@pytest.mark.parametrize(
    "size", ["inner_group_num", "num_hidden_groups", "encoder_attention_heads", "type_vocab_size"]
)
def test_a_size_that_no_checkpoint_has_is_refused_before_anything_is_made(size: str) -> None:
    with pytest.raises(ExportError, match=f"config.json has {size} 100000000; it must lie in 1"):
        check_config("checkpoint", SimpleNamespace(**{size: 10**8}))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b""), ("config.json", b"[]"), ("config.json", b"[" * 100_000),
        ("config.json", b"\xff"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\0" * 9),
        ("tokenizer_config.json", b"[1]"),
        ("model-00001-of-00009.safetensors", b"\xff" * 64),
        ("pytorch_model.bin", b"cos\nsystem\n(S'ls'\ntR."),
    ],
)  # fmt: skip
def test_a_file_of_nonsense_is_one_line(checkpoint: Path, file: str, content: bytes) -> None:
    if file == "pytorch_model.bin":
        for weights in checkpoint.glob("model*"):
            weights.unlink()
    elif file.startswith("model"):
        file = min(checkpoint.glob("*.safetensors")).name
    (checkpoint / file).write_bytes(content)
    refused(checkpoint, re.escape(str(checkpoint)))


# GGUF


def write_gguf(file: Path) -> dict[str, np.ndarray]:
    """A tiny Llama as llama.cpp's converter writes it; returns its tensors."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    rng = np.random.default_rng(0)
    hidden, heads, shared, inner, vocabulary = 32, 4, 2, 64, 300
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    bytes_ = [chr(c) for c in range(33, 127)]
    tokens = ["<s>", "</s>", "<unk>", "Ġ", *bytes_, *(f"Ġ{c}" for c in bytes_)]
    tokens += [f"filler{i}" for i in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocabulary - 3))
    writer.add_token_merges([f"Ġ {c}" for c in bytes_])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    kv = shared * hidden // heads
    shapes = {
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
        "output_norm": (hidden,),
    }
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_{name}": (size, hidden)
            for name, size in (("q", hidden), ("k", kv), ("v", kv))
        }
        shapes |= {f"blk.{i}.attn_output": (hidden, hidden), f"blk.{i}.ffn_down": (hidden, inner)}
        shapes |= {f"blk.{i}.ffn_{name}": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.{name}_norm": (hidden,) for name in ("attn", "ffn")}
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return tensors


def test_a_gguf_file_is_exported_with_its_tokenizer(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    bundle = export_bundle(tmp_path / "tiny.gguf", tmp_path / "bundle", n_prompt_tokens=3)
    assert (bundle.info.family, bundle.info.vocab_size) == ("llama", 300)
    assert (bundle.info.backbone, bundle.info.license) == (str(tmp_path / "tiny.gguf"), "mit")
    weight = loading.load_model(bundle.path).get_input_embeddings().weight  # type: ignore[operator]
    np.testing.assert_array_equal(weight.numpy(), tensors["token_embd"])


@pytest.mark.parametrize("size", [0, 10, 200, 5000, 100_000])
def test_a_truncated_gguf_file_is_refused_in_one_line(tmp_path: Path, size: int) -> None:
    write_gguf(tmp_path / "whole.gguf")
    (tmp_path / "part.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:size])
    with pytest.raises(ExportError, match=r"cannot load .*part\.gguf \(") as caught:
        export_bundle(tmp_path / "part.gguf", tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_gguf_file_or_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("gguf"):
        with pytest.raises(ExportError, match=r"there is no file .*none\.gguf"):
            export_bundle(tmp_path / "none.gguf", tmp_path / "bundle")
    monkeypatch.setattr(loading, "installed", lambda name: None)
    with pytest.raises(MissingDependency, match=r'pip install "bbt-accel\[gguf\]"'):
        export_bundle(tmp_path / "none.gguf", tmp_path / "bundle")
