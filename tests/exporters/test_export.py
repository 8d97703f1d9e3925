"""What an export writes, what it refuses, and that it leaves nothing behind when it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import onnx_ir
import torch
import transformers
from conftest import Export
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tiny_backbones import POSITIONS, VOCABULARY, save_backbone, save_tokenizer, tiny_model
from tiny_bundles import FAMILIES
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bbt_accel import Bundle, export_bundle
from bbt_accel.errors import BbtError, BundleError, ExportError, UsageError
from bbt_accel.exporters.families.loading import load_model, load_tokenizer
from bbt_accel.exporters.families.registry import family_of
from bbt_accel.exporters.trace import export, graph, sessions, validate
from bbt_accel.io.files import sha256

SIZE = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Weights that outweigh the graphs, as those of a real backbone do."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone("bert", tmp_path_factory.mktemp("checkpoint") / "bert")


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the export of `whole` told of its progress."""
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> tuple[Path, Bundle]:
    """A checkpoint, and its bundle as a user gets it: checked in a process of its own."""
    root = tmp_path_factory.mktemp("whole")
    source = save_backbone("bert", root / "source", vocab_size=4000, **SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "validated", VALIDATED)
        options: dict[str, Any] = {"method": "bbtv2", "n_prompt_tokens": 4}
        return source, export_bundle(
            source, root / "bundle", **options, on_progress=lambda what, *_: told.append(what)
        )


