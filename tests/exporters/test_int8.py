"""int8 matmuls: how outlier channels are split, and which matmuls stay in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from conftest import Export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import SessionOptions
from tiny_backbones import N_PROMPT, save_tokenizer, tiny_model

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.comparison import relative_rmse
from bbt_accel.engines.openvino_ir import StageReader
from bbt_accel.engines.ort_sessions import WIDE_SUMS, lacks_vnni, warn
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import UsageError
from bbt_accel.exporters.convert.calibration import Calibration, Channels, calibration_prompts
from bbt_accel.exporters.convert.formats import fuse_for_ort
from bbt_accel.exporters.convert.int8 import switch, to_int8
from bbt_accel.exporters.convert.int8_calibration import (
    CalibratedStage,
    calibrate,
    calibrate_graph,
    fit_ranges,
    frequent,
)
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.exporters.convert.outlier_channels import (
    SPLIT_SHARE,
    SplitRange,
    extra_columns,
    fit_range,
    split_weight,
)
from bbt_accel.exporters.convert.sensitivity import (
    MEASUREMENTS,
    SwitchableStage,
    by_sensitivity,
    keep_more,
    make_switchable,
    run_from,
)
from bbt_accel.exporters.trace.sessions import Feeds, open_session, run_stages
from bbt_accel.exporters.trace.validate import sample_rows
from bbt_accel.io.progress import silent

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


def fitted_range(x: np.ndarray) -> SplitRange:
    return fit_range(seen(x), extra_columns([seen(x)]))


def ends(fitted: SplitRange) -> tuple[float, float]:
    """The smallest and the largest value that a column holds."""
    return -fitted.scale * float(fitted.zero), fitted.scale * (255 - float(fitted.zero))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_range_does_not_reach_where_no_values_are(sign: int) -> None:
    x = sign * np.abs(np.random.default_rng(0).standard_normal((50, 64), dtype=np.float32))
    x[:, 3] *= 30
    fitted = fitted_range(x)
    assert ends(fitted)[0 if sign > 0 else 1] == 0
    assert 0 < len(fitted.channel) <= 64 * SPLIT_SHARE


def columns(x: np.ndarray, fitted: SplitRange) -> np.ndarray:
    """What the graph computes before it rounds: (T, K) → (T, K + J)."""
    low, high = ends(fitted)
    outliers = x[:, fitted.channel]
    extra = outliers - np.clip(outliers, fitted.times * low, fitted.times * high)
    return np.clip(np.concatenate([x, extra], axis=1), low, high)


def assert_whole(x: np.ndarray, fitted: SplitRange) -> None:
    """The columns of a channel add up to its values, but for a step at the ends of the range."""
    found = columns(x, fitted)
    sums = found[:, : x.shape[1]].copy()
    for j, channel in enumerate(fitted.channel):
        sums[:, channel] += found[:, x.shape[1] + j]
    np.testing.assert_allclose(
        sums, x, atol=float(fitted.scale) * (1 + columns_of(fitted, x).max())
    )


@few
@given(x=activations())
def test_the_columns_of_a_channel_add_up_to_its_values(x: np.ndarray) -> None:
    fitted = fitted_range(x)
    assert_whole(x, fitted)
    assert len(fitted.channel) <= x.shape[1] * SPLIT_SHARE
    assert ends(fitted)[0] <= 0 <= ends(fitted)[1]


@few
@given(x=activations(), seed=st.integers(0, 2**32 - 1))
def test_uses_of_a_weight_share_columns_and_keep_ranges_of_their_own(
    x: np.ndarray, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(x.shape[1])
    uses = [x, 0.01 * x[:, order]]
    extra = extra_columns([seen(use) for use in uses])
    large, small = (fit_range(seen(use), extra) for use in uses)
    np.testing.assert_array_equal(large.channel, small.channel)
    assert small.scale < 0.1 * large.scale
    for use, fitted in zip(uses, (large, small), strict=True):
        assert_whole(use, fitted)


@few
@given(x=activations(), seed=st.integers(0, 2**32 - 1))
def test_an_outlier_is_not_multiplied_by_the_rounding_error_of_one_weight(
    x: np.ndarray, seed: int
) -> None:
    fitted = fitted_range(x)
    x = np.clip(x, *(end * (1 + columns_of(fitted, x)) for end in ends(fitted)))
    exact = np.random.default_rng(seed).uniform(-127, 127, (x.shape[1], 8)).astype(np.float32)
    rows = split_weight(exact, fitted).astype(np.float32)
    assert rows.shape == (x.shape[1] + len(fitted.channel), 8)
    error = columns(x, fitted) @ rows - x @ exact
    # Half a step of every weight, over values that are no larger than the range.
    low, high = ends(fitted)
    bound = (
        0.5 * np.clip(np.abs(x), 0, max(high, -low)).sum(1)
        + max(high, -low) * len(fitted.channel)
        + 1e-2
    )
    assert (np.abs(error) <= bound[:, None]).all()


def columns_of(fitted: SplitRange, x: np.ndarray) -> np.ndarray:
    """Extra columns of each channel, (K,)."""
    return np.bincount(fitted.channel, minlength=x.shape[1])


def matmul(x: np.ndarray, weight: np.ndarray, folder: Path, transpose: bool) -> np.ndarray:
    """x · weight by a quantized graph, calibrated on x."""
    initializer = numpy_helper.from_array(
        np.ascontiguousarray(weight.T) if transpose else weight, "w"
    )
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1) if transpose else None
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", None]) for name in ("x", "y")
    ]
    nodes = [node or helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [initializer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "exact.onnx")
    seen, uses, _ = calibrate_graph(folder / "exact.onnx", [{"x": x}])
    (stage,) = fit_ranges([CalibratedStage("g", folder / "exact.onnx", {}, seen, uses, [])])
    made, quantized, kept = to_int8(stage, frequent([stage]))
    assert (len(quantized), kept) == (1, [])
    onnx.save(made, folder / "made.onnx")
    found: np.ndarray = open_session(folder / "made.onnx").run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("transpose", [False, True])
def test_one_outlier_channel_does_not_cost_the_others_their_precision(
    tmp_path: Path, transpose: bool
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 32), dtype=np.float32)
    x = rng.standard_normal((200, 512), dtype=np.float32)
    plain = matmul(x, weight, tmp_path, transpose) - x @ weight
    x[:, 7] *= 15
    large = matmul(x, weight, tmp_path, transpose) - x @ weight
    assert large.std() < 2 * plain.std()


Tiny = Callable[[str, str, str], Bundle]


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        (("roberta", "bbt", "add"), ["1"]),
        pytest.param(("llama", "bbt", "cat"), ["1", "1", "0"], marks=pytest.mark.slow),
    ],
)
def test_without_vnni_sums_are_wide_where_onnxruntime_can_convert_the_weights(
    optimized: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variant: tuple[str, str, str], wanted: list[str],
) -> None:  # fmt: skip
    """Where the processor does overflow, the first numbers are wrong, and are not compared."""
    made = optimized(variant, "int8", max_rmse=1)
    prompts, rows = np.zeros((2, *made.info.prompt_shape), np.float32), sample_rows(made, 4)
    found, asked, add = [], [], SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        SessionOptions, "add_session_config_entry", lambda *e: (asked.append(e[1:]), add(*e))[1]
    )
    overflows = lacks_vnni()
    warn.cache_clear()
    monkeypatch.setattr("bbt_accel.engines.ort_sessions.lacks_vnni", lacks_vnni.__wrapped__)
    for known in (["AVX2", "AVX-512 VNNI"], ["AVX2"]):
        monkeypatch.setattr("bbt_accel.engines.ort_sessions.features", lambda known=known: known)
        with load_engine(made, "ort", threads=1) as engine, engine.bind(rows) as bound:
            found.append(bound.label_logits(prompts))
        states = [value for name, value in asked if name == WIDE_SUMS]
        assert states == ([] if len(found) == 1 else wanted)
    assert ("has no VNNI" in capsys.readouterr().err) == ("0" in wanted)
    if not overflows:
        np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        (("roberta", "bbt", "add"), "ort"),
        (("roberta", "bbtv2", "add"), "ort"),
        (("roberta", "bbt", "add"), "openvino"),
    ],
)
def test_matmuls_stay_in_fp32_until_the_logits_are_close_enough(
    optimized: Export, variant: tuple[str, str, str], target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")

    def report(made: Bundle) -> tuple[int, int, float]:
        found: Any = made.info.optimization
        return found["quantized"], len(found["fp32_fallback"]), found["logit_rmse"]

    whole, none = (optimized(variant, "int8", target, max_rmse) for max_rmse in (1, 0))
    part = optimized(variant, "int8", target, report(whole)[2] / 2)
    assert report(whole)[1] == 0
    assert 0 < report(part)[1] < report(whole)[0]
    assert report(part)[0] == report(whole)[0] - report(part)[1]
    assert report(none)[0] == 0
    assert report(whole)[2] > report(part)[2] > report(none)[2]
    assert report(none)[2] < 1e-5


def test_the_matmuls_kept_in_fp32_are_those_with_the_largest_error(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny("bert", "bbt", "cat")
    batch, prompts = Calibration.shipped(source).batch(source.info), calibration_prompts(source)
    with ExitStack() as files:
        stages = calibrate(files, source, fuse_for_ort, batch, prompts, tmp_path, silent)
        weights = frequent(stages)
        switchable = make_switchable(stages, weights, tmp_path)
        ranked = by_sensitivity(switchable, weights)
    exact = run_from(switchable, 0, [weight for weight, _ in ranked])
    errors = [
        relative_rmse(run_from(switchable, 0, [weight for weight, _ in ranked[:kept]]), exact)
        for kept in range(len(ranked) + 1)
    ]
    assert errors[-1] == 0 < min(errors[:-1])
    half = len(ranked) // 2
    last = [weight for weight, _ in ranked[-half:]]
    assert errors[half] < min(errors[0], relative_rmse(run_from(switchable, 0, last), exact))
    assert not list(tmp_path.iterdir())


@few
@given(
    errors=st.lists(st.floats(0, 1), min_size=1, max_size=9),
    share=st.sampled_from([0, 0.3, 0.99]),
    data=st.data(),
)
def test_the_next_matmuls_to_keep_leave_the_share_of_the_error_that_is_allowed(
    errors: list[float], share: float, data: st.DataObject
) -> None:
    ranked = [(str(i), error) for i, error in enumerate(errors)]
    kept = data.draw(st.integers(0, len(errors) - 1))
    more = keep_more(ranked, kept, share)
    assert kept < more <= len(errors)
    assert sum(errors[more:]) <= share * sum(errors[kept:])
    assert more == kept + 1 or sum(errors[more - 1 :]) > share * sum(errors[kept:])


@st.composite
def networks(
    draw: st.DrawFn,
) -> tuple[list[SwitchableStage], dict[str, tuple[int, ...]], dict[str, float], list[int]]:
    """Stages whose weights add noise to the logits while they are in int8; the work and noise of
    each; a list of runs.

    Each stage after the first one uses a few weights of the stage before it as well.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [
        (int(t), 8, 8) for t in rng.choice([4, 40, 400], draw(st.integers(1, 3)), replace=False)
    ]
    depth, runs = draw(st.integers(1, 3)), list[int]()
    names = [f"w{i}" for i in range(12 * depth)]
    noise = {name: float(rng.lognormal(-5, 1.5)) for name in names}
    directions = {name: rng.standard_normal((2, 30, 4)) for name in names}
    logits = rng.standard_normal((2, 30, 4))

    def stage(i: int) -> SwitchableStage:
        own = names[max(0, 12 * i - 3) : 12 * (i + 1)]

        def run(feeds: Feeds) -> Feeds:
            runs.append(i)
            rounded = [name for name in own if not feeds[switch(name)]]
            before = feeds.get("label_logits", logits)
            return {
                "label_logits": before + sum(noise[name] * directions[name] for name in rounded)
            }

        return SwitchableStage(run, set(own), [{}])

    work = {name: shapes[i % len(shapes)] for i, name in enumerate(names)}
    return [stage(i) for i in range(depth)], work, noise, runs


