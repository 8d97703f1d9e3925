"""The engine `dummy`, a plug-in of the tests: it has no weights, and its label logits are a fixed
smooth function of the prompt.
"""

from __future__ import annotations

import numpy as np

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.engine_specs import Backend, EngineSpec
from bbt_accel.core.population import Population
from bbt_accel.engines.base import BoundBatch, Engine


class DummyBoundBatch(BoundBatch):
    def _label_logits(self, population: Population) -> Float32:
        flat = population.prompts().reshape(len(population), -1)
        rng, classes = np.random.default_rng(0), len(self.batch.label_token_ids)
        weight = rng.standard_normal((flat.shape[1], classes), dtype=np.float32) / np.sqrt(
            flat.shape[1]
        )
        row = (self.batch.input_ids * self.batch.attention_mask).sum(1) % 97 / 97
        scores = np.array(
            [candidate @ weight for candidate in flat]
        )  # BLAS sums a matrix in another order than a row
        logits = np.tanh(scores)[:, None, :] + row[None, :, None] * np.arange(
            classes, dtype=np.float32
        )
        return np.asarray(logits, np.float32)

    def _outputs(self, population: Population) -> dict[str, Float32]:
        logits = self._label_logits(population)
        hidden = np.random.default_rng(1).standard_normal(
            (logits.shape[2], self.bundle.info.hidden_size)
        )
        state = np.asarray(logits @ hidden, np.float32)
        return {"label_logits": logits, "readout_state": state, "mean_state": np.tanh(state)}

    def layer_stds(self) -> Float32:
        return np.ones(self.bundle.info.n_layers, dtype=np.float32)


class DummyEngine(Engine):
    """Deterministic, and each candidate independent of the rest of the population, as a real engine
    is.
    """

    def bind(self, batch: Batch) -> DummyBoundBatch:
        return DummyBoundBatch(self.bundle, batch)

    def versions(self) -> dict[str, str]:
        return {"dummy": "1"}


ENGINE = EngineSpec("dummy", {"cpu": Backend("dummy_engine:DummyEngine")}, internal=True)
