"""Losses and scores of prompts, from an engine in this process; `workers.py` has the same from
other processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bbt_accel.core.batch import Batch, Float32, Float64, Int64
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.logits import class_logits, one_word_each
from bbt_accel.core.objective import Objective
from bbt_accel.core.population import Population
from bbt_accel.core.projection import one_blas_thread
from bbt_accel.core.settings import Settings
from bbt_accel.engines.base import BoundBatch, Closing, Engine, read
from bbt_accel.engines.registry import load_engine
from bbt_accel.search.methods import PromptSpace
from bbt_accel.search.readout_fitting import fit_bias
from bbt_accel.search.run import EngineRecord


class Evaluator(Closing, ABC):
    """An engine with the train and the dev rows bound, and the objective. A context manager."""

    @abstractmethod
    def versions(self) -> dict[str, str]: ...

    @abstractmethod
    def layer_stds(self) -> Float32:
        """bbtv2: `BoundBatch.layer_stds` of the train rows."""

    @abstractmethod
    def train(self, space: PromptSpace, layer: int, candidates: Float64) -> tuple[Float64, Float64]:
        """Losses (P,) and metrics (P,) of a layer's candidates (P, d) on the train rows. Raises
        NonFiniteLoss.
        """

    @abstractmethod
    def dev(self, prompt: Float32) -> tuple[float, float]:
        """Loss and metric of one prompt, (n, H) or (L, n, H), on the dev rows, with the
        verbalizer.
        """

    @abstractmethod
    def dev_logits(self, prompt: Float32) -> Float32:
        """Label logits (N, M) of the dev rows with one prompt."""

    @abstractmethod
    def outputs(self, prompt: Float32, states: bool) -> dict[str, Float32]:
        """What a readout reads of `Job.rows` with one prompt, by name, (N, …): label logits, and
        states if asked.
        """


class LocalEvaluator(Evaluator):
    """An engine in this process, closed with the evaluator."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine, self.job = engine, job
        self.train_rows, self.dev_rows = engine.bind(job.train), engine.bind(job.dev)

    def versions(self) -> dict[str, str]:
        return self.engine.versions()

    def layer_stds(self) -> Float32:
        return self.train_rows.layer_stds()

    def train(
        self,
        space: PromptSpace,
        layer: int,
        candidates: Float64 | Float32,
        part: slice = slice(None),
    ) -> tuple[Float64, Float64]:
        """part: evaluate these candidates only.

        A fitted readout's loss needs the label logits on the host, where a bias is fitted to those
        of each candidate; sums alone would not do.
        """
        population, first = space.population(layer, candidates)[part], part.start or 0
        if not self.job.settings.fitted:
            return self.verbalized(self.train_rows, population, first)
        objective, targets = self.job.objective, self.job.train.targets
        logits = class_logits(self.train_rows.label_logits(population), self.job.classes)
        objective.score(logits, targets, first)  # raises NonFiniteLoss
        with one_blas_thread:
            biases, losses = zip(
                *(fit_bias(own, targets) for own in logits), strict=True
            )  # each by itself
        return np.array(losses), objective.score(logits + np.array(biases)[:, None], targets)[1]

    def dev(self, prompt: Float32) -> tuple[float, float]:
        losses, metrics = self.verbalized(self.dev_rows, Population(prompt[None]))
        return float(losses[0]), float(metrics[0])

    def dev_logits(self, prompt: Float32) -> Float32:
        found: Float32 = self.dev_rows.label_logits(prompt[None])[0]
        return found

    def verbalized(
        self, rows: BoundBatch, population: Population, first: int = 0
    ) -> tuple[Float64, Float64]:
        """Losses and metrics by the label words; from sums, which a device computes, where a class
        has one word.
        """
        objective, targets = self.job.objective, rows.batch.targets
        if one_word_each(self.job.classes):
            return objective.from_statistics(rows.statistics(population), targets, first)
        return objective.score(
            class_logits(rows.label_logits(population), self.job.classes), targets, first
        )

    def outputs(self, prompt: Float32, states: bool) -> dict[str, Float32]:
        return read(self.all_rows, prompt, states)

    @cached_property
    def all_rows(self) -> BoundBatch:
        return self.engine.bind(self.job.rows)

    def close(self) -> None:
        self.train_rows.close()
        self.dev_rows.close()
        if "all_rows" in vars(self):
            self.all_rows.close()
        self.engine.close()


@dataclass(frozen=True)
class Job:
    """Everything needed to evaluate candidates, here or in another process.

    rows: all train rows, then all dev rows. Their label_token_ids are those of the label words,
        then of the words whose logits are features. classes: int64 (M,), the class of each label
        word.
    """

    bundle: Bundle
    engine: EngineRecord
    settings: Settings
    objective: Objective
    train: Batch
    dev: Batch
    rows: Batch
    classes: Int64

    def evaluator(self) -> LocalEvaluator:
        """Load the engine and bind the rows. Raises what `load_engine` raises."""
        e = self.engine
        engine = load_engine(
            self.bundle, e.name, device=e.device, threads=e.threads, without=e.without, url=e.url
        )
        try:
            return LocalEvaluator(engine, self)
        except BaseException:
            engine.close()
            raise
