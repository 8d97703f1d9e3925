"""Losses and scores of prompts, from an engine in this process; `workers.py` has the same from other processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bbt_accel.batch import Batch, Float32, Float64
from bbt_accel.bundle import Bundle
from bbt_accel.engines.base import Closing, Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.objective import Objective
from bbt_accel.run import EngineRecord
from bbt_accel.settings import Settings
from bbt_accel.tuning.methods import PromptSpace


class Evaluator(Closing, ABC):
    """An engine with the train and the dev rows bound, and the objective. A context manager."""

    @abstractmethod
    def versions(self) -> dict[str, str]: ...

    @abstractmethod
    def layer_stds(self) -> Float32:
        """bbtv2: `BoundBatch.layer_stds` of the train rows."""

    @abstractmethod
    def train(self, space: PromptSpace, layer: int, candidates: Float64) -> tuple[Float64, Float64]:
        """Losses (P,) and metrics (P,) of a layer's candidates (P, d) on the train rows. Raises NonFiniteLoss."""

    @abstractmethod
    def dev(self, prompt: Float32) -> tuple[float, float]:
        """Loss and metric of one prompt, (n, H) or (L, n, H), on the dev rows."""


class LocalEvaluator(Evaluator):
    """An engine in this process, closed with the evaluator."""

    def __init__(self, engine: Engine, train: Batch, dev: Batch, objective: Objective) -> None:
        self.engine, self.objective = engine, objective
        self.train_rows, self.dev_rows = engine.bind(train), engine.bind(dev)

    def versions(self) -> dict[str, str]:
        return self.engine.versions()

    def layer_stds(self) -> Float32:
        return self.train_rows.layer_stds()

    def train(
        self, space: PromptSpace, layer: int, candidates: Float64 | Float32, part: slice = slice(None)
    ) -> tuple[Float64, Float64]:
        """part: evaluate these candidates only."""
        found = self.train_rows.statistics(space.population(layer, candidates)[part])
        return self.objective.from_statistics(found, self.train_rows.batch.targets, first=part.start or 0)

    def dev(self, prompt: Float32) -> tuple[float, float]:
        found = self.dev_rows.statistics(prompt[None])
        losses, metrics = self.objective.from_statistics(found, self.dev_rows.batch.targets)
        return float(losses[0]), float(metrics[0])

    def close(self) -> None:
        self.train_rows.close()
        self.dev_rows.close()
        self.engine.close()


@dataclass(frozen=True)
class Job:
    """Everything needed to evaluate candidates, here or in another process."""

    bundle: Bundle
    engine: EngineRecord
    settings: Settings
    objective: Objective
    train: Batch
    dev: Batch

    def evaluator(self) -> LocalEvaluator:
        """Load the engine and bind the rows. Raises what `load_engine` raises."""
        e = self.engine
        engine = load_engine(self.bundle, e.name, device=e.device, threads=e.threads, without=e.without, url=e.url)
        return LocalEvaluator(engine, self.train, self.dev, self.objective)
