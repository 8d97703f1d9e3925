"""int8 matmuls: how outlier channels are split, and which matmuls stay in fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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
from bbt_accel.exporters.calibration import Channels, TaskRows, calibration_prompts, channels
from bbt_accel.exporters.int8 import (
    MEASUREMENTS,
    SPLIT_SHARE,
    Matmul,
    SplitRange,
    SwitchableStage,
    by_sensitivity,
    calibrate,
    fit_range,
    keep_more,
    make_switchable,
    run_from,
    split_weight,
    switch,
    to_int8,
)
from bbt_accel.exporters.optimize import optimize_bundle
from bbt_accel.exporters.sessions import Feeds, open_session, run_stages
from bbt_accel.exporters.validate import relative_rmse
from bbt_accel.progress import silent

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
def test_values_of_one_sign_need_no_extra_columns_of_the_other(sign: int) -> None:
    x = sign * np.abs(np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32))
    x[:, 3] *= 30
    fitted = fit_range(seen(x))
    assert (fitted.sign == sign).all()
    assert len(fitted.channel) <= 64 * SPLIT_SHARE


def columns(x: np.ndarray, fitted: SplitRange) -> np.ndarray:
    """What the graph computes before it rounds: (T, K) → (T, K + J)."""
    extra = np.maximum(fitted.sign * x[:, fitted.channel] - fitted.offset, 0)
    return np.clip(np.concatenate([x, extra], axis=1), fitted.low, fitted.high)


@few
@given(x=activations())
def test_the_columns_of_a_channel_add_up_to_its_values(x: np.ndarray) -> None:
    fitted = fit_range(seen(x))
    found = columns(x, fitted)
    sums = found[:, : x.shape[1]].copy()
    for j, (channel, sign) in enumerate(zip(fitted.channel, fitted.sign, strict=True)):
        sums[:, channel] += sign * found[:, x.shape[1] + j]
    np.testing.assert_allclose(sums, x, atol=1e-4)
    assert len(fitted.channel) <= x.shape[1] * SPLIT_SHARE
    assert fitted.low <= 0 <= fitted.high


@few
@given(x=activations(), seed=st.integers(0, 2**32 - 1))
def test_an_outlier_is_not_multiplied_by_the_rounding_error_of_one_weight(x: np.ndarray, seed: int) -> None:
    fitted = fit_range(seen(x))
    exact = np.random.default_rng(seed).uniform(-127, 127, (x.shape[1], 8)).astype(np.float32)
    rows = split_weight(exact, fitted).astype(np.float32)
    assert rows.shape == (x.shape[1] + len(fitted.channel), 8)
    error = columns(x, fitted) @ rows - x @ exact
    # Half a step of every weight, over values that are no larger than the range.
    bound = 0.5 * np.clip(np.abs(x), 0, max(fitted.high, -fitted.low)).sum(1) + fitted.high * len(fitted.channel) + 1e-2
    assert (np.abs(error) <= bound[:, None]).all()


def matmul(x: np.ndarray, weight: np.ndarray, folder: Path, transpose: bool) -> np.ndarray:
    """x · weight by a quantized graph, calibrated on x."""
    initializer = numpy_helper.from_array(np.ascontiguousarray(weight.T) if transpose else weight, "w")
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1) if transpose else None
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", None]) for name in ("x", "y")]
    nodes = [node or helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [initializer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "exact.onnx")
    ranges, _ = channels(folder / "exact.onnx", [{"x": x}], {"x": len(weight)})
    made, quantized, kept = to_int8(folder / "exact.onnx", ranges)
    assert (len(quantized), kept) == (1, [])
    onnx.save(made, folder / "made.onnx")
    found: np.ndarray = open_session(folder / "made.onnx").run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("transpose", [False, True])
def test_one_outlier_channel_does_not_cost_the_others_their_precision(tmp_path: Path, transpose: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 32), dtype=np.float32)
    x = rng.standard_normal((200, 512), dtype=np.float32)
    plain = matmul(x, weight, tmp_path, transpose) - x @ weight
    x[:, 7] *= 15
    large = matmul(x, weight, tmp_path, transpose) - x @ weight
    assert large.std() < 2 * plain.std()


Tiny = Callable[[str, str, str], Bundle]


@pytest.mark.parametrize(
    ("variant", "target"),
    [(("roberta", "bbt", "add"), "ort"), (("bart", "bbtv2", "add"), "ort"), (("roberta", "bbt", "add"), "openvino")],
)
def test_matmuls_stay_in_fp32_until_the_logits_are_close_enough(
    tiny: Tiny, tmp_path: Path, variant: tuple[str, str, str], target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    source = tiny(*variant)
    whole = optimize_bundle(source.path, tmp_path / "whole", precision="int8", target=target, max_rmse=1)
    part = optimize_bundle(source.path, tmp_path / "part", precision="int8", target=target, max_rmse=2e-3)
    none = optimize_bundle(source.path, tmp_path / "none", precision="int8", target=target, max_rmse=0)

    def report(made: Bundle) -> tuple[int, int, float]:
        found = made.info.optimization
        assert found is not None
        return found["quantized"], len(found["fp32_fallback"]), found["logit_rmse"]  # type: ignore[return-value, arg-type]

    assert report(whole)[1] == 0
    assert 0 < report(part)[1] < report(whole)[0]
    assert report(part)[0] == report(whole)[0] - report(part)[1]
    assert report(none)[0] == 0
    assert report(whole)[2] > report(part)[2] > report(none)[2]
    assert report(none)[2] < 1e-5


def test_the_matmuls_kept_in_fp32_are_those_with_the_largest_error(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bert", "bbt", "cat")
    batch, prompts = TaskRows(source, None).calibration(), calibration_prompts(source)
    with ExitStack() as files:
        stages = calibrate(files, source, "ort", batch, prompts, tmp_path, silent)
        switchable = make_switchable(stages, tmp_path)
        ranked = by_sensitivity(switchable)
    exact = run_from(switchable, 0, [matmul for matmul, _ in ranked])
    errors = [
        relative_rmse(run_from(switchable, 0, [matmul for matmul, _ in ranked[:kept]]), exact)
        for kept in range(len(ranked) + 1)
    ]
    assert errors[-1] == 0 < min(errors[:-1])
    assert errors[len(errors) // 2] < errors[0]
    assert not list(tmp_path.iterdir())


@few
@given(errors=st.lists(st.floats(0, 1), min_size=1, max_size=9), share=st.sampled_from([0, 0.3, 0.99]), data=st.data())
def test_the_next_matmuls_to_keep_leave_the_share_of_the_error_that_is_allowed(
    errors: list[float], share: float, data: st.DataObject
) -> None:
    ranked = [(("model", str(i)), error) for i, error in enumerate(errors)]
    kept = data.draw(st.integers(0, len(errors) - 1))
    more = keep_more(ranked, kept, share)
    assert kept < more <= len(errors)
    assert sum(errors[more:]) <= share * sum(errors[kept:])
    assert more == kept + 1 or sum(errors[more - 1 :]) > share * sum(errors[kept:])


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[SwitchableStage], dict[Matmul, float], list[int]]:
    """Stages whose matmuls add noise to the logits while they are in int8; the noise of each; and a list of runs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [(int(t), 8, 8) for t in rng.choice([4, 40, 400], draw(st.integers(1, 3)), replace=False)]
    depth, runs = draw(st.integers(1, 3)), list[int]()
    noise = {(f"s{i}", f"m{j}"): float(rng.lognormal(-5, 1.5)) for i in range(depth) for j in range(12)}
    directions = {matmul: rng.standard_normal((2, 30, 4)) for matmul in noise}
    logits = rng.standard_normal((2, 30, 4))

    def stage(i: int) -> SwitchableStage:
        own = [matmul for matmul in noise if matmul[0] == f"s{i}"]

        def run(feeds: Feeds) -> Feeds:
            runs.append(i)
            rounded = [matmul for matmul in own if not feeds[switch(matmul[1])]]
            before = feeds.get("label_logits", logits)
            return {"label_logits": before + sum(noise[matmul] * directions[matmul] for matmul in rounded)}

        work = {name: shapes[j % len(shapes)] for j, (_, name) in enumerate(own)}
        return SwitchableStage(f"s{i}", run, work, [{}])

    return [stage(i) for i in range(depth)], noise, runs


