"""4-bit weights: how blocks are rounded, and that runtimes compute with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
from conftest import THREADS, Export
from hypothesis import given, settings
from hypothesis import strategies as st

from bbt_accel import load_engine
from bbt_accel.exporters.convert.calibration import Calibration, calibration_prompts
from bbt_accel.exporters.convert.int4 import BLOCKS, quantize_blocks
from bbt_accel.exporters.convert.optimize import optimize_bundle


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    blocks=st.integers(1, 4),
    block=st.sampled_from(BLOCKS),
    columns=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_no_block_has_a_larger_error_than_with_the_scale_that_clips_nothing(
    blocks: int, block: int, columns: int, seed: int
) -> None:
    exact = (
        np.random.default_rng(seed).standard_normal((blocks * block, columns)).astype(np.float32)
    )
    values, scale = quantize_blocks(exact, block)
    assert (values.shape, scale.shape) == (exact.shape, (blocks, columns))
    assert values.min() >= -8
    assert values.max() <= 7
    apart = exact.reshape(blocks, block, columns)
    plain = np.abs(apart).max(axis=1, keepdims=True) / 7
    error = ((values.reshape(apart.shape) * scale[:, None] - apart) ** 2).sum(axis=1)
    nearest = ((np.rint(apart / plain) * plain - apart) ** 2).sum(axis=1)
    assert (error <= nearest * (1 + 1e-4) + 1e-6).all()


def test_a_block_of_zeros_stays_zero() -> None:
    values, scale = quantize_blocks(np.zeros((48, 2), np.float32), 16)
    assert not values.any()
    assert np.isfinite(scale).all()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize(
    "variant", [("llama", "bbt", "cat"), ("roberta", "bbtv2", "add")], ids="-".join
)
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
    batch, prompts = Calibration.shipped(source).batch(source.info), calibration_prompts(source)
    with load_engine(made, target, threads=THREADS) as engine, engine.bind(batch) as bound:
        alone = [bound.label_logits(prompt[None])[0] for prompt in prompts]
        np.testing.assert_allclose(bound.label_logits(prompts), alone, atol=1e-4)


@pytest.mark.slow
def test_a_weight_that_is_used_twice_is_stored_once(tiny: Export, tmp_path: Path) -> None:
    """A decoder's prompt and text have matmuls of their own."""
    made = optimize_bundle(tiny("llama", "bbt", "cat").path, tmp_path / "made", precision="int4")
    graph = onnx.load(made.path / "model.onnx", load_external_data=False).graph
    weights = [node.input[1] for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(set(weights)) < len(weights)
    assert set(weights) <= {tensor.name for tensor in graph.initializer}
