"""The graphs before and after the backbone on a device, and PyTorch's own batch statistics, against
numpy's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
import torch
from conftest import Export
from hypothesis import given, settings
from hypothesis import strategies as st

from bbt_accel import Objective, Projection
from bbt_accel.core.objective import batch_statistics
from bbt_accel.errors import NonFiniteLoss
from bbt_accel.exporters.trace import device_graphs

many = settings(max_examples=200, deadline=None, derandomize=True, database=None)
GRAPHS = ("project", "statistics")


@pytest.fixture(scope="module")
def folder(tiny: Export) -> Path:
    return tiny("roberta", "bbt", "add").path


@pytest.fixture(scope="module")
def sessions(folder: Path) -> dict[str, Any]:
    return {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in GRAPHS}


@st.composite
def scored(draw: st.DrawFn, special: tuple[float, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Logits (P, N, C), with repeated values, and targets (N,)."""
    P, N, C = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((P, N, C)).astype(np.float32) * np.float32(
        draw(st.sampled_from((0.1, 3.0, 1e4)))
    )
    if draw(st.booleans()):
        logits = logits.round(0)
    for value in special:
        logits[tuple(rng.integers(logits.shape))] = value
    return logits, rng.integers(0, C, N)


def statistics_of(
    sessions: dict[str, Any], logits: np.ndarray, targets: np.ndarray
) -> list[np.ndarray]:
    """Those of the graph, and of PyTorch."""
    classes = np.arange(logits.shape[2], dtype=np.float32)
    one_hot = np.eye(logits.shape[2], dtype=np.float32)[targets]
    (graph,) = sessions["statistics"].run(
        None, {"label_logits": logits, "targets": one_hot, "classes": classes}
    )
    return [
        graph,
        device_graphs.batch_statistics(*map(torch.from_numpy, (logits, one_hot, classes))).numpy(),
    ]


def test_they_are_valid_and_of_the_bundles_opset(tiny: Export, folder: Path) -> None:
    for name in GRAPHS:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
        imports = onnx.load(folder / f"{name}.onnx").opset_import
        assert [i.version for i in imports] == [tiny("roberta", "bbt", "add").info.opset]


@many
@given(case=scored())
def test_batch_statistics_are_those_of_numpy(
    sessions: dict[str, Any], case: tuple[np.ndarray, np.ndarray]
) -> None:
    """Counts exactly, equal logits included; losses within fp32."""
    logits, targets = case
    wanted = batch_statistics(logits, targets)
    for found in statistics_of(sessions, logits, targets):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:, :2], wanted[:, :2], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[:, 2:], wanted[:, 2:])


@many
@given(case=st.sampled_from([np.nan, np.inf, -np.inf]).flatmap(lambda value: scored((value,))))
def test_batch_statistics_reveal_logits_that_are_not_finite(
    sessions: dict[str, Any], case: tuple[np.ndarray, np.ndarray]
) -> None:
    logits, targets = case
    with pytest.raises(NonFiniteLoss) as wanted:
        Objective("hinge").score(logits, targets)
    for found in statistics_of(sessions, logits, targets):
        with pytest.raises(NonFiniteLoss) as caught:
            Objective("hinge").from_statistics(found.astype(np.float64), targets)
        assert str(caught.value) == str(wanted.value)


@many
@given(count=st.integers(1, 20), dim=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_a_projection_is_that_of_numpy(
    tiny: Export, sessions: dict[str, Any], count: int, dim: int, seed: int
) -> None:
    rng, (n, hidden) = np.random.default_rng(seed), tiny("roberta", "bbt", "add").info.prompt_shape
    projection = Projection.normal(rng, dim, n, hidden, 0.3, p0=rng.standard_normal(n * hidden))
    z = rng.standard_normal((count, dim), dtype=np.float32)
    (found,) = sessions["project"].run(
        None, {"z": z, "matrix": projection.matrix, "p0": projection.p0}
    )
    np.testing.assert_allclose(found, projection.prompts(z), rtol=0, atol=1e-5)
