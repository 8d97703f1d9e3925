"""8-bit products: what large channels cost, and which products stay in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.bundle import Bundle
from bbt_accel.errors import UsageError
from bbt_accel.exporters.calibration import Channels, calibration_rows, random_prompts
from bbt_accel.exporters.int8 import FURTHER_COLUMNS, Range, fit, to_int8, with_further_rows
from bbt_accel.exporters.optimize import optimize_bundle
from bbt_accel.exporters.precision import choose_fp32, logit_noise
from bbt_accel.exporters.sessions import run_stages, session_of

few = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def activations(draw: st.DrawFn) -> np.ndarray:
    """(T, K) with some channels many times as large as the others, on either side or on both."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((40, draw(st.sampled_from([16, 48, 96]))))
    for _ in range(draw(st.integers(0, 4))):
        channel = rng.integers(x.shape[1])
        x[:, channel] = draw(st.sampled_from([-30.0, -4.0, 4.0, 30.0])) * np.abs(x[:, channel])
    if draw(st.booleans()):
        x = np.maximum(x, -0.17)  # as GELU's results are
    return x.astype(np.float32)


def seen(x: np.ndarray) -> Channels:
    return Channels(x.min(0), x.max(0), len(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_values_on_one_side_alone_need_no_columns_on_the_other(sign: int) -> None:
    x = sign * np.abs(np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32))
    x[:, 3] *= 30
    fitted = fit(seen(x))
    assert (fitted.sign == sign).all()
    assert len(fitted.channel) <= 64 * FURTHER_COLUMNS


def columns(x: np.ndarray, fitted: Range) -> np.ndarray:
    """What the graph computes before it rounds: (T, K) → (T, K + J)."""
    further = np.maximum(fitted.sign * x[:, fitted.channel] - fitted.offset, 0)
    return np.clip(np.concatenate([x, further], axis=1), fitted.low, fitted.high)


@few
@given(x=activations())
def test_the_columns_of_a_channel_add_up_to_its_values(x: np.ndarray) -> None:
    fitted = fit(seen(x))
    found = columns(x, fitted)
    sums = found[:, : x.shape[1]].copy()
    for j, (channel, sign) in enumerate(zip(fitted.channel, fitted.sign, strict=True)):
        sums[:, channel] += sign * found[:, x.shape[1] + j]
    np.testing.assert_allclose(sums, x, atol=1e-4)
    assert len(fitted.channel) <= x.shape[1] * FURTHER_COLUMNS
    assert fitted.low <= 0 <= fitted.high


@few
@given(x=activations(), seed=st.integers(0, 2**32 - 1))
def test_a_large_channel_is_not_multiplied_by_the_rounding_of_one_weight(x: np.ndarray, seed: int) -> None:
    fitted = fit(seen(x))
    exact = np.random.default_rng(seed).uniform(-127, 127, (x.shape[1], 8)).astype(np.float32)
    rows = with_further_rows(exact, fitted).astype(np.float32)
    assert rows.shape == (x.shape[1] + len(fitted.channel), 8)
    error = columns(x, fitted) @ rows - x @ exact
    # Half a step of every weight, over values that are no larger than the range.
    bound = 0.5 * np.clip(np.abs(x), 0, max(fitted.high, -fitted.low)).sum(1) + fitted.high * len(fitted.channel) + 1e-2
    assert (np.abs(error) <= bound[:, None]).all()


def product(x: np.ndarray, weight: np.ndarray, folder: Path, transpose: bool) -> np.ndarray:
    """x · weight by a quantized graph, calibrated on x."""
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.T) if transpose else weight, "w")
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1) if transpose else None
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", None]) for name in ("x", "y")]
    nodes = [node or helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [initializer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = to_int8(model, [{"x": x}], folder)
    assert (len(made.products), made.kept) == (1, [])
    onnx.save(made.model, folder / "made.onnx")
    found: np.ndarray = session_of(folder / "made.onnx").run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("transpose", [False, True])
def test_one_large_channel_does_not_cost_the_others_their_precision(tmp_path: Path, transpose: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 32), dtype=np.float32)
    x = rng.standard_normal((200, 512), dtype=np.float32)
    plain = product(x, weight, tmp_path, transpose) - x @ weight
    x[:, 7] *= 15
    large = product(x, weight, tmp_path, transpose) - x @ weight
    assert large.std() < 2 * plain.std()


Tiny = Callable[[str, str, str], Bundle]


@pytest.mark.parametrize(
    ("variant", "target"),
    [(("roberta", "bbt", "add"), "ort"), (("bart", "bbtv2", "add"), "ort"), (("roberta", "bbt", "add"), "openvino")],
)
def test_products_stay_in_fp32_until_the_logits_are_near_enough(
    tiny: Tiny, tmp_path: Path, variant: tuple[str, str, str], target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    source = tiny(*variant)
    whole = optimize_bundle(source.path, tmp_path / "whole", precision="int8", target=target, max_noise=1)  # type: ignore[arg-type]
    part = optimize_bundle(source.path, tmp_path / "part", precision="int8", target=target, max_noise=2e-3)  # type: ignore[arg-type]
    none = optimize_bundle(source.path, tmp_path / "none", precision="int8", target=target, max_noise=0)  # type: ignore[arg-type]

    def report(made: Bundle) -> tuple[int, int, float]:
        found = made.info.optimization
        assert found is not None
        return found["quantized"], len(found["noisy"]), found["logit_noise"]  # type: ignore[return-value, arg-type]

    assert report(whole)[1] == 0
    assert 0 < report(part)[1] < report(whole)[0]
    assert report(part)[0] == report(whole)[0] - report(part)[1]
    assert report(none)[0] == 0
    assert report(whole)[2] > report(part)[2] > report(none)[2]
    assert report(none)[2] < 1e-5


def test_the_products_that_are_kept_are_those_that_bring_most_of_the_noise(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bert", "bbt", "cat")
    batch, prompts = calibration_rows(source, None, None), random_prompts(source)
    kept = [choose_fp32(source, "ort", batch, prompts, limit, tmp_path) for limit in (1, 3e-3, 1e-3, 0)]
    assert kept[0] == set()
    assert kept[0] < kept[3]
    assert kept[1] <= kept[2] <= kept[3]
    assert not list(tmp_path.iterdir())


def test_noise_is_what_differs_between_labels() -> None:
    wanted = np.random.default_rng(0).standard_normal((2, 5, 3), dtype=np.float32)
    assert logit_noise(wanted + 7, wanted) < 1e-5
    assert logit_noise(wanted * 1.1, wanted) == pytest.approx(0.1, rel=1e-3)


def test_a_negative_limit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-noise must be 0 or more"):
        optimize_bundle(tiny("bert", "bbt", "cat").path, tmp_path / "made", precision="int8", max_noise=-0.1)


def test_an_int8_engine_gives_a_candidate_the_same_logits_alone_and_in_a_population(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("t5", "bbt", "add")
    made = optimize_bundle(source.path, tmp_path / "made", precision="int8")
    batch, prompts = calibration_rows(source, None, None), random_prompts(source)
    together = run_stages(made, batch, prompts)
    for i in range(len(prompts)):
        np.testing.assert_array_equal(run_stages(made, batch, prompts[i : i + 1])[0], together[i])
