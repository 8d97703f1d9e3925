"""PyTorch: `torch` runs the backbone's stages, `eager` is transformers' own forward, nothing left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bbt_accel.batch import Batch, Float32, Int64
from bbt_accel.bundle import PROJECT, TALLY, Bundle
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.staged import Arrays, StagedEngine, clipped_std
from bbt_accel.errors import EngineError, first_line
from bbt_accel.exporters.families import load_model, make_backbone
from bbt_accel.exporters.reference import Reference
from bbt_accel.objective import MARGIN
from bbt_accel.savings import inside


def load(bundle: Bundle, device: str, threads: int | None) -> torch.nn.Module:
    """The bundle's checkpoint on a device. Raises EngineError where the device or the checkpoint is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device cuda: PyTorch finds no CUDA device; use --device cpu or see bbt-accel doctor")
    if bundle.info.precision != "fp32" or bundle.info.target != "onnx":
        raise EngineError(
            f"{bundle.path} was optimized ({bundle.info.precision}, {bundle.info.target}) and holds no PyTorch "
            "weights; give the torch engine the exported bundle"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(bundle.path).to(device)


def torch_versions(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": name}


def tally(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """`objective.tally` in PyTorch: logits (P, N, C), one-hot targets (N, C), classes 0 … C-1; float32 (P, 5)."""
    logits = logits.float()
    shifted = logits - logits.amax(2, keepdim=True)
    wanted = (shifted * targets).sum(2)  # NaN where a logit is not finite
    hinge = (functional.relu(shifted - wanted[..., None] + MARGIN) * (1 - targets)).sum(2)
    predicted, actual = (shifted == 0).float().argmax(2), targets.argmax(1)  # of equal logits the first
    right, ones = predicted == actual, predicted == 1
    columns = (shifted.logsumexp(2) - wanted, hinge, right, right & ones, ones)
    return torch.stack([column.sum(1, dtype=torch.float32) for column in columns], dim=1)


class TorchEngine(StagedEngine):
    """The backbone's stages in PyTorch, with the same work left out as in the exported graphs."""

    name = "torch"
    bucket_step = 4  # PyTorch's calls cost more each than those of a runtime
    tokens_per_call = 8192

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        # Composed here and now, the backbone can do without any saving.
        info = bundle.info.model_copy(update={"without": sorted({*bundle.info.without, *inside(without)})})
        super().__init__(Bundle(bundle.path, info), device, threads, without)
        bundle = self.bundle
        self.backbone = make_backbone(load(bundle, device, threads), bundle.info)
        self.on_device = device == "cuda"

    @torch.inference_mode()
    def run(self, stage: str, inputs: Arrays) -> Arrays:
        try:
            if stage == PROJECT:
                flat = functional.linear(inputs["z"], inputs["matrix"], inputs["p0"])
                return {"prompts": flat.unflatten(1, self.bundle.info.prompt_shape[-2:])}
            if stage == TALLY:
                return {"tally": tally(inputs["label_logits"], inputs["targets"], inputs["classes"])}
            return self.backbone.run(stage, {k: v for k, v in inputs.items() if k in self.takes(stage)})
        except (RuntimeError, IndexError) as error:
            raise EngineError(f"PyTorch failed in {stage} ({first_line(error).rstrip('.')})") from error

    def takes(self, stage: str) -> tuple[str, ...]:
        """Names of a stage's inputs."""
        rows = ("attention_mask", "readout", "label_token_ids", "decoder_input_ids")
        if stage == "model":
            return ("prompts", "input_ids", *rows)
        if stage == "embed":
            return ("input_ids",)
        return ("prompts", "prefix", "hidden", *(rows if stage == "last" else rows[:1]))

    def put(self, array: Float32 | Int64) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def get(self, array: Tensor) -> Float32:
        return array.float().cpu().numpy()

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        super().close()
        vars(self).pop("backbone", None)


class EagerEngine(Engine):
    """One candidate a call on the whole padded batch, through transformers' own class with sdpa attention."""

    name = "eager"

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(bundle)
        self.device = device
        self.reference = Reference(load(bundle, device, threads), bundle.info)

    def bind(self, batch: Batch) -> EagerBoundBatch:
        check_tokens(self.bundle, batch)
        return EagerBoundBatch(self, batch)

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        vars(self).pop("reference", None)


class EagerBoundBatch(BoundBatch):
    def __init__(self, engine: EagerEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine = engine
        names = ("input_ids", "attention_mask", "readout", "label_token_ids", "decoder_input_ids")
        found = {name: getattr(batch, name) for name in names}
        self.rows = {k: torch.from_numpy(v).to(engine.device) for k, v in found.items() if v is not None}

    def _label_logits(self, prompts: Float32) -> Float32:
        each = [
            self.engine.reference.label_logits(torch.from_numpy(p).to(self.engine.device), **self.rows) for p in prompts
        ]
        return torch.stack(each).cpu().numpy()

    def layer_stds(self) -> Float32:
        states = self.engine.reference.hidden_states(self.rows["input_ids"], self.rows["attention_mask"])
        return np.array([clipped_std(h.float().cpu().numpy().reshape(-1)) for h in states], np.float32)