@few
@given(network=networks())
def test_few_measurements_rank_the_weights(
    network: tuple[list[SwitchableStage], dict[str, tuple[int, ...]], dict[str, float], list[int]],
) -> None:
    stages, work, noise, runs = network
    ranked = by_sensitivity(stages, work)
    assert runs.count(len(stages) - 1) <= MEASUREMENTS + 1
    assert {weight for weight, _ in ranked} == noise.keys()
    for_their_cost = [error / math.prod(work[weight]) for weight, error in ranked]
    assert for_their_cost == sorted(for_their_cost, reverse=True)
    total = relative_rmse(run_from(stages, 0, []), run_from(stages, 0, noise)) ** 2
    assert sum(error for _, error in ranked) == pytest.approx(total, rel=0.5)


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize(
    "variant", [("llama", "bbt", "cat"), ("gpt2", "bbtv2", "add")], ids="-".join
)
def test_a_weight_has_one_copy_in_int8_or_fp32_over_all_stages(
    optimized: Export, variant: tuple[str, str, str], target: str
) -> None:
    """A decoder's context, prompt and text meet the same weights."""
    if target == "openvino":
        pytest.importorskip("openvino")
    made = optimized(variant, "int8", target, max_rmse=0.3)
    assert made.info.optimization is not None
    assert made.info.optimization["quantized"]
    copies = int8_matrices(made)
    assert copies
    assert len({array[:8, :8].tobytes() for array in copies}) == len(copies)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_decoder_in_int8_takes_less_than_half_of_its_size(
    exported: Callable[..., Bundle], tmp_path: Path, target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 768, "num_hidden_layers": 6}
    tiny_model("llama", **wide).save_pretrained(tmp_path / "wide")
    save_tokenizer("llama", tmp_path / "wide")
    source = exported(tmp_path / "wide", "bbt", "cat", N_PROMPT, ())
    made = optimize_bundle(
        source.path, tmp_path / "made", precision="int8", target=target, max_rmse=1
    )
    assert made.size < 0.5 * source.size


