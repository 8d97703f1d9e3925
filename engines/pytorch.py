"""PyTorch: `torch` runs the backbone's stages; the baselines run transformers' own forward."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bbt_accel.batch import Batch, Float32, Int64
from bbt_accel.bundle import PROJECT, STATISTICS, Bundle
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens, failing
from bbt_accel.engines.staged import Arrays, StagedEngine, clipped_std
from bbt_accel.errors import EngineError
from bbt_accel.exporters.device import batch_statistics
from bbt_accel.exporters.families import DTYPES, family_of, load_model
from bbt_accel.exporters.reference import Reference
from bbt_accel.optimizations import in_graph
from bbt_accel.population import Population


def load(bundle: Bundle, device: str, threads: int | None) -> torch.nn.Module:
    """The bundle's checkpoint on a device, in its precision. Raises EngineError where the device is not available."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device cuda: PyTorch finds no CUDA device; use --device cpu or see bbt-accel doctor")
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(bundle.path, dtype=DTYPES[bundle.info.precision]).to(device)


def torch_versions(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": name}


class TorchEngine(StagedEngine):
    """The backbone's stages in PyTorch, with the same optimizations as the exported graphs."""

    name = "torch"
    bucket_step = 4  # a call costs PyTorch more than an inference runtime
    tokens_per_call = 8192

    def load(self) -> None:
        # The backbone is composed here, so that every optimization can be switched off.
        off = sorted({*self.bundle.info.without, *in_graph(self.without)})
        info = self.bundle.info.model_copy(update={"without": off})
        self.bundle = Bundle(self.bundle.path, info)
        super().load()
        model = load(self.bundle, self.device, self.threads)
        self.backbone = family_of(model.config).compose(model, info)
        self.dtype = DTYPES[info.precision]
        self.on_device = self.device == "cuda"

    @torch.inference_mode()
    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        with failing("PyTorch", f"in {stage}", RuntimeError, IndexError):
            if stage == PROJECT:
                flat = functional.linear(inputs["z"], inputs["matrix"], inputs["p0"])
                return {"prompts": flat.unflatten(1, self.bundle.info.prompt_shape[-2:])}
            if stage == STATISTICS:
                logits = inputs["label_logits"].float()
                return {"statistics": batch_statistics(logits, inputs["targets"], inputs["classes"])}
            taken = {name: inputs[name] for name in self.backbone.inputs(stage)}
            if "prompts" in taken:
                taken["prompts"] = taken["prompts"].to(self.dtype)
            return self.backbone.run(stage, taken)

    def to_device(self, array: Float32 | Int64) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def to_host(self, array: Tensor) -> Float32:
        return array.float().cpu().numpy()

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        super().close()
        vars(self).pop("backbone", None)


class EagerEngine(Engine):
    """The baseline: transformers' own class with sdpa attention, one candidate at a time on the whole padded batch.

    It computes what the original program computes.
    """

    name = "eager"
    head_at_readout: ClassVar[bool] = False

    def load(self) -> None:
        model = load(self.bundle, self.device, self.threads)
        self.reference = Reference(model, self.bundle.info, self.head_at_readout)

    def bind(self, batch: Batch) -> EagerBoundBatch:
        check_tokens(self.bundle, batch)
        return EagerBoundBatch(self, batch)

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        vars(self).pop("reference", None)


class EagerReadoutEngine(EagerEngine):
    """The same with the LM head at the readout position alone."""

    name = "eager-readout"
    head_at_readout = True


class CompiledEngine(EagerReadoutEngine):
    """The same under torch.compile, which on a CPU needs a C++ compiler. It compiles at the first call of a shape."""

    name = "compiled"

    def load(self) -> None:
        super().load()
        self.reference.compile()


class EagerBoundBatch(BoundBatch):
    def __init__(self, engine: EagerEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine = engine
        self.rows = {name: torch.from_numpy(value).to(engine.device) for name, value in batch.inputs().items()}

    def _label_logits(self, population: Population) -> Float32:
        return self._outputs(population)["label_logits"]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        prompts = torch.from_numpy(population.prompts()).to(self.engine.device)
        with failing("PyTorch", "in the naive forward", RuntimeError):
            found = [self.engine.reference.run(prompt, **self.rows) for prompt in prompts]
        return {name: torch.stack([one[name] for one in found]).cpu().numpy() for name in found[0]}

    def layer_stds(self) -> Float32:
        rows, reference = self.rows, self.engine.reference
        states = reference.hidden_states(rows["input_ids"], rows["attention_mask"], rows.get("context_ids"))
        return np.array([clipped_std(h.float().cpu().numpy().reshape(-1)) for h in states], np.float32)
