"""What optimize writes, how close it stays to its source, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Export
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_bundles import linked

from bbt_accel.core import engine_specs
from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import OPENVINO_WEIGHTS, Bundle
from bbt_accel.core.comparison import fidelity, scaled_error
from bbt_accel.core.demo import DATA
from bbt_accel.core.engine_specs import Backend, EngineSpec, Precision
from bbt_accel.engines import openvino_ir
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BbtError, BundleError, ExportError, MissingDependency, UsageError
from bbt_accel.exporters.convert import converters
from bbt_accel.exporters.convert.formats import Fused, convert_checkpoint, fuse_for_ort
from bbt_accel.exporters.convert.half import angles, to_half
from bbt_accel.exporters.convert.optimize import optimize_bundle, padded_length
from bbt_accel.exporters.families.backbone import MASKED
from bbt_accel.exporters.trace import graph
from bbt_accel.exporters.trace.validate import sample_rows
from bbt_accel.search import calibration
from bbt_accel.search.calibration import task_calibration
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import load_few_shot
from bbt_accel.tasks.task import FOLDER, load_task

Tiny = Callable[[str, str, str], Bundle]
FAMILIES = [
    ("roberta", "bbt", "add"),
    ("bart", "bbtv2", "add"),
    ("t5", "bbt", "add"),
    ("gpt2", "bbt", "cat"),
]


def logits(bundle: Bundle, prompts: np.ndarray, columns: int = 0) -> np.ndarray:
    rows = sample_rows(bundle, 6)
    batch = rows.padded(rows.input_ids.shape[1] + columns, bundle.info.special.pad)
    engine = "ort" if bundle.info.target == "onnx" else bundle.info.target
    with load_engine(bundle, engine, threads=1) as engine, engine.bind(batch) as bound:
        return bound.label_logits(prompts)


def prompts_for(bundle: Bundle) -> np.ndarray:
    shape = (3, *bundle.info.prompt_shape)
    return (
        bundle.info.word_embedding_std * np.random.default_rng(0).standard_normal(shape)
    ).astype(np.float32)


@pytest.mark.parametrize("variant", FAMILIES, ids="-".join)
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("fp16", 0.05), ("int8", 0.5)])
def test_an_optimized_bundle_gives_nearly_the_same_logits(
    tiny: Tiny, optimized: Export, variant: tuple[str, str, str], precision: str, most: float
) -> None:
    source, made = tiny(*variant), optimized(variant, precision)
    assert (made.info.precision, made.info.target, made.info.source) == (
        precision,
        "ort",
        source.digest,
    )
    prompts = prompts_for(source)
    wanted, found = logits(source, prompts), logits(made, prompts)
    assert np.abs(found - wanted).max() <= most * max(1.0, np.abs(wanted).max())
    for stage in made.info.stages:
        graph = onnx.load(made.path / f"{stage}.onnx", load_external_data=False).graph
        assert not [node.name for node in graph.node if node.op_type == "Softmax"], (
            "attention is not fused"
        )


@pytest.mark.parametrize(
    ("target", "precision"),
    [("ort", "fp32"), ("ort", "int8"), ("openvino", "fp32"), ("torch", "bf16")],
)
def test_a_bundle_of_links_as_in_the_cache_of_the_hub(
    tiny: Tiny, optimized: Export, tmp_path: Path, target: str, precision: Precision
) -> None:
    source = tiny("roberta", "bbt", "add")
    made = optimize_bundle(
        linked(source, tmp_path).path, tmp_path / "made", precision=precision, target=target
    )
    wanted = optimized(("roberta", "bbt", "add"), precision, target)
    prompts = prompts_for(source)
    np.testing.assert_array_equal(logits(made, prompts), logits(wanted, prompts))


@pytest.mark.parametrize("variant", FAMILIES, ids="-".join)
def test_int8_keeps_the_attention_mask_and_candidates_apart(
    optimized: Export, variant: tuple[str, str, str]
) -> None:
    made = optimized(variant, "int8")
    prompts = prompts_for(made)
    together = logits(made, prompts)
    np.testing.assert_allclose(logits(made, prompts, columns=9), together, atol=1e-4)
    np.testing.assert_allclose(logits(made, prompts[1:2])[0], together[1], atol=1e-4)


def test_the_report_says_what_was_done(tiny: Tiny, optimized: Export) -> None:
    source, made = tiny("roberta", "bbt", "add"), optimized(("roberta", "bbt", "add"), "int8")
    report = made.info.optimization
    assert report is not None
    assert source.info.max_error is not None
    assert made.info.max_error == source.info.max_error + float(str(report["logit_error"]))
    assert report["fused"]["mha2"] == made.info.n_layers  # type: ignore[index]
    # All but the first block's projections, which are shared, and what the last block does at the
    # readout alone.
    assert report["quantized"] == 6 * made.info.n_layers - 3 - 4
    assert report["fp32_fallback"] == []
    assert 0 < float(str(report["fp32_share"])) < 0.3
    assert 0 <= float(str(report["agreement"])) <= 1
    assert {
        "logit_error",
        "logit_rmse",
        "padding_error",
        "bytes",
        "bytes_before",
        "kept_fp32",
    } <= set(report)


def test_threads_bound_every_session(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime
    import torch

    source = tiny("roberta", "bbt", "add")  # before sessions are counted
    opened, whole = [], onnxruntime.InferenceSession

    def session(
        file: str, options: onnxruntime.SessionOptions, *more: object, **named: object
    ) -> object:
        opened.append((options.intra_op_num_threads, torch.get_num_threads()))
        return whole(file, options, *more, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    optimize_bundle(source.path, tmp_path / "o", threads=1)
    assert set(opened) == {(1, 1)}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_fidelity_compares_logits_with_a_reference() -> None:
    reference = np.array([[[1.0, 3.0], [-2.0, -4.0]]], np.float32)
    assert fidelity(reference, reference) == {"logit_error": 0, "logit_rmse": 0, "agreement": 1}
    found = fidelity(
        reference * np.float32([[[1, 1], [1, 0.25]]]), reference
    )  # the second prediction is another one
    assert (found["logit_error"], found["agreement"]) == (0.75, 0.5)
    assert fidelity(reference / 10, reference)["logit_error"] == pytest.approx(0.9)
    assert scaled_error(reference[:, :1], reference) == float("inf")


def test_nodes_that_overflow_stay_in_fp32(tmp_path: Path) -> None:
    large = numpy_helper.from_array(np.array([40000.0], np.float32), "large")
    small = numpy_helper.from_array(np.array([1e-4], np.float32), "small")
    nodes = [
        helper.make_node("Mul", ["x", "large"], ["y"], "big"),
        helper.make_node("Mul", ["y", "small"], ["z"], "back"),
        helper.make_node("Add", ["z", "small"], ["out"], "safe"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [large, small])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert to_half(model, [{"x": np.ones(3, np.float32)}], tmp_path) == ["big", "back"]
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(None, {"x": np.full(3, 2.0, np.float32)})
    np.testing.assert_allclose(out, 8.0, rtol=1e-2)
    assert any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)


def test_an_optimized_bundle_has_its_weights_once(optimized: Export) -> None:
    made = optimized(("bart", "bbtv2", "add"), "fp16")
    assert {p.suffix for p in made.path.iterdir()} == {".json", ".onnx", ".data"}
    places = set()
    for stage in made.info.stages:
        model = onnx.load(made.path / f"{stage}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                places.add(tuple(sorted((e.key, e.value) for e in tensor.external_data)))
    assert (
        sum(int(dict(p)["length"]) for p in places) <= (made.path / "weights.data").stat().st_size
    )


@pytest.mark.parametrize(
    "variant", [("roberta", "bbt", "add"), ("llama", "bbt", "cat")], ids="-".join
)
def test_no_weight_is_transposed_at_load(optimized: Export, variant: tuple[str, str, str]) -> None:
    """A node that transposes a weight would hold a second copy of all of them in memory."""
    made = optimized(variant)
    assert (
        not (made.path / "weights.data").exists()
        or (made.path / "weights.data").stat().st_size < 20_000
    )
    for stage in made.info.stages:
        read = onnx.load(made.path / f"{stage}.onnx", load_external_data=False).graph
        weights = {t.name for t in read.initializer if len(t.dims) == 2}
        assert not [
            node.name
            for node in read.node
            if node.op_type == "Transpose" and node.input[0] in weights
        ]
        assert [
            node.name
            for node in read.node
            if node.op_type == "FusedMatMul" and node.input[1] in weights
        ]


@pytest.mark.parametrize(
    "variant", [("llama", "bbt", "cat"), ("gpt2", "bbtv2", "add")], ids="-".join
)
def test_an_openvino_bundle_has_its_weights_once(
    tiny: Tiny, optimized: Export, tmp_path: Path, variant: tuple[str, str, str]
) -> None:
    """A decoder's context has the same blocks as its rows, and an input embedding may be the
    output's.
    """
    pytest.importorskip("openvino", reason="openvino is not installed")
    source, made = tiny(*variant), optimized(variant, target="openvino")
    assert {file.name for file in made.path.glob("*.bin")} == {OPENVINO_WEIGHTS}
    assert OPENVINO_WEIGHTS in made.info.sha256
    parameters = (source.path / "model.safetensors").stat().st_size
    assert (made.path / OPENVINO_WEIGHTS).stat().st_size < 1.1 * parameters
    moved = tmp_path / "moved"
    shutil.copytree(made.path, moved)
    prompts = prompts_for(source)
    np.testing.assert_allclose(
        logits(Bundle.read(moved), prompts), logits(source, prompts), atol=1e-4
    )


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(contents=st.lists(st.binary(max_size=9), max_size=12), align=st.sampled_from([1, 8, 64]))
def test_a_weight_file_holds_each_content_once(contents: list[bytes], align: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = graph.NewWeights(Path(folder) / "weights")
        places = [weights.place(content, align) for content in contents]
        stored = weights.file.read_bytes() if contents else b""
    for content, place in zip(contents, places, strict=True):
        assert place is not None
        assert place % align == 0
        assert stored[place : place + len(content)] == content
    assert len(stored) <= sum(len(content) + align - 1 for content in set(contents))


def test_the_arithmetic_of_relative_positions_stays_in_fp32() -> None:
    """Half precision would put distances into the wrong buckets, at the edges of these."""
    make = helper.make_node
    nodes = [
        make("Cast", ["distance"], ["x"], "to_float", to=TensorProto.FLOAT),
        make("Log", ["x"], ["log"], "log"),
        make("Div", ["log", "c"], ["ratio"], "div"),
        make("Mul", ["ratio", "c"], ["bucket"], "mul"),
        make("Cast", ["bucket"], ["index"], "to_int", to=TensorProto.INT64),
        make("Gather", ["table", "index"], ["bias"], "gather"),
        make("Add", ["bias", "bias"], ["out"], "add"),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    floats = {"x", "log", "c", "ratio", "bucket", "table", "bias", "out"}
    assert angles(graph, floats) == {"to_float", "log", "div", "mul", "to_int"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", FAMILIES, ids="-".join)
def test_a_bundle_for_pytorch_holds_the_checkpoint_in_its_precision(
    tiny: Tiny, optimized: Export, variant: tuple[str, str, str], precision: str
) -> None:
    source, made = tiny(*variant), optimized(variant, precision, "torch")
    assert {file.name for file in made.path.iterdir()} == {
        "bundle.json", "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert (made.info.precision, made.info.target, made.info.stages) == (
        precision,
        "torch",
        source.info.stages,
    )
    with safe_open(made.path / "model.safetensors", "np") as weights:
        types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert types <= {precision.upper().replace("FP", "F"), "I64"}
    assert (
        made.size < 0.75 * (source.path / "model.safetensors").stat().st_size + 60_000
    )  # tokenizer and bundle.json
    report = made.info.optimization or {}
    assert report["agreement"] >= 0.9  # type: ignore[operator]
    assert 1e-5 < report["logit_rmse"] < 0.1  # type: ignore[operator]
    wanted, found = logits(source, prompts_for(source)), logits(made, prompts_for(source))
    assert np.abs(found - wanted).max() <= 0.1 * max(1.0, np.abs(wanted).max())


def test_weights_beyond_the_range_of_fp16_are_clipped(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": np.array([1e6, -1e6, 1], np.float32)}, tmp_path / "model.safetensors")
    convert_checkpoint(tmp_path, tmp_path / "made", "fp16")
    with safe_open(tmp_path / "made" / "model.safetensors", "np") as weights:
        assert weights.get_tensor("weight").tolist() == [65504, -65504, 1]
    assert json.loads((tmp_path / "made" / "config.json").read_text()) == {"dtype": "float16"}


@pytest.mark.parametrize(
    "variant", [("roberta", "bbt", "add"), ("gpt2", "bbtv2", "add")], ids="-".join
)
def test_openvino_computes_a_bf16_bundle_in_bf16(
    tiny: Tiny, optimized: Export, variant: tuple[str, str, str]
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    source = tiny(*variant)
    made, whole = optimized(variant, "bf16", "openvino"), optimized(variant, target="openvino")
    assert (made.info.precision, whole.info.precision) == ("bf16", "fp32")
    # bf16 is how the graphs are compiled, not what they hold.
    assert (made.path / OPENVINO_WEIGHTS).read_bytes() == (
        whole.path / OPENVINO_WEIGHTS
    ).read_bytes()
    report, exact = made.info.optimization or {}, whole.info.optimization or {}
    assert exact["logit_rmse"] < 1e-4  # type: ignore[operator]
    assert "bf16" not in exact
    if str(report["bf16"]).startswith("not supported"):
        assert report["logit_rmse"] < 1e-4  # type: ignore[operator]
    else:
        assert 1e-4 < report["logit_rmse"] < 0.1  # type: ignore[operator]
    assert report["agreement"] >= 0.9  # type: ignore[operator]
    if report["bf16"] == "native":
        wanted, found = logits(whole, prompts_for(source)), logits(made, prompts_for(source))
        assert 0 < np.abs(found - wanted).max() <= 0.1 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(
    ("features", "capabilities", "expected"),
    [
        (["AVX-512", "bf16"], ["BF16"], "native"),
        (["AVX-512"], ["BF16"], "emulated"),
        (["AVX2"], [], "not supported"),
    ],
)
def test_the_report_says_when_a_processor_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, features: list[str], capabilities: list[str], expected: str
) -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", *capabilities])
    runtime: Any = SimpleNamespace(Core=lambda: core)
    monkeypatch.setattr(openvino_ir, "describe_machine", lambda: {"features": features})
    monkeypatch.setitem(sys.modules, "openvino", runtime)
    assert openvino_ir.openvino_bf16().startswith(expected)


def test_calibration_rows_are_those_of_the_tasks_preset(
    exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = exported(Path("demo"), n=20)
    own = tmp_path / "own.toml"
    text = (FOLDER / "demo.toml").read_text().partition("[presets")[0]
    own.write_text(f"{text}\n[presets.bbt]\nk_shot = 2\nseed = 7\n")
    rows, default = task_calibration(bundle, str(own), DATA), task_calibration(bundle, "demo")
    assert (rows.settings.k_shot, rows.settings.seed) == (2, 7)
    task = load_task(own)
    train, _ = load_few_shot(task, DATA, rows.settings)
    np.testing.assert_array_equal(
        rows.train.input_ids, Encoder(bundle, task).encode(train).input_ids
    )
    assert len(rows.batch(bundle.info)) == 2 * task.n_classes
    assert len(default.batch(bundle.info)) == min(32, len(default.train))


def test_the_longest_test_row_counts_wherever_it_is(
    exported: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TEST_ROWS", 2)
    shutil.copy(DATA / "train.jsonl", tmp_path)
    texts = ["short"] * 5 + ["a longer text of many words, " * 12, "short"]
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": 0}) for text in texts)
    )
    bundle = exported(Path("demo"), n=20)
    row = Encoder(bundle, load_task("demo")).encode([Row({"text": texts[5]}, 0)])
    assert task_calibration(bundle, "demo", tmp_path).longest == row.input_ids.shape[1]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_an_engine_without_a_converter_of_its_own_gets_plain_onnx(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    spec = EngineSpec(
        "toy", {"cpu": Backend("toy:Engine")}, reads=("toy",), optimized=get_args(Precision)
    )
    monkeypatch.setattr(engine_specs, "engine_specs", lambda: {"toy": spec})
    made = optimize_bundle(
        tiny("roberta", "bbt", "add").path,
        tmp_path / "made",
        target="toy",
        precision=precision,
        max_rmse=math.inf,
    )
    assert (made.info.target, made.info.precision) == ("toy", precision)
    report: Any = made.info.optimization
    assert report["operators"] == {}, "nothing is fused for ONNX Runtime"
    graphs = [onnx.load(file, load_external_data=False) for file in made.path.glob("*.onnx")]
    assert {node.domain for graph in graphs for node in graph.graph.node} <= {"", "ai.onnx"}


def test_an_unknown_target_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for target, hint in (("ordt", "did you mean ort"), ("remote", "choose from torch, ort")):
        with pytest.raises(UsageError, match=f"unknown target '{target}'; {hint}"):
            optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "target"),
    [("bf16", "ort"), ("int8", "trt"), ("fp16", "openvino"), ("fp32", "torch")],
)
def test_refuses_combinations_that_do_not_exist(
    tiny: Tiny, tmp_path: Path, precision: str, target: str
) -> None:
    with pytest.raises(UsageError, match=f"--target {target}"):
        optimize_bundle(
            tiny("roberta", "bbt", "add").path,
            tmp_path / "made",
            precision=precision,  # type: ignore[arg-type]
            target=target,
        )
    assert list(tmp_path.iterdir()) == []


def test_refuses_more_threads_than_runtimes_start(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"threads must be a whole number in 1\.\.1024, not 1000000000"
    ):
        optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", threads=10**9)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_to_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(
        ExportError, match=r"cannot write .*xml .*; free some space or choose another -o"
    ):
        optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", target="openvino")
    assert list(tmp_path.iterdir()) == []


def test_a_target_whose_library_is_missing_names_the_extra(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converters, "installed", lambda name: False)
    with pytest.raises(
        MissingDependency, match=r'openvino needs openvino: pip install "bbt-accel\[openvino\]"'
    ):
        optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", target="openvino")
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_write_over_its_input_or_anything_else(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "bundle"
    shutil.copytree(tiny("roberta", "bbt", "add").path, source)
    for inside in (source, source / "made"):
        with pytest.raises(UsageError, match="is the bundle itself, or in its folder"):
            optimize_bundle(source, inside)
    (tmp_path / "other").mkdir()
    with pytest.raises(BbtError, match="exists already"):
        optimize_bundle(source, tmp_path / "other")
    Bundle.read(source)


def test_refuses_a_bundle_that_is_optimized_already(optimized: Export, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="optimized already"):
        optimize_bundle(optimized(("roberta", "bbt", "add")).path, tmp_path / "again")


def test_padding_and_a_context_fit_the_backbone() -> None:
    ids, mask = np.full((2, 30), 7), np.ones((2, 30), np.int64)
    rows = Batch(ids, mask, np.zeros(2, np.int64), np.zeros(2, np.int64), np.array([7]))
    assert [padded_length(rows, limit) for limit in (100, 40, 30)] == [46, 40, 30]
    assert padded_length(replace(rows, context_ids=np.arange(60)), 100) == 40


@pytest.mark.slow
def test_rows_that_fill_the_backbone_leave_no_room_for_padding(
    exported: Export, tmp_path: Path
) -> None:
    """More of which than it has positions would be no question of the mask."""
    from tiny_backbones import save_recorded_backbone

    bundle = exported(save_recorded_backbone("bert", tmp_path / "bert"), n=20)
    made = optimize_bundle(bundle.path, tmp_path / "made")
    assert made.info.optimization["padding_error"] < 1e-5  # type: ignore[index, operator]


def damaged(damage: Callable[[ir.Model], None]) -> Callable[[ir.Model], Fused]:
    """What fuses a graph and damages it."""

    def fuse(model: ir.Model) -> Fused:
        model, counts = fuse_for_ort(model)
        damage(model)
        return model, counts

    return fuse


def subtract(model: ir.Model) -> None:
    """Subtract the prompt from the first block's input."""
    [node for node in model.graph if node.op_type == "Add"][-1].op_type = "Sub"


def unmask(model: ir.Model) -> None:
    """Attend to padding as to any token."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and (value.const_value.numpy() == MASKED).all():
            value.const_value = ir.tensor(
                np.zeros(value.const_value.shape.numpy(), np.float32), name=value.name
            )


def test_a_graph_in_fp32_that_computes_something_else_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converters, "fuse_for_ort", damaged(subtract))
    with pytest.raises(
        ExportError, match=r"the fp32 bundle's logits differ by .* from those of its source"
    ):
        optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_loses_its_mask_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converters, "fuse_for_ort", damaged(unmask))
    with pytest.raises(ExportError, match="attention mask was lost"):
        optimize_bundle(
            tiny("roberta", "bbt", "add").path,
            tmp_path / "made",
            precision="int8",
            max_rmse=math.inf,
        )
    assert list(tmp_path.iterdir()) == []
