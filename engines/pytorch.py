"""PyTorch: `torch` runs the backbone's stages; the baselines run transformers' own forward."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bbt_accel.batch import Batch, Float32, Int64
from bbt_accel.bundle import PROJECT, STATISTICS, Bundle
from bbt_accel.cuda import GPU_TOKENS
from bbt_accel.engine_specs import index_of, kind_of
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens, failing
from bbt_accel.engines.staged import GPU_CALL, Arrays, StagedEngine, clipped_std
from bbt_accel.errors import EngineError
from bbt_accel.exporters.device_graphs import batch_statistics
from bbt_accel.exporters.families import DTYPES, family_of, load_model
from bbt_accel.exporters.reference import Reference
from bbt_accel.optimizations import in_graph
from bbt_accel.population import Latent, Population
from bbt_accel.projection import Projection


def torch_device(device: str) -> torch.device:
    """PyTorch's own `cuda` is the current GPU of the thread, which an engine on another may have changed."""
    return torch.device("cuda:0" if device == "cuda" else device)


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """PyTorch's threads, which are the whole process's, until the engine is closed; None leaves them as they are."""
    former = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(former)


def load(bundle: Bundle, device: str, threads: int | None) -> tuple[torch.nn.Module, ExitStack]:
    """The bundle's checkpoint on a device, in its precision, and what holds PyTorch to the threads until it is closed.

    Raises EngineError where the device is not available.
    """
    if kind_of(device) == "cuda" and index_of(device) >= torch.cuda.device_count():
        raise EngineError(f"--device {device}: PyTorch finds no such GPU; use --device cpu or see bbt-accel doctor")
    with ExitStack() as stack, computing("to load the checkpoint"):
        stack.enter_context(limited_threads(threads))
        model = load_model(bundle.path, dtype=DTYPES[bundle.info.precision]).to(torch_device(device))
        return model, stack.pop_all()


@contextmanager
def computing(where: str, tf32: bool = False) -> Iterator[None]:
    """PyTorch's errors as an EngineError of one line; one for a GPU that is out of memory says what to do.

    tf32: let a GPU round the inputs of fp32 matmuls to TF32. Otherwise they are fp32, whatever the process has set.
    The setting is that of the whole process, so it is put back; but for one made per backend, which becomes fp32.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend, which has no name here
        before = "highest"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with failing("PyTorch", where, RuntimeError, IndexError):
            yield
    except EngineError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            why = "the GPU is out of memory; use a smaller backbone, --popsize or --k-shot, or a bundle in fp16"
            raise EngineError(f"PyTorch failed {where}: {why}") from error.__cause__
        raise
    finally:
        torch.set_float32_matmul_precision(before)


def torch_versions(device: str) -> dict[str, str]:
    import transformers

    cpu = kind_of(device) == "cpu"
    name = f"cpu, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(index_of(device))
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
        self.place = torch_device(self.device)
        model, self.held = load(self.bundle, self.device, self.threads)
        self.backbone = family_of(model.config).compose(model, info)
        self.dtype = DTYPES[info.precision]
        self.on_device = kind_of(self.device) == "cuda"
        if self.on_device:
            self.bucket_step, self.tokens_per_call = 8, GPU_TOKENS
            self.call_overhead = 4 * GPU_CALL  # kernels are launched one by one

    @torch.inference_mode()
    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        with computing(f"in {stage}"):
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
        with computing("to upload an array"):
            return torch.from_numpy(array).to(self.place)

    def to_host(self, array: Tensor) -> Float32:
        with computing("to download an array"):
            return array.float().cpu().numpy()

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        super().close()
        vars(self).pop("backbone", None)
        self.held.close()


class EagerEngine(Engine):
    """The baseline: transformers' own class with sdpa attention, one candidate at a time on the whole padded batch.

    It computes what the original program computes. On a GPU prompts are projected there, as in the other engines.
    """

    name = "eager"
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
            matrix, p0 = (torch.from_numpy(a).to(self.place) for a in (projection.matrix, projection.p0))
            self.projections[projection] = matrix, p0
        z = torch.from_numpy(prompts.z).to(self.place)
        return functional.linear(z, *self.projections[projection]).unflatten(1, projection.prompt_shape)

    def versions(self) -> dict[str, str]:
        return torch_versions(self.device)

    def close(self) -> None:
        vars(self).pop("reference", None)
        self.held.close()


class EagerTf32Engine(EagerEngine):
    """The same with TF32: on a GPU, fp32 matmuls round their inputs to 10 bits."""

    name = "eager-tf32"
    tf32 = True


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
        self.projects = kind_of(engine.device) == "cuda"
        with computing("to upload the rows"):
            self.rows = {name: torch.from_numpy(value).to(engine.place) for name, value in batch.inputs().items()}

    def _label_logits(self, population: Population) -> Float32:
        return self._outputs(population)["label_logits"]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        with computing("in the naive forward", self.engine.tf32):
            found = [self.engine.reference.run(prompt, **self.rows) for prompt in self.prompts(population)]
            return {name: torch.stack([one[name] for one in found]).cpu().numpy() for name in found[0]}

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
        rows, reference = self.rows, self.engine.reference
        with computing("in the naive forward", self.engine.tf32):
            states = reference.hidden_states(rows["input_ids"], rows["attention_mask"], rows.get("context_ids"))
            return np.array([clipped_std(h.float().cpu().numpy().reshape(-1)) for h in states], np.float32)