VALIDATED = export.validated
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Export what cannot be exported: returns the message, one line; the folder is as it was
    before.
    """
    monkeypatch.setattr(export, "validated", VALIDATED)

    def call(
        error: type[BaseException], backbone: str | Path, output: str = "bundle", **options: Any
    ) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error) as caught:
            export_bundle(backbone, tmp_path / output, **{"n_prompt_tokens": 3, **options})
        assert sorted(tmp_path.iterdir()) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


# What is written


def test_a_bundle_says_what_it_holds(whole: tuple[Path, Bundle]) -> None:
    source, bundle = whole
    info = Bundle.read(bundle.path).info
    model = transformers.BertForMaskedLM.from_pretrained(source)
    assert (info.format, info.family, info.method, info.prompt_mode) == (4, "bert", "bbtv2", "add")
    assert (info.backbone, info.revision) == (str(source), None)
    assert (info.n_prompt_tokens, info.hidden_size, info.n_layers) == (4, 96, 2)
    assert (info.vocab_size, info.max_length) == (4000, POSITIONS)
    assert (info.precision, info.target, info.source) == ("fp32", "onnx", None)
    assert info.prompt_shape == (2, 4, 96)
    assert info.stages == ["embed", "block_00", "last"]
    assert {"torch", "transformers", "onnx"} <= set(info.versions)
    assert info.special.model_dump() == {
        "begin": 2, "end": 3, "pad": 0, "mask": 4, "mask_text": "[MASK]", "decoder_start": None,
    }  # fmt: skip
    std = model.get_input_embeddings().weight.detach().numpy().std(dtype=np.float64)
    assert info.word_embedding_std == pytest.approx(std, rel=1e-6)


def test_an_export_is_measured_against_eager_pytorch(whole: tuple[Path, Bundle]) -> None:
    error = whole[1].info.max_error
    assert error is not None
    assert 0 < error < 1e-5


def test_a_backbone_that_cannot_be_traced_is_one_line_with_the_reason(
    checkpoint: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, *inputs: object) -> None:
        raise ValueError("an operator of its own")

    monkeypatch.setattr(graph.Traced, "forward", broken)
    assert (
        refuse(ExportError, checkpoint)
        == f"cannot trace {checkpoint} (ValueError: an operator of its own)"
    )


@pytest.mark.parametrize(
    ("owner", "function", "options"),
    [
        (transformers.PreTrainedModel, "save_pretrained", {}),
        (export, "save_file", {"prompt_mode": "cat", "prompt_init": "a"}),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_line(
    whole: tuple[Path, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    function: str,
    options: dict[str, Any],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(owner, function, full)
    with pytest.raises(
        ExportError, match=r"cannot write .*No space left.*; free some space"
    ) as caught:
        export_bundle(whole[0], tmp_path / "bundle", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_a_bundle_is_hashed(whole: tuple[Path, Bundle]) -> None:
    files = {p.name for p in whole[1].path.iterdir()} - {"bundle.json"}
    assert set(whole[1].info.sha256) == files
    graphs = {"embed.onnx", "block_00.onnx", "last.onnx", "project.onnx", "statistics.onnx"}
    assert files == {*graphs, "model.safetensors", "tokenizer.json", "config.json"}


def test_weights_are_written_once(whole: tuple[Path, Bundle]) -> None:
    source, bundle = whole
    assert bundle.size < 1.35 * (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "method", "mode"),
    [("roberta", "bbt", "add"), ("t5", "bbtv2", "add"), ("gpt2", "bbtv2", "add")],
)
def test_weights_lie_outside_the_graphs_in_the_checkpoints_file(
    tiny: Export, name: str, method: str, mode: str
) -> None:
    """A graph file is bounded to 2 GB; backbones are not."""
    bundle = tiny(name, method, mode)
    for stage in bundle.info.stages:
        model = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False)
        outside = 0
        for tensor in model.graph.initializer:
            places = {entry.key: entry.value for entry in tensor.external_data}
            assert places.get("location", "model.safetensors") == "model.safetensors"
            assert places or len(tensor.raw_data) <= graph.SMALL, tensor.name
            outside += bool(places)
        assert outside
    assert not list(bundle.path.glob("*.data"))


def shapes(values: Any) -> dict[str, list[str | int]]:
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


def test_the_axes_of_a_bbt_graph_are_open_and_named(tiny: Export) -> None:
    bundle = tiny("roberta", "bbt", "add")
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    assert shapes(model.graph.input) == {
        "prompts": ["candidates", 3, 16],
        "input_ids": ["rows", "tokens"],
        "attention_mask": ["rows", "tokens"],
        "readout": ["rows"],
        "label_token_ids": ["labels"],
    }
    assert shapes(model.graph.output) == {
        "label_logits": ["candidates", "rows", "labels"],
        "readout_state": ["candidates", "rows", 16],
        "mean_state": ["candidates", "rows", 16],
    }
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}


def test_the_stages_of_a_bbtv2_bundle_fit_together(tiny: Export) -> None:
    bundle = tiny("gpt2", "bbtv2", "add")
    outputs: set[str] = set()
    for stage in bundle.info.stages:
        model = onnx.load(bundle.path / f"{stage}.onnx", load_external_data=False)
        states = {name for name in shapes(model.graph.input) if name in ("hidden", "prefix")}
        assert states == outputs
        if stage == "context":  # read by every later stage
            continue
        outputs = {name.removesuffix("_out") for name in shapes(model.graph.output)}
    assert outputs == {"label_logits", "readout_state", "mean_state"}


@pytest.mark.slow
def test_gpt_neox_with_the_feed_forward_behind_the_attention(
    exported: Export, tmp_path: Path
) -> None:
    """The export compares it with transformers' own forward; Pythia has both side by side."""
    backbone = save_backbone("gpt_neox", tmp_path / "serial", use_parallel_residual=False)
    assert exported(backbone, "bbt", "cat", 3).info.max_error < 1e-5


@pytest.mark.usefixtures("whole")
def test_progress_is_told(told: list[str]) -> None:
    assert told == [
        "loading the checkpoint", *(f"tracing {stage}" for stage in ("embed", "block_00", "last")),
        "validating against eager PyTorch",
    ]  # fmt: skip


# What is refused


def test_a_saving_that_is_no_part_of_the_graphs_is_refused(refuse: Refuse) -> None:
    assert "in tune and bench" in refuse(UsageError, "demo", without=["last-block", "buckets"])


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("roberta", "RobertaModel"),
        ("roberta", "RobertaForSequenceClassification"),
        ("bert", "BertForSequenceClassification"),
        ("electra", "ElectraForPreTraining"),
        ("t5", "T5EncoderModel"),
    ],
)
def test_a_checkpoint_without_its_lm_head_is_refused_by_name(
    refuse: Refuse, tmp_path: Path, name: str, cls: str
) -> None:
    message = refuse(ExportError, save_backbone(name, tmp_path / "source", cls))
    assert cls in message
    assert "head" in message


