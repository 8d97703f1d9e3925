"""4-bit weights: how blocks are rounded, and that runtimes compute with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import onnxruntime
from conftest import THREADS, Export
from hypothesis import given, settings
from hypothesis import strategies as st

from bbt_accel import load_engine
from bbt_accel.exporters.calibration import TaskRows, random_prompts
from bbt_accel.exporters.int4 import BLOCK, quantize_blocks
from bbt_accel.exporters.optimize import optimize_bundle


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 100), columns=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_a_weight_is_within_a_few_steps_of_its_scale(rows: int, columns: int, seed: int) -> None:
    exact = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values, scale = quantize_blocks(exact)
    assert (values.shape, scale.shape) == (exact.shape, (-(-rows // BLOCK), columns))
    assert values.min() >= -8
    assert values.max() <= 7
    repeated = np.repeat(scale, BLOCK, axis=0)[:rows]
    error = (values * repeated - exact) ** 2
    plain = np.repeat(np.maximum.reduceat(np.abs(exact), range(0, rows, BLOCK)) / 7, BLOCK, axis=0)[:rows]
    nearest = (np.clip(np.rint(exact / plain), -8, 7) * plain - exact) ** 2
    blocks = range(0, rows, BLOCK)
    assert (np.add.reduceat(error, blocks) <= np.add.reduceat(nearest, blocks) + 1e-5).all()


def test_a_block_of_zeros_stays_zero() -> None:
    values, scale = quantize_blocks(np.zeros((40, 2), np.float32))
    assert not values.any()
    assert np.isfinite(scale).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("variant", [("llama", "bbt", "cat"), ("roberta", "bbtv2", "add")], ids="-".join)
def test_logits_in_4_bits_resemble_those_in_fp32(
    tiny: Export, tmp_path: Path, variant: tuple[str, str, str], target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    source = tiny(*variant)
    made = optimize_bundle(source.path, tmp_path / "made", precision="int4", target=target)
    report = made.info.optimization or {}
    assert report["quantized"] > 0  # type: ignore[operator]
    assert 1e-4 < report["logit_rmse"] < 0.35  # type: ignore[operator]
    batch, prompts = TaskRows(source, None).calibration(), random_prompts(source)
    with load_engine(made, target, threads=THREADS) as engine, engine.bind(batch) as bound:
        alone = [bound.label_logits(prompt[None])[0] for prompt in prompts]
        np.testing.assert_allclose(bound.label_logits(prompts), alone, atol=1e-4)


@pytest.mark.slow
def test_onnx_runtime_computes_in_4_bits(tiny: Export, tmp_path: Path) -> None:
    """It does not unpack the weights at load, which would cost the memory that they save."""
    made = optimize_bundle(tiny("llama", "bbt", "cat").path, tmp_path / "made", precision="int4")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(made.path / "model.onnx"), options, ["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph.node]
    assert operators.count("MatMulNBits") == (made.info.optimization or {})["quantized"] - _context_only(made.path)


def _context_only(folder: Path) -> int:
    """Matmuls of the stage `context`."""
    nodes = onnx.load(folder / "context.onnx", load_external_data=False).graph.node
    return sum(node.op_type == "DequantizeLinear" for node in nodes)
