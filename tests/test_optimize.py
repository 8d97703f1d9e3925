"""What optimize writes, what it keeps, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.bundle import Bundle
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BundleError, ExportError, UsageError
from bbt_accel.exporters import optimize
from bbt_accel.exporters.half import to_half
from bbt_accel.exporters.optimize import optimize_bundle, pad_columns
from bbt_accel.exporters.rows import sample_rows

Tiny = Callable[[str, str, str], Bundle]
FAMILIES = [("roberta", "bbt", "add"), ("bart", "bbtv2", "add"), ("t5", "bbt", "add"), ("gpt2", "bbt", "cat")]


def logits(bundle: Bundle, prompts: np.ndarray, columns: int = 0) -> np.ndarray:
    batch = pad_columns(bundle.info, sample_rows(bundle, 6), columns)
    with load_engine(bundle, "ort", threads=1) as engine, engine.bind(batch) as bound:
        return bound.label_logits(prompts)


def prompts_for(bundle: Bundle) -> np.ndarray:
    shape = (3, *bundle.info.prompt_shape)
    return (bundle.info.word_embedding_std * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("variant", FAMILIES, ids="-".join)
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("fp16", 0.05), ("int8", 0.5)])
def test_an_optimized_bundle_gives_nearly_the_same_logits(
    tiny: Tiny, tmp_path: Path, variant: tuple[str, str, str], precision: str, most: float
) -> None:
    source = tiny(*variant)
    made = optimize_bundle(source.path, tmp_path / "made", precision=precision)  # type: ignore[arg-type]
    assert (made.info.precision, made.info.target, made.info.source) == (precision, "ort", source.digest)
    prompts = prompts_for(source)
    wanted, found = logits(source, prompts), logits(made, prompts)
    assert np.abs(found - wanted).max() <= most * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("variant", FAMILIES, ids="-".join)
def test_int8_keeps_the_attention_mask_and_candidates_apart(
    tiny: Tiny, tmp_path: Path, variant: tuple[str, str, str]
) -> None:
    made = optimize_bundle(tiny(*variant).path, tmp_path / "made", precision="int8")
    prompts = prompts_for(made)
    together = logits(made, prompts)
    np.testing.assert_allclose(logits(made, prompts, columns=9), together, atol=1e-4)
    np.testing.assert_allclose(logits(made, prompts[1:2])[0], together[1], atol=1e-4)


def test_the_report_says_what_was_done(tiny: Tiny, tmp_path: Path) -> None:
    made = optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", precision="int8")
    report = made.info.optimization
    assert report is not None
    assert report["fused"]["mha2"] == made.info.n_layers  # type: ignore[index]
    # All but the first block's projections, which are shared, and what the last block does at the readout alone.
    assert report["quantized"] == 6 * made.info.n_layers - 3 - 4
    assert report["noisy"] == []
    assert 0 <= float(str(report["agreement"])) <= 1
    assert {"logit_error", "logit_noise", "padding_error", "bytes", "bytes_before", "kept_fp32"} <= set(report)


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
    half, kept = to_half(model, [{"x": np.ones(3, np.float32)}], tmp_path)
    assert kept == ["big", "back"]
    import onnxruntime

    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.full(3, 2.0, np.float32)})
    np.testing.assert_allclose(out, 8.0, rtol=1e-2)
    assert any(t.data_type == TensorProto.FLOAT16 for t in half.graph.initializer)


def test_an_optimized_bundle_has_its_weights_once(tiny: Tiny, tmp_path: Path) -> None:
    made = optimize_bundle(tiny("gpt2", "bbtv2", "add").path, tmp_path / "made", precision="fp16")
    assert {p.suffix for p in made.path.iterdir()} == {".json", ".onnx", ".data"}
    places = set()
    for stage in made.info.stages:
        model = onnx.load(made.path / f"{stage}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                places.add(tuple(sorted((e.key, e.value) for e in tensor.external_data)))
    assert sum(int(dict(p)["length"]) for p in places) <= (made.path / "weights.data").stat().st_size


@pytest.mark.parametrize(("precision", "target"), [("bf16", "ort"), ("int8", "trt"), ("fp16", "openvino")])
def test_refuses_combinations_that_do_not_exist(tiny: Tiny, tmp_path: Path, precision: str, target: str) -> None:
    with pytest.raises(UsageError, match=f"--target {target}"):
        optimize_bundle(
            tiny("roberta", "bbt", "add").path,
            tmp_path / "made",
            precision=precision,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
        )
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_write_over_its_input_or_anything_else(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "bundle"
    shutil.copytree(tiny("roberta", "bbt", "add").path, source)
    with pytest.raises(UsageError, match="is the bundle itself"):
        optimize_bundle(source, source)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        optimize_bundle(source, tmp_path / "other")
    Bundle.read(source)


def test_refuses_a_bundle_that_is_optimized_already(tiny: Tiny, tmp_path: Path) -> None:
    optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made")
    with pytest.raises(BundleError, match="optimized already"):
        optimize_bundle(tmp_path / "made", tmp_path / "again")


def test_a_graph_that_loses_its_mask_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize, "LEAK", -1.0)
    with pytest.raises(ExportError, match="attention mask was lost"):
        optimize_bundle(tiny("roberta", "bbt", "add").path, tmp_path / "made", precision="int8")
    assert list(tmp_path.iterdir()) == []