@few
@given(network=networks())
def test_few_measurements_rank_the_matmuls(
    network: tuple[list[SwitchableStage], dict[Matmul, float], list[int]],
) -> None:
    stages, noise, runs = network
    ranked = by_sensitivity(stages)
    assert runs.count(len(stages) - 1) <= MEASUREMENTS + 1
    assert {matmul for matmul, _ in ranked} == noise.keys()
    total = relative_rmse(run_from(stages, 0, []), run_from(stages, 0, noise)) ** 2
    assert sum(error for _, error in ranked) == pytest.approx(total, rel=0.5)


def test_relative_rmse_ignores_an_offset_that_all_classes_share() -> None:
    wanted = np.random.default_rng(0).standard_normal((2, 5, 3), dtype=np.float32)
    assert relative_rmse(wanted + 7, wanted) < 1e-5
    assert relative_rmse(wanted * 1.1, wanted) == pytest.approx(0.1, rel=1e-3)


def test_a_negative_limit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-rmse must be 0 or more"):
        optimize_bundle(tiny("bert", "bbt", "cat").path, tmp_path / "made", precision="int8", max_rmse=-0.1)


def test_an_int8_engine_gives_a_candidate_the_same_logits_alone_and_in_a_population(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("t5", "bbt", "add")
    made = optimize_bundle(source.path, tmp_path / "made", precision="int8")
    batch, prompts = TaskRows(source, None).calibration(), calibration_prompts(source)
    together = run_stages(made, batch, prompts)
    for i in range(len(prompts)):
        np.testing.assert_array_equal(run_stages(made, batch, prompts[i : i + 1])[0], together[i])
