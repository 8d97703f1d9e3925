"""The readout of a search: chosen by cross-validation, scored on the dev rows, fitted on all rows at the end."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.errors import NonFiniteLoss
from bbt_accel.readout import Outputs, Readout, fit, log_loss, reads_states, row_losses
from bbt_accel.run import ReadoutRecord, TriedReadout
from bbt_accel.settings import READOUTS, ReadoutName
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.search import BestPrompt, Outcome

TRIED = tuple(name for name in READOUTS if name != "verbalizer")
"""What `auto` tries: a class bias costs nothing."""


class ReadoutSearch:
    """What surrounds a search whose readout is fitted: the choice of the readout, dev scores, and the last fit.

    start: the prompt without a search. Its outputs take the first call.
    """

    def __init__(self, evaluator: Evaluator, job: Job, start: Float32) -> None:
        self.evaluator, self.job, self.prompt = evaluator, job, start
        self.targets, self.train = job.rows.targets, np.arange(len(job.train))
        self.dev_rows = np.arange(len(job.train), len(job.rows))
        named = job.settings.readout
        self.names: tuple[ReadoutName, ...] = TRIED if named == "auto" else (named,)
        self.at_start = self.outputs(start)
        self.tried = self.try_readouts() if named == "auto" else []
        self.name: ReadoutName = min(self.tried, key=lambda t: t.log_loss).name if self.tried else self.names[0]
        """The readout of the search."""
        self.names = (self.name,)

    def outputs(self, prompt: Float32) -> dict[str, Float32]:
        """Of all rows, what the readouts need. Raises NonFiniteLoss."""
        found = self.evaluator.outputs(prompt, any(map(reads_states, self.names)))
        for value in found.values():
            if not np.isfinite(value).all():
                raise NonFiniteLoss(
                    "a logit or a hidden state is NaN or infinite; use an fp32 bundle, or a smaller --sigma"
                )
        return found

    def fit(self, name: ReadoutName, outputs: Outputs, rows: np.ndarray) -> tuple[Readout, np.ndarray]:
        words = self.job.rows.label_token_ids[len(self.job.classes) :]
        some = {key: value[rows] for key, value in outputs.items()}
        return fit(name, some, self.targets[rows], self.job.classes, words, self.job.settings.seed)

    def try_readouts(self) -> list[TriedReadout]:
        """Every readout, fitted on train and dev rows without a search, by its scores of rows it was not fitted on."""
        tried = []
        for name in self.names:
            started = perf_counter()
            _, scores = self.fit(name, self.at_start, np.arange(len(self.targets)))
            _, metric = self.job.objective.score(scores[None], self.targets)
            seconds = perf_counter() - started
            tried.append(
                TriedReadout(name=name, log_loss=log_loss(scores, self.targets), score=metric[0], seconds=seconds)
            )
        return tried

    def dev(self, prompt: Float32) -> tuple[float, float]:
        """Loss and metric on the dev rows, with the readout fitted on the train rows at this prompt."""
        losses, metric = self._dev(self.outputs(prompt))
        return float(losses.mean()), metric

    def _dev(self, outputs: Outputs) -> tuple[np.ndarray, float]:
        readout, _ = self.fit(self.name, outputs, self.train)
        scores = readout.scores({key: value[self.dev_rows] for key, value in outputs.items()})
        _, metric = self.job.objective.score(scores[None], self.targets[self.dev_rows])
        return row_losses(scores, self.targets[self.dev_rows]), float(metric[0])

    def start(self) -> BestPrompt:
        """The prompt that the search has to surpass."""
        losses, metric = self._dev(self.at_start)
        return BestPrompt(self.prompt, None, metric, float(losses.mean()), by_loss=True)

    def finish(self, outcome: Outcome, searched: bool) -> tuple[Outcome, Readout, ReadoutRecord]:
        """The readout fitted on all rows, at the prompt that was found or, with `auto`, perhaps at the one before.

        A search minimizes a loss of few rows, so the best of its prompts is better on the dev rows by chance. `auto`
        keeps it if the mean loss of the dev rows fell by more than the standard error of the difference.
        """
        best, outputs, reason = outcome.best, self.at_start, "the budget allows no search"
        if best.generation is not None:
            outputs, reason = self.outputs(best.prompt), "the search lowered the loss on the dev rows"
        elif searched:
            reason = "the search did not lower the loss on the dev rows"
        if best.generation is not None and self.job.settings.readout == "auto":
            fall = self._dev(self.at_start)[0] - self._dev(outputs)[0]
            error = float(fall.std(ddof=1) / np.sqrt(len(fall)))
            reason = f"the search changed the loss on the dev rows by {-fall.mean():+.3f} (standard error {error:.3f})"
            if fall.mean() <= error:
                best, outputs = self.start(), self.at_start
        if outcome.stopped:
            reason = f"{reason}; it stopped on a plateau"
        readout, _ = self.fit(self.name, outputs, np.arange(len(self.targets)))
        record = ReadoutRecord(name=self.name, tried=self.tried, searched=best.generation is not None, reason=reason)
        return Outcome(best, outcome.interrupted, outcome.stopped), readout, record
