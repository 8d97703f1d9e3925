"""The readout of a search: chosen by cross-validation, scored on the dev rows, fitted on all rows
at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

import numpy as np

from bbt_accel.core.batch import Float32, Float64, Int64
from bbt_accel.core.logits import require_finite, row_losses
from bbt_accel.core.settings import FITTED, ReadoutName
from bbt_accel.search.evaluator import Evaluator, Job
from bbt_accel.search.loop import BestPrompt, SearchOutcome
from bbt_accel.search.readout import Readout, reads_states
from bbt_accel.search.readout_fitting import LabelledRows, fit_for, held_out
from bbt_accel.search.run import ReadoutRecord, TriedReadout


class ReadoutSearch:
    """What surrounds a search whose readout is fitted: the choice of the readout, dev scores, and
    the last fit.

    start: the prompt without a search. Its outputs take the first call.
    former: the record of the run that is continued, if any, whose choice is kept.
    """

    def __init__(
        self, evaluator: Evaluator, job: Job, start: Float32, former: ReadoutRecord
    ) -> None:
        self.evaluator, self.job = evaluator, job
        self.few_shot = replace(job.objective, class_shares=None)
        """Scores the few-shot rows, whose classes are as frequent as they are there."""
        self.train, self.dev_rows = (
            np.arange(len(job.train)),
            np.arange(len(job.train), len(job.rows)),
        )
        named = job.settings.readout
        self.names: tuple[ReadoutName, ...] = FITTED if named == "auto" else (named,)
        self.at_start = self.rows(start)
        self.tried: list[TriedReadout] = list(former.tried)
        known = former.name if former.tried else None
        self.name: ReadoutName = (known or self.choose()) if named == "auto" else named
        """The readout of the search."""
        self.names = (self.name,)
        self.start_losses, score = self.dev_losses(self.at_start)
        self.start = BestPrompt(start, None, score, float(self.start_losses.mean()))
        """The prompt that the search has to surpass."""

    def rows(self, prompt: Float32) -> LabelledRows:
        """All rows with a prompt, and of the outputs what the readouts need. Raises
        NonFiniteLoss.
        """
        outputs = self.evaluator.outputs(prompt, any(map(reads_states, self.names)))
        for value in outputs.values():
            require_finite(value, "a logit or a hidden state")
        batch, classes = self.job.rows, self.job.classes
        words = batch.label_token_ids[len(classes) :]
        return LabelledRows(outputs, batch.targets, classes, words, self.job.settings.seed)

    def choose(self) -> ReadoutName:
        """Try every readout without a search, by its scores of train and dev rows that it was not
        fitted on.
        """
        losses, targets = dict[ReadoutName, Float64](), self.job.rows.targets
        for name in self.names:
            started = perf_counter()
            scores = held_out(name, self.at_start)
            losses[name] = row_losses(scores, targets)
            score = self.score(scores + self.few_shot.class_bias(scores, targets), targets)
            found = {
                "log_loss": float(losses[name].mean()),
                "score": score,
                "seconds": perf_counter() - started,
            }
            self.tried.append(TriedReadout(name=name, **found))
        return chosen(losses)

    def dev(self, prompt: Float32) -> tuple[float, float]:
        """Loss and metric on the dev rows, with the readout fitted on the train rows at this
        prompt.
        """
        losses, metric = self.dev_losses(self.rows(prompt))
        return float(losses.mean()), metric

    def dev_losses(self, rows: LabelledRows) -> tuple[Float64, float]:
        train, dev = rows[self.train], rows[self.dev_rows]
        readout, bias = fit_for(self.few_shot, self.name, train)
        scores = readout.scores(dev.outputs)
        return row_losses(scores, dev.targets), self.score(scores + bias, dev.targets)

    def score(self, scores: Float64, targets: Int64) -> float:
        return float(self.few_shot.score(scores[None], targets)[1][0])

    def finish(
        self, outcome: SearchOutcome, searched: bool
    ) -> tuple[SearchOutcome, Readout, ReadoutRecord]:
        """The readout fitted on all rows, at the prompt that was found or, with `auto`, perhaps at
        the one before.

        A search minimizes a loss of few rows, so the best of its prompts is better on the dev rows
        by chance. `auto` keeps it if the mean loss of the dev rows fell by more than the standard
        error of the difference.
        """
        best, rows = outcome.best, self.at_start
        reason = (
            "the search was interrupted" if outcome.interrupted else "the budget allows no search"
        )
        if best.generation is not None:
            rows, reason = self.rows(best.prompt), "the search lowered the loss on the dev rows"
        elif searched and not outcome.interrupted:
            reason = "the search did not lower the loss on the dev rows"
        if best.generation is not None and self.job.settings.readout == "auto":
            fall, error = mean_and_error(self.start_losses - self.dev_losses(rows)[0])
            reason = (
                f"the search changed the loss on the dev rows by {-fall:+.3f} (standard "
                f"error {error:.3f})"
            )
            kept = fall > error
            reason += "; its prompt is kept" if kept else "; the prompt without a search is kept"
            if not kept:
                best, rows = self.start, self.at_start
        if outcome.stopped:
            reason = f"{reason}; it stopped on a plateau"
        readout, bias = fit_for(self.job.objective, self.name, rows)
        if self.job.objective.metric == "f1":
            threshold = 1 / (1 + np.exp(bias[1]))
            reason = (
                f"{reason}; for F1, class 1 is predicted where its fitted probability was "
                f"above {threshold:.2f}"
            )
        record = ReadoutRecord(
            name=self.name, tried=self.tried, searched=best.generation is not None, reason=reason
        )
        return replace(outcome, best=best), readout.biased(bias), record


def chosen(losses: Mapping[ReadoutName, Float64]) -> ReadoutName:
    """The ensemble, unless the lowest loss on held-out rows is lower by more than the standard
    error of the difference.

    On so few rows the lowest of eight losses is often that of another readout by chance. losses: of
    each row.
    """
    best = min(losses, key=lambda name: losses[name].mean())
    excess, error = mean_and_error(losses["ensemble"] - losses[best])
    return best if excess > error else "ensemble"


def mean_and_error(values: Float64) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