@pytest.mark.parametrize("config", ["DebertaV2Config", "OPTConfig"])
def test_a_foreign_model_type_is_refused_with_those_that_are_not(
    refuse: Refuse, tmp_path: Path, config: str
) -> None:
    foreign = getattr(transformers, config)()
    foreign.save_pretrained(tmp_path / "source")
    message = refuse(ExportError, tmp_path / "source")
    assert foreign.model_type in message
    assert "roberta, xlm-roberta, camembert, bert" in message


@pytest.mark.parametrize("kind", ["foo", "bert"])
def test_code_of_a_checkpoint_is_never_run(
    refuse: Refuse, checkpoint: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    own = {
        "AutoConfig": "own.Own",
        "AutoModelForMaskedLM": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        facts = json.loads((source / name).read_text()) | {"auto_map": own}
        kinds = {"model_type": kind} if name == "config.json" and kind == "foo" else {}
        (source / name).write_text(json.dumps(facts | kinds))
    (source / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to transformers' question
    if kind == "foo":
        refuse(ExportError, source)
    else:
        load_model(source)
        load_tokenizer(source)
    assert not (tmp_path / "run").exists()


def test_a_pickle_is_not_loaded(refuse: Refuse, checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert "there is no model.safetensors, and pickles are not read" in refuse(ExportError, source)


def test_an_embedding_that_is_scaled_gives_the_scale_of_prompts() -> None:
    config = transformers.BartConfig(
        d_model=64, vocab_size=50, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, scale_embedding=True,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).requires_grad_(False)
    entering = model.get_input_embeddings()(torch.arange(50)).std(correction=0)
    assert export.embedding_std(model) == pytest.approx(float(entering), rel=1e-5)


def test_a_decoder_whose_first_token_is_not_known_is_refused() -> None:
    config = transformers.T5Config(vocab_size=9)
    if hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = None
    with pytest.raises(ExportError, match="no decoder_start_token_id"):
        export.special_tokens(config, MagicMock(), family_of(config))


@pytest.mark.parametrize("backbone", ["no/such/folder", "nobody/no-such-model"])
def test_a_checkpoint_that_is_not_there_is_named(refuse: Refuse, backbone: str) -> None:
    assert backbone in refuse(ExportError, backbone)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "other shapes", "config"])
def test_a_damaged_checkpoint_is_refused(
    refuse: Refuse, checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    weights, config = source / "model.safetensors", source / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "other shapes":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 32}))
    else:
        config.write_text("{")
    assert str(source) in refuse(ExportError, source)


def test_a_tokenizer_without_a_mask_token_is_refused(
    refuse: Refuse, checkpoint: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), unk_token="[UNK]", pad_token="[PAD]"
    )
    plain.save_pretrained(source)
    assert "no mask token" in refuse(ExportError, source)


def test_a_checkpoint_without_a_tokenizer_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "source")
    assert "tokenizer" in refuse(ExportError, tmp_path / "source")


