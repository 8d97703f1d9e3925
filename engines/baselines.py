"""The baselines of benchmarks: transformers' own forward in PyTorch, one candidate at a time."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.engine_specs import kind_of
from bbt_accel.core.population import Latent, Population
from bbt_accel.core.projection import Projection
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.pytorch import computing, load, torch_device, torch_versions
from bbt_accel.engines.staged import clipped_std
from bbt_accel.exporters.families.reference import Reference


class EagerEngine(Engine):
    """The baseline: transformers' own class with sdpa attention, one candidate at a time on the
    whole padded batch.

    It computes what the original program computes. On a GPU prompts are projected there, as in the
    other engines.
    """

    head_at_readout: ClassVar[bool] = False
    tf32: ClassVar[bool] = False

    def load(self) -> None:
        self.projections: WeakKeyDictionary[Projection, tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self.place = torch_device(self.device)
        model, self.held = load(self.bundle, self.device, self.threads)
        self.reference = Reference(model, self.bundle.info, self.head_at_readout)

    def bind(self, batch: Batch) -> EagerBoundBatch:
        check_tokens(self.bundle, batch)
        return EagerBoundBatch(self, batch)

    def project(self, prompts: Latent) -> Tensor:
        """Prompts (P, n, H) on the device; the matrix is uploaded once."""
        projection = prompts.projection
        if projection not in self.projections:
            matrix, p0 = (
                torch.from_numpy(a).to(self.place) for a in (projection.matrix, projection.p0)
            )
            self.projections[projection] = matrix, p0
        z = torch.from_numpy(prompts.z).to(self.place)
        return functional.linear(z, *self.projections[projection]).unflatten(
            1, projection.prompt_shape
        )

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        vars(self).pop("reference", None)
        self.held.close()


class EagerTf32Engine(EagerEngine):
    """The same with TF32: on a GPU, fp32 matmuls round their inputs to 10 bits."""

    tf32 = True


class EagerReadoutEngine(EagerEngine):
    """The same with the LM head at the readout position alone."""

    head_at_readout = True


class CompiledEngine(EagerReadoutEngine):
    """The same under torch.compile, which on a CPU needs a C++ compiler. It compiles at the first
    call of a shape.
    """

    def load(self) -> None:
        super().load()
        self.reference.compile()


class EagerBoundBatch(BoundBatch):
    def __init__(self, engine: EagerEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine = engine
        self.projects = kind_of(engine.device) == "cuda"
        with computing("to upload the rows"):
            self.rows = {
                name: torch.from_numpy(value).to(engine.place)
                for name, value in batch.inputs().items()
            }

    def _label_logits(self, population: Population) -> Float32:
        return self._outputs(population)["label_logits"]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        with computing("in the naive forward", self.engine.tf32):
            found = [
                self.engine.reference.run(prompt, **self.rows)
                for prompt in self.prompts(population)
            ]
            return {
                name: torch.stack([one[name] for one in found]).cpu().numpy() for name in found[0]
            }

    def prompts(self, population: Population) -> Tensor:
        """Whole prompts on the device, (P, n, H) or (P, L, n, H)."""
        candidates, fixed, device = population.candidates, population.fixed, self.engine.place
        if not isinstance(candidates, Latent):
            return torch.from_numpy(population.prompts()).to(device)
        projected = self.engine.project(candidates)
        if population.layer is None or fixed is None:
            return projected
        stacks = torch.from_numpy(fixed).to(device).repeat(len(projected), 1, 1, 1)
        stacks[:, population.layer] = projected
        return stacks

    def layer_stds(self) -> Float32:
        self.bundle.require("bbtv2")
        rows, reference = self.rows, self.engine.reference
        with computing("in the naive forward", self.engine.tf32):
            states = reference.hidden_states(
                rows["input_ids"], rows["attention_mask"], rows.get("context_ids")
            )
            return np.array(
                [clipped_std(h.float().cpu().numpy().reshape(-1)) for h in states], np.float32
            )
