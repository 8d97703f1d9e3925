"""Readouts: what is fitted on a few labelled rows, and how a search uses it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from search_parts import SETTINGS, search_bundle, task_file

from bbt_accel import tune
from bbt_accel.core.logits import batch_calibration, class_logits, log_loss, log_softmax
from bbt_accel.core.objective import Objective, f1_bias
from bbt_accel.core.settings import READOUTS, ReadoutName
from bbt_accel.errors import RunError, UsageError
from bbt_accel.predict.inference import evaluate, predict_texts
from bbt_accel.search import readout_fitting
from bbt_accel.search.readout import Readout
from bbt_accel.search.readout_fitting import (
    BIAS_PENALTY,
    LabelledRows,
    fit,
    fit_bias,
    fit_for,
    fit_temperature,
    held_out,
)
from bbt_accel.search.readout_search import chosen
from bbt_accel.search.run import Run
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.task import load_task

FITTED = [name for name in READOUTS if name != "verbalizer"]
seeds = st.integers(0, 2**32 - 1)


def rows(
    seed: int, count: int = 48, classes: int = 3, hidden: int = 12, signal: float = 2.0
) -> tuple[Any, Any]:
    """Outputs whose states say something of the class, label logits less, with a bias towards the
    first label word.
    """
    rng, targets = np.random.default_rng(seed), np.arange(count) % classes
    centres = rng.standard_normal((classes, hidden))
    state = rng.standard_normal((count, hidden)) + signal * centres[targets]
    logits = (
        rng.standard_normal((count, classes))
        + 1.5 * np.eye(classes)[targets]
        + [4.0, *[0.0] * (classes - 1)]
    )
    words = state @ rng.standard_normal((hidden, 20))
    outputs = {
        "label_logits": np.hstack([logits, words]),
        "readout_state": state,
        "mean_state": 3 + state[:, ::-1] * 5,
    }
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}, targets


def labelled(seed: int = 0, classes: int = 3) -> LabelledRows:
    return labelled_rows(*rows(seed, classes=classes))


def labelled_rows(outputs: Any, targets: Any) -> LabelledRows:
    return LabelledRows(outputs, targets, np.arange(targets.max() + 1), np.arange(100, 120), seed=0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, classes=st.integers(2, 5), scale=st.floats(0.1, 30))
def test_the_class_bias_minimizes_the_penalized_cross_entropy(
    seed: int, classes: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), rng.integers(0, classes, 3 * classes)])
    logits = scale * rng.standard_normal((len(targets), classes))
    bias, loss = fit_bias(logits, targets)
    start = batch_calibration(logits)

    def objective(b: np.ndarray) -> float:
        return log_loss(logits + b, targets) + BIAS_PENALTY * float(((b - start) ** 2).sum())

    assert loss == pytest.approx(objective(bias))
    assert loss <= minimize(objective, start, tol=1e-12).fun + 1e-7


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_readout_generalizes_better_than_label_words_with_a_bias(
    name: ReadoutName,
) -> None:
    plain, found = held_out("verbalizer", labelled()), held_out(name, labelled())
    targets = rows(0)[1]
    assert log_loss(found, targets) < log_loss(plain, targets)
    assert (found.argmax(1) == targets).mean() > (plain.argmax(1) == targets).mean()


@pytest.mark.parametrize("name", READOUTS)
def test_fitting_again_gives_the_same_numbers(name: ReadoutName) -> None:
    outputs, found = rows(1)[0], []
    for _ in range(2):
        readout_fitting._regression.cache_clear()
        found.append((held_out(name, labelled()), fit(name, labelled()).scores(outputs)))
    np.testing.assert_array_equal(*(held for held, _ in found))
    np.testing.assert_array_equal(*(scores for _, scores in found))


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_is_stored_and_read_back(name: ReadoutName, tmp_path: Path) -> None:
    readout = fit(name, labelled())
    readout.save(tmp_path / "readout.safetensors")
    again, (outputs, _) = Readout.load(tmp_path / "readout.safetensors"), rows(1)
    np.testing.assert_array_equal(again.scores(outputs), readout.scores(outputs))
    assert again.name == name


@pytest.mark.parametrize("name", [name for name in FITTED if name != "calibrated"])
def test_held_out_scores_do_not_know_the_label_of_their_row(name: ReadoutName) -> None:
    """With labels drawn at random, the rows that a readout was fitted on look better than chance,
    others do not.
    """
    rng, targets = np.random.default_rng(3), np.random.default_rng(0).permutation(np.arange(60) % 2)
    outputs = {"label_logits": 0.1 * rng.standard_normal((60, 402))}
    outputs |= {state: rng.standard_normal((60, 200)) for state in ("readout_state", "mean_state")}
    shown = LabelledRows(outputs, targets, np.arange(2), np.arange(400), seed=0)
    assert (fit(name, shown).scores(outputs).argmax(1) == targets).mean() > 0.8
    assert (held_out(name, shown).argmax(1) == targets).mean() < 0.7


def test_the_held_out_scores_of_the_calibrated_readout_are_by_biases_of_the_other_folds() -> None:
    shown = labelled()
    biases = held_out("calibrated", shown) - class_logits(
        shown.outputs["label_logits"], shown.classes
    )
    assert 2 < len({bias.tobytes() for bias in biases.round(9)}) <= readout_fitting.FOLDS
    whole = fit("calibrated", shown).arrays["bias"]
    assert not np.isclose(biases, whole, atol=1e-9).all(1).any()


def test_two_states_have_the_mean_of_the_scores_by_each() -> None:
    shown = labelled()
    both, *each = (fit(name, shown).scores(shown.outputs) for name in ("states", "state", "mean"))
    np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_for_the_features_as_they_are(classes: int) -> None:
    """Scale and offset of a feature change nothing: standardization is part of the weights."""
    shown = labelled(classes=classes)
    moved = {
        **shown.outputs,
        "mean_state": shown.outputs["mean_state"] * np.float32(1000) + np.float32(7),
    }
    same, other = (fit("mean", replace(shown, outputs=o)).scores(o) for o in (shown.outputs, moved))
    np.testing.assert_allclose(log_softmax(same), log_softmax(other), atol=1e-2)


def test_the_words_that_are_found_are_those_that_tell_the_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bbt_accel.search.readout_fitting.FOUND_WORDS", 2)
    rng, targets = np.random.default_rng(0), np.arange(60) % 2
    words = rng.standard_normal((60, 30)) + 5 * rng.standard_normal(
        30
    )  # some are likely everywhere
    words[:, [3, 17]] += 3 * (targets == 0)[:, None]
    words[:, [8, 9]] += 3 * (targets == 1)[:, None]
    outputs = {"label_logits": np.hstack([np.zeros((60, 2)), words]).astype(np.float32)}
    found = fit("found", LabelledRows(outputs, targets, np.arange(2), np.arange(30), seed=0))
    assert [np.flatnonzero(column).tolist() for column in found.arrays["weight"].T] == [
        [3, 17],
        [8, 9],
    ]
    assert (found.scores(outputs).argmax(1) == targets).mean() > 0.9


def test_an_ensemble_multiplies_the_probabilities_of_its_parts() -> None:
    """Up to the temperature: the logarithms of their products are proportional, after centring over
    the classes.
    """
    train, outputs = labelled(), rows(1)[0]
    parts = [fit(name, train).scores(outputs) for name in ("calibrated", "state", "mean")]
    product = np.sum([log_softmax(scores) for scores in parts], axis=0)
    found = fit("ensemble", train).scores(outputs)
    product, found = (x - x.mean(1, keepdims=True) for x in (product, found))
    factor = float((product * found).sum() / (product**2).sum())
    assert 0.05 <= factor <= 20
    np.testing.assert_allclose(found, factor * product, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, classes=st.integers(2, 5), scale=st.floats(0.1, 30))
def test_the_temperature_minimizes_the_cross_entropy(seed: int, classes: int, scale: float) -> None:
    rng, targets = np.random.default_rng(seed), np.arange(6 * classes) % classes
    scores = scale * (rng.standard_normal((len(targets), classes)) + np.eye(classes)[targets])
    t = fit_temperature(scores, targets)
    if (scores.argmax(1) == targets).all():  # so few rows would have it as sure as can be
        assert t == 1
        return
    found = log_loss(t * scores, targets)
    assert found <= min(log_loss(t * scores, targets) for t in np.geomspace(0.05, 20, 200)) + 1e-9


@settings(max_examples=50, deadline=None)
@given(seed=seeds, rows=st.integers(2, 9), scale=st.floats(0.01, 20), share=st.floats(0.01, 0.99))
def test_no_other_predictions_have_a_higher_expected_f1(
    seed: int, rows: int, scale: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = scale * rng.standard_normal((rows, 2)), rng.permutation(np.arange(rows) % 2)
    own = targets.mean()
    weight = np.where(targets == 1, share / own, (1 - share) / (1 - own))
    odds = (
        np.exp(scores[:, 1] - scores[:, 0]) * share / (1 - share) * (1 - own) / own
    )  # Bayes' rule
    p = odds / (1 + odds)

    def expected(predicted: Any) -> float:
        return float(
            2 * (weight * p)[predicted].sum() / (weight[predicted].sum() + (weight * p).sum())
        )

    predicted = (scores + f1_bias(scores, targets, share)).argmax(1) == 1
    every = [np.array(some, bool) for some in product([0, 1], repeat=rows)]
    # A row exactly at the threshold changes nothing, and rounding decides its class.
    assert expected(predicted) == pytest.approx(max(map(expected, every)), abs=1e-9)


def test_class_1_is_predicted_above_a_third_if_nothing_is_known_above_half_if_all_is() -> None:
    targets = np.arange(10) % 2
    for scores, threshold in ((np.zeros((10, 2)), 1 / 3), (50.0 * np.eye(2)[targets], 1 / 2)):
        assert f1_bias(scores, targets)[1] == pytest.approx(np.log(1 / threshold - 1), abs=1e-9)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.7])
def test_f1_is_higher_with_the_bias_for_the_share_of_class_1(share: float) -> None:
    """Fitted on balanced rows, used where class 1 has another share."""
    rng = np.random.default_rng(0)

    def drawn(count: int, share: float) -> tuple[Any, Any]:
        targets = (rng.random(count) < share).astype(int)
        x = rng.standard_normal(count) + targets - 0.5
        return np.stack(
            [np.zeros(count), x], axis=1
        ), targets  # x is the log-odds of balanced classes

    scores, targets = drawn(20_000, share)
    f1 = {
        name: float(Objective("ce", "f1").score((scores + bias)[None], targets)[1][0])
        for name, bias in {"none": np.zeros(2), "own": f1_bias(*drawn(20_000, 0.5), share)}.items()
    }
    assert f1["own"] > f1["none"] + 0.01


@pytest.mark.parametrize("name", FITTED)
def test_the_bias_for_f1_is_that_of_the_held_out_scores_and_accuracy_needs_none(
    name: ReadoutName,
) -> None:
    shown = labelled(classes=2)
    for objective in (
        Objective("ce", "accuracy"),
        Objective("ce", "f1"),
        Objective("ce", "f1", (95, 5)),
    ):
        readout, bias = fit_for(objective, name, shown)
        np.testing.assert_array_equal(
            bias, objective.class_bias(held_out(name, shown), shown.targets)
        )
        np.testing.assert_array_equal(
            readout.scores(shown.outputs), fit(name, shown).scores(shown.outputs)
        )
    assert not fit_for(Objective("ce", "accuracy"), name, shown)[1].any()


def test_the_bias_for_other_class_frequencies_is_that_of_bayes_rule() -> None:
    """Scores with the rows' own frequencies as their prior become those of rows with other
    shares.
    """
    rng, shares = np.random.default_rng(0), np.array([0.7, 0.2, 0.1])
    targets = np.arange(6000) % 3
    x = (
        rng.standard_normal((6000, 3)) + np.eye(3)[targets]
    )  # whose log-likelihood ratios are x itself
    bias = Objective(class_shares=[7, 2, 1]).class_bias(x, targets)
    np.testing.assert_allclose(
        bias - bias.mean(), np.log(shares) - np.log(shares).mean(), atol=0.05
    )
    assert not Objective().class_bias(x, targets).any()
    assert not Objective(class_shares=[5, 5, 5]).class_bias(x, targets).any()


@pytest.mark.parametrize("name", FITTED)
def test_a_readout_of_unequally_frequent_classes_can_be_used_for_equally_frequent_ones(
    name: ReadoutName,
) -> None:
    drawn = labelled_rows(*rows(0, count=2000, classes=2, signal=0.4))
    shown, others = drawn[np.r_[0:128:2, 1:17:2]], drawn[np.arange(128, 2000)]  # 64 rows and 8
    targets = others.targets
    for shares in ([1, 1], [8, 1]):
        readout, bias = fit_for(Objective(class_shares=shares), name, shown)
        scores = readout.scores(others.outputs) + bias
        weight = np.array(shares)[targets] / np.array(shares)[targets].sum()
        mean = float(weight @ np.exp(log_softmax(scores))[:, 1])
        assert mean == pytest.approx(shares[1] / sum(shares), abs=0.12)
        if shares == [1, 1]:
            assert (scores.argmax(1) == targets).mean() > 0.6  # not always the same class


def test_the_only_row_of_a_class_has_no_say_in_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, targets = np.random.default_rng(0), np.array([0] * 16 + [1] * 16 + list(range(2, 10)))
    x = rng.standard_normal((len(targets), 40)) + 0.5 * rng.standard_normal((10, 40))[targets]

    def loss() -> float:
        readout_fitting._regression.cache_clear()
        _, _, scores = readout_fitting.fit_regression(x, targets, seed=0)
        return log_loss(scores[:32], targets[:32])

    chosen, by_penalty = loss(), []
    for penalty in readout_fitting.PENALTIES:
        monkeypatch.setattr(readout_fitting, "PENALTIES", (penalty,))
        by_penalty.append(loss())
    assert chosen == min(by_penalty)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("rare", [1, 2])
def test_rare_classes_are_held_out_as_far_as_they_can_be(name: ReadoutName, rare: int) -> None:
    shown = labelled(classes=3)
    counts = {0: 99, 1: 9, 2: rare}
    kept = np.concatenate([np.flatnonzero(shown.targets == c)[: counts[c]] for c in counts])
    scores = held_out(name, shown[kept])
    assert scores.shape == (len(kept), 3)
    assert np.isfinite(scores).all()
    assert (scores[shown.targets[kept] == 0].argmax(1) == 0).mean() > 0.5


@pytest.mark.parametrize("name", FITTED)
def test_a_bias_is_added_to_the_scores(name: ReadoutName) -> None:
    readout, (outputs, _), bias = fit(name, labelled()), rows(1), np.array([0.5, -2.0, 0.0])
    np.testing.assert_allclose(
        readout.biased(bias).scores(outputs), readout.scores(outputs) + bias, atol=1e-12
    )


def test_a_class_with_several_words_has_the_mean_of_their_logits() -> None:
    logits = np.array([[1.0, 3.0, 5.0, 9.0]])
    np.testing.assert_array_equal(class_logits(logits, np.array([0, 0, 1])), [[2.0, 5.0]])


# In a run


@pytest.fixture
def start(tmp_path: Path) -> Any:
    bundle, task = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")

    def call(output: str = "run", **given: Any) -> Run:
        return tune(
            bundle, task, data=tmp_path / "data", engine="dummy", output=tmp_path / output,
            settings={**SETTINGS, **given}, progress=False,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("name", ["auto", *FITTED])
def test_a_run_keeps_its_readout_for_everything_after(start: Any, name: str) -> None:
    run = start(readout=name)
    assert run.readout.name == run.info.readout.name == Run.read(run.path).readout.name
    assert run.info.readout.name == name or name == "auto"
    assert evaluate(run.path)["readout"] == run.readout.name
    answers = predict_texts(run.path, [{"text": "w1 w2"}, {"text": "w3"}])
    assert [sum(a["probabilities"].values()) for a in answers] == pytest.approx([1, 1])


@pytest.mark.parametrize("name", ["auto", "calibrated", "prototype"])
def test_with_f1_as_the_metric_class_1_is_predicted_above_a_lower_probability(
    start: Any, name: str, tmp_path: Path
) -> None:
    """The search, which minimizes the cross entropy, is the same; so are the odds of two rows."""
    plain = start("plain", readout=name)
    file = tmp_path / "data" / "task.toml"
    file.write_text(file.read_text().replace('"accuracy"', '"f1"'))
    found = start("f1", readout=name)
    assert [g.losses for g in found.history] == [g.losses for g in plain.history]
    threshold = float(
        re.search(r"its fitted probability was above (.*)", found.info.readout.reason)[1]
    )
    texts = [{"text": f"w{i} w{i + 1}"} for i in range(20)]
    before, after = (
        np.array([list(row["probabilities"].values()) for row in predict_texts(run.path, texts)])
        for run in (plain, found)
    )
    shift = np.log(after[:, 1] / after[:, 0]) - np.log(before[:, 1] / before[:, 0])
    np.testing.assert_allclose(shift, np.log(1 / threshold - 1), atol=0.03)
    assert 1 / 3 - 0.01 < threshold < 0.5
    assert "probability" not in plain.info.readout.reason


def test_auto_tries_every_readout(start: Any) -> None:
    record = start(readout="auto").info.readout
    assert [tried.name for tried in record.tried] == FITTED
    assert record.name in {"ensemble", min(record.tried, key=lambda tried: tried.log_loss).name}
    assert record.reason


@pytest.mark.parametrize(
    ("advantage", "spread", "expected"),
    [(0.1, 0.2, "mean"), (0.1, 2.0, "ensemble"), (-0.1, 0.2, "ensemble")],
)
def test_auto_takes_the_ensemble_unless_another_is_clearly_better(
    advantage: float, spread: float, expected: ReadoutName
) -> None:
    noise = np.tile(
        [spread, -spread], 32
    )  # of the difference: its standard error is about spread / 8
    ensemble = np.linspace(0.2, 2, 64)
    assert (
        chosen({"words": ensemble + 1, "mean": ensemble - advantage + noise, "ensemble": ensemble})
        == expected
    )


def test_one_call_is_enough_for_a_fitted_readout(start: Any) -> None:
    run = start(readout="calibrated", budget=1)
    assert (run.info.calls, run.history, run.info.best.generation) == (1, [], None)
    assert (run.prompt == 0).all()
    assert not run.info.readout.searched


def test_a_search_counts_the_call_that_fits_the_readout(start: Any) -> None:
    run = start(readout="calibrated", budget=20, popsize=4)
    assert [g.calls for g in run.history] == [5, 9, 13, 17]
    assert run.info.calls == 17


def test_the_loss_of_a_search_with_a_fitted_readout_ignores_what_a_class_bias_undoes(
    start: Any,
) -> None:
    """The dummy engine's prompts add the same to the logits of every row."""
    fitted, plain = (
        start("fitted", readout="calibrated", budget=41),
        start("plain", readout="verbalizer", budget=40),
    )
    assert np.ptp([loss for g in fitted.history for loss in g.losses]) < 1e-6
    assert np.ptp([loss for g in plain.history for loss in g.losses]) > 1e-3
    assert fitted.info.settings.loss == "ce"