@pytest.mark.parametrize("filled", [True, False])
def test_an_existing_output_is_left_alone(
    refuse: Refuse, checkpoint: Path, tmp_path: Path, filled: bool
) -> None:
    (tmp_path / "bundle").mkdir()
    if filled:
        (tmp_path / "bundle" / "mine").write_text("kept")
    assert "exists already" in refuse(BbtError, checkpoint)
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["mine"] * filled


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "bbtv2", "prompt_mode": "cat"}, "--prompt-mode add"),
        ({"method": "bbtv3"}, "did you mean bbtv2?"),
        ({"prompt_mode": "prefix"}, "choose from add, cat"),
        ({"n_prompt_tokens": 0}, "at least 1"),
        ({"revision": "main"}, "for a checkpoint on the hub"),
        ({"n_prompt_tokens": POSITIONS}, "no room"),
        ({"n_prompt_tokens": POSITIONS + 100, "prompt_mode": "cat"}, "no room"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(
    refuse: Refuse, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    source = save_backbone("gpt2", tmp_path / "source")
    assert says in refuse(UsageError, source, **options)


# What a failure leaves behind: `refuse` looks for it


def test_graphs_that_compute_something_else_are_not_kept(
    tiny: Export, refuse: Refuse, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is not traced again, but read from a bundle that has the same weights."""
    right = tiny("bert").path

    def wrong(stage: graph.Stage, backbone: object) -> onnx_ir.Model:
        model = onnx_ir.load(right / f"{stage.name}.onnx")
        weights: list[Any] = list(model.graph.initializers.values())
        value = max(weights, key=lambda value: value.const_value.nbytes)
        value.const_value = onnx_ir.tensor(value.const_value.numpy() + 0.5, name=value.name)
        return model

    monkeypatch.setattr(graph, "export_stage", wrong)
    assert "differ from eager PyTorch" in refuse(ExportError, shared / "bert")


def test_graphs_that_do_not_run_are_not_kept(
    refuse: Refuse, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: object, folder: Path, name: str, *rest: object) -> None:
        (folder / f"{name}.onnx").write_bytes(b"no graph")

    monkeypatch.setattr(graph, "export_stage", lambda *given: None)
    monkeypatch.setattr(graph, "save_stage", broken)
    assert "could not be validated" in refuse(ExportError, checkpoint)


@pytest.mark.parametrize("at", ["export_stage", "save_stage"])
def test_ctrl_c_leaves_nothing_behind(
    refuse: Refuse, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graph, "export_stage", lambda *given: None)
    monkeypatch.setattr(graph, at, interrupted)
    refuse(KeyboardInterrupt, checkpoint)


# What a reader refuses


@pytest.fixture
def copy(tiny: Export, tmp_path: Path) -> Path:
    return shutil.copytree(tiny("roberta", "bbt", "add").path, tmp_path / "bundle")


@pytest.mark.parametrize(
    "file", ["model.onnx", "model.safetensors", "tokenizer.json", "config.json"]
)
def test_a_file_that_has_changed_or_is_gone_is_named(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{file} has changed"):
        Bundle.read(copy)
    (copy / file).unlink()
    with pytest.raises(BundleError, match=f"lacks {file}"):
        Bundle.read(copy)


@pytest.mark.parametrize("name", ["../out", "sub/../../out", "/etc/hostname"])
def test_a_bundle_that_names_a_file_outside_of_it_is_refused(copy: Path, name: str) -> None:
    bundle = Bundle.read(copy)
    (copy.parent / "out").write_text("x")
    bundle.info.sha256[name] = sha256(copy.parent / "out")
    bundle.info.seal(copy / "bundle.json")
    with pytest.raises(BundleError, match="names a file outside of it"):
        Bundle.read(copy)


def test_a_stage_outside_of_its_bundle_is_refused(copy: Path) -> None:
    with pytest.raises(BundleError, match=r"stages\.0: String should match pattern"):
        Bundle.read(edited(copy, stages=["../victim"]))


def edited(copy: Path, **changes: object) -> Path:
    manifest = copy / "bundle.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))
    return copy


def test_a_bundle_of_another_format_is_refused(copy: Path) -> None:
    with pytest.raises(BundleError, match="format 99"):
        Bundle.read(edited(copy, format=99, field_of_a_later_version=1))


def test_a_prompt_that_was_added_to_a_bundle_is_not_read(copy: Path) -> None:
    prompt = Bundle.read(copy).start_prompt()
    save_file({"prompt": prompt + 1}, copy / "initial_prompt.safetensors")
    np.testing.assert_array_equal(Bundle.read(copy).start_prompt(), prompt)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "bert"}, {"prompt_mode": "cat"}, {"n_layers": 1}, {"word_embedding_std": 2.0},
        {"max_length": 9}, {"max_error": None}, {"sha256": {}}, {"facts": ""}, {"method": "bbtv2"},
    ],
)  # fmt: skip
def test_a_bundle_json_that_was_changed_by_hand_is_refused(
    copy: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(
        BundleError, match=r"bundle\.json has been changed by hand .*export the bundle again"
    ):
        Bundle.read(edited(copy, **changes))


def test_a_bundle_json_may_be_formatted_otherwise(copy: Path) -> None:
    info = Bundle.read(copy).info
    assert Bundle.read(edited(copy)).info == info


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "rnn"}, {"n_layers": "many"}, {"surprise": 1}, {"n_prompt_tokens": 10**9},
        {"hidden_size": -1}, {"vocab_size": 0}, {"n_layers": 10**7}, {"max_length": 2**62},
    ],
)  # fmt: skip
def test_a_bundle_json_that_makes_no_sense_is_refused_with_the_field(
    copy: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match=next(iter(changes))):
        Bundle.read(edited(copy, **changes))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="not a bundle"):
            Bundle.read(path)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.read(tmp_path)


@pytest.mark.parametrize(
    "variant", [("roberta", "bbt", "add"), ("t5", "bbt", "add"), ("gpt2", "bbt", "cat")]
)
def test_an_export_is_also_validated_on_a_row_as_long_as_the_backbone_takes(
    tiny: Export, variant: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny(*variant)
    rows = validate.long_row(bundle)
    context = 0 if rows.context_ids is None else len(rows.context_ids)
    assert bundle.info.max_length - 3 <= rows.input_ids.shape[1] + context <= bundle.info.max_length
    lengths = list[int]()
    monkeypatch.setattr(
        sessions, "run_stages", lambda _, rows, prompts: lengths.append(rows.input_ids.shape[1])
    )
    monkeypatch.setattr(validate, "naive_forward", lambda _: lambda rows, prompts: None)
    monkeypatch.setattr(
        validate, "scaled_error", lambda found, wanted: 0.0 if len(lengths) < 2 else float("nan")
    )
    assert np.isnan(validate.validate(str(bundle.path))), "neither batch may be lost"
    assert max(lengths) == rows.input_ids.shape[1]


def test_a_bundle_of_the_other_method_is_refused(tiny: Export) -> None:
    bundle = tiny("roberta", "bbt", "add")
    bundle.require("bbt")
    with pytest.raises(BundleError, match="--method bbtv2"):
        bundle.require("bbtv2")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_tokenizers_fit_their_backbones(family: str, tmp_path: Path) -> None:
    save_tokenizer(family, tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab().values()
    assert max(ids) < VOCABULARY


def tokenizer_of(family: str, folder: Path, **named: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of which only these tokens are named."""
    save_tokenizer(family, folder)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>", **named
    )


def test_the_sentinel_of_mt5_is_a_piece_behind_a_space(tmp_path: Path) -> None:
    config = transformers.MT5Config(decoder_start_token_id=0, pad_token_id=0)
    found = export.special_tokens(
        config, tokenizer_of("mt5", tmp_path, eos_token="</s>"), family_of(config)
    )
    assert (found.mask, found.mask_text, found.end) == (3, "▁<extra_id_0>", 1)


def test_tokens_that_the_tokenizer_writes_without_a_name_are_in_a_row(tmp_path: Path) -> None:
    named = {"mask_token": "<mask>", "pad_token": "<pad>"}
    config = transformers.RobertaConfig()
    found = export.special_tokens(
        config, tokenizer_of("roberta", tmp_path / "roberta", **named), family_of(config)
    )
    assert (found.begin, found.end) == (0, 2)
    decoder = transformers.LlamaConfig(pad_token_id=1)
    found = export.special_tokens(
        decoder, tokenizer_of("llama", tmp_path / "llama"), family_of(decoder)
    )
    assert (found.begin, found.end) == (0, None)


def test_a_padding_token_of_minus_one_is_none() -> None:
    config = transformers.GPT2Config(pad_token_id=-1, eos_token_id=7, vocab_size=9)
    tokenizer = MagicMock(pad_token_id=None)
    assert export.special_tokens(config, tokenizer, family_of(config)).pad == 7
