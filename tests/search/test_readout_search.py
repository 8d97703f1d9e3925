"""Which prompt and which readout a search with a fitted readout keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from search_parts import batch, job, search_bundle

from bbt_accel.core.logits import log_loss
from bbt_accel.core.objective import Objective
from bbt_accel.core.settings import ReadoutChoice, ReadoutName, Settings
from bbt_accel.search.evaluator import Evaluator
from bbt_accel.search.history import History
from bbt_accel.search.loop import BestPrompt, SearchOutcome, better, on_plateau
from bbt_accel.search.readout_fitting import fit
from bbt_accel.search.readout_search import ReadoutSearch
from bbt_accel.search.run import ReadoutRecord, TriedReadout

TRAIN, DEV = batch(16, seed=0), batch(16, seed=1)
START, FOUND = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
TRIED = [TriedReadout(name="calibrated", log_loss=0.7, score=0.5, seconds=0)]


def readout_search(
    tmp_path: Path,
    margins: Any,
    readout: ReadoutChoice = "auto",
    objective: Objective | None = None,
) -> ReadoutSearch:
    """At `START` the label logits say nothing; at `FOUND` that of the right class is higher by its
    row's margin.
    """

    class Outputs:
        def outputs(self, prompt: Any, states: bool) -> dict[str, Any]:
            rng, targets = np.random.default_rng(0), np.concatenate([TRAIN.targets, DEV.targets])
            margin = np.broadcast_to(margins, len(targets)) * prompt.any()
            logits = np.hstack(
                [margin[:, None] * np.eye(2)[targets], rng.standard_normal((len(targets), 20))]
            )
            state = rng.standard_normal((len(targets), 3)) + targets[:, None]
            return {"label_logits": logits, "readout_state": state, "mean_state": state}

    made = job(search_bundle(tmp_path / "bundle"), Settings(readout=readout), TRAIN, DEV)
    if objective is not None:
        object.__setattr__(made, "objective", objective)
    former = ReadoutRecord(name="calibrated", tried=TRIED) if readout == "auto" else ReadoutRecord()
    return ReadoutSearch(cast(Evaluator, Outputs()), made, START, former)


@pytest.mark.parametrize(
    ("fall", "spread", "kept"), [(0.5, 0.1, True), (0.1, 2.0, False), (-0.1, 0.05, False)]
)
def test_auto_keeps_a_prompt_that_lowers_the_dev_loss_by_more_than_its_standard_error(
    tmp_path: Path, fall: float, spread: float, kept: bool
) -> None:
    margins = fall + spread * np.tile([1, 1, -1, -1], 8)
    search = readout_search(tmp_path, margins)
    loss, score = search.dev(FOUND)
    outcome, _, record = search.finish(
        SearchOutcome(BestPrompt(FOUND, 3, score, loss)), searched=True
    )
    assert (outcome.best.prompt is FOUND, record.searched) == (kept, kept)
    assert (
        "its prompt is kept" if kept else "the prompt without a search is kept"
    ) in record.reason


def test_a_named_readout_keeps_the_prompt_with_the_lowest_dev_loss(tmp_path: Path) -> None:
    search = readout_search(tmp_path, 0.1 + 2.0 * np.tile([1, 1, -1, -1], 8), "calibrated")
    outcome, _, _ = search.finish(
        SearchOutcome(BestPrompt(FOUND, 3, *search.dev(FOUND)[::-1])), searched=True
    )
    assert outcome.best.prompt is FOUND


@pytest.mark.parametrize("name", ["calibrated", "state", "ensemble"])
def test_dev_scores_are_of_a_readout_fitted_on_the_train_rows_and_the_last_fit_is_on_all(
    tmp_path: Path, name: ReadoutName
) -> None:
    search = readout_search(tmp_path, 0.0, name)
    train, dev = search.at_start[np.arange(16)], search.at_start[np.arange(16, 32)]
    assert search.start.dev_loss == log_loss(fit(name, train).scores(dev.outputs), dev.targets)
    _, readout, _ = search.finish(SearchOutcome(search.start), searched=False)
    np.testing.assert_array_equal(
        readout.scores(dev.outputs), fit(name, search.at_start).scores(dev.outputs)
    )


def test_dev_scores_for_f1_do_not_depend_on_the_class_frequencies_elsewhere(tmp_path: Path) -> None:
    """The few-shot rows have their own; a threshold for others would make a good classifier look
    like a bad one.
    """
    plain, rare = (
        readout_search(tmp_path / str(shares), 0.0, "state", Objective("ce", "f1", shares))
        for shares in (None, [99, 1])
    )
    assert rare.start.dev_score == plain.start.dev_score
    ends = [
        search.finish(SearchOutcome(search.start), searched=False)[1] for search in (plain, rare)
    ]
    biases = [readout.arrays["bias"][1] - readout.arrays["bias"][0] for readout in ends]
    assert biases[1] < biases[0] - 1


def test_an_interruption_is_the_reason_where_no_prompt_was_scored(tmp_path: Path) -> None:
    search = readout_search(tmp_path, 0.0)
    _, _, record = search.finish(SearchOutcome(search.start, interrupted=True), searched=True)
    assert record.reason == "the search was interrupted"


@pytest.mark.parametrize(("by_loss", "first"), [(True, False), (False, True)])
def test_prompts_are_compared_by_score_and_for_a_fitted_readout_by_loss(
    by_loss: bool, first: bool
) -> None:
    accurate, likely = BestPrompt(START, 1, 0.9, 0.6), BestPrompt(FOUND, 2, 0.8, 0.5)
    assert (better(accurate, likely, by_loss) is accurate) == first
    assert better(None, likely, by_loss) is likely
    assert (
        better(likely, BestPrompt(START, 3, 0.8, 0.5), by_loss) is likely
    )  # of two equal ones the earlier


@pytest.mark.parametrize(
    ("losses", "plateau"),
    [
        ([0.9, 0.95, 0.95, 0.95, 0.95], False),  # four no lower than the best
        ([0.9, 0.95, 0.95, 0.95, 0.95, 0.95], True),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9], True),  # equal is no lower
        ([0.9, 0.95, 0.95, 0.95, 0.95, 0.89], False),
        ([1.0, 1.0, 1.0, 1.0, 1.0], True),  # no lower than without a search
        ([], False),
    ],
)
def test_a_plateau_is_five_dev_losses_in_a_row_that_are_no_lower(
    losses: list[float], plateau: bool
) -> None:
    history = SimpleNamespace(
        generations=[SimpleNamespace(dev_loss=loss) for loss in (None, *losses)]
    )
    assert on_plateau(cast(History, history), BestPrompt(START, None, 0.5, 1.0)) == plateau