def int8_matrices(bundle: Bundle) -> list[np.ndarray]:
    """All that the graphs of a bundle refer to, each once."""
    found: dict[bytes, np.ndarray] = {}
    reader = StageReader(bundle.path) if bundle.info.target == "openvino" else None
    for stage in bundle.info.stages:
        if reader:
            nodes = reader.read(stage).get_ops()
            arrays = [node.data.copy() for node in nodes if node.get_type_name() == "Constant"]
        else:
            weights = onnx.load(bundle.path / f"{stage}.onnx").graph.initializer
            arrays = [numpy_helper.to_array(tensor) for tensor in weights]
        found |= {
            array.tobytes(): array for array in arrays if array.dtype == np.int8 and array.ndim == 2
        }
    return list(found.values())


def test_relative_rmse_ignores_an_offset_that_all_classes_share() -> None:
    wanted = np.random.default_rng(0).standard_normal((2, 5, 3), dtype=np.float32)
    assert relative_rmse(wanted + 7, wanted) < 1e-5
    assert relative_rmse(wanted * 1.1, wanted) == pytest.approx(0.1, rel=1e-3)


def test_a_negative_limit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_rmse must be 0 or more"):
        optimize_bundle(
            tiny("bert", "bbt", "cat").path, tmp_path / "made", precision="int8", max_rmse=-0.1
        )


def test_an_int8_engine_gives_a_candidate_the_same_logits_alone_and_in_a_population(
    tiny: Tiny, optimized: Export
) -> None:
    source, made = tiny("t5", "bbt", "add"), optimized(("t5", "bbt", "add"), "int8")
    batch, prompts = Calibration.shipped(source).batch(source.info), calibration_prompts(source)
    together = run_stages(made, batch, prompts)
    for i in range(len(prompts)):
        np.testing.assert_array_equal(run_stages(made, batch, prompts[i : i + 1])[0], together[i])