def test_auto_stops_on_a_plateau_and_says_so(start: Any) -> None:
    run = start(readout="auto", budget=4001)
    assert run.info.calls < 4001
    assert "plateau" in run.info.readout.reason


def test_other_losses_are_for_the_verbalizer(start: Any) -> None:
    with pytest.raises(UsageError, match="--loss hinge is for --readout verbalizer"):
        start(readout="states", loss="hinge")
    run = start(readout=None, loss="hinge")
    assert (run.info.settings.loss, run.info.settings.readout) == ("hinge", "verbalizer")
    assert start("other", readout=None, loss="ce").info.settings.readout == "auto"


def test_the_paper_preset_is_the_search_without_a_fitted_readout(
    start: Any, tmp_path: Path
) -> None:
    own = {name: value for name, value in SETTINGS.items() if name != "readout"}
    arguments: dict[str, Any] = {"data": tmp_path / "data", "engine": "dummy", "progress": False}
    paper = tune(
        tmp_path / "bundle", tmp_path / "data" / "task.toml", output=tmp_path / "p",
        preset="paper", settings=own,
        **arguments,
    )  # fmt: skip
    assert paper.info.settings.readout == "verbalizer"
    assert [g.losses for g in paper.history] == [g.losses for g in start("other").history]


def test_a_damaged_readout_is_refused(start: Any) -> None:
    run = start(readout="state")
    (run.path / "readout.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"readout\.safetensors is not the readout"):
        Run.read(run.path)


def test_a_task_may_have_several_label_words_for_a_class(tmp_path: Path) -> None:
    bundle, file = search_bundle(tmp_path / "bundle"), task_file(tmp_path / "data")
    file.write_text(
        file.read_text().replace(
            'masked = ["bad", "great"]', 'masked = [["bad", "w1"], ["great", "w2"]]'
        )
    )
    encoder = Encoder(bundle, load_task(file))
    assert (encoder.label_words, encoder.classes.tolist()) == (["bad", "great"], [0, 0, 1, 1])
    arguments: dict[str, Any] = {"data": tmp_path / "data", "engine": "dummy", "progress": False}
    for name in ("verbalizer", "calibrated"):
        run = tune(
            bundle,
            file,
            output=tmp_path / name,
            settings={**SETTINGS, "readout": name},
            **arguments,
        )
        assert evaluate(run.path)["rows"] == 70
