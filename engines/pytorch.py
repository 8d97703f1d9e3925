"""PyTorch: `torch` runs the backbone's stages; the baselines run transformers' own forward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bbt_accel.core.batch import Float32, Int64
from bbt_accel.core.bundle import PROJECT, STATISTICS, Bundle
from bbt_accel.core.engine_specs import index_of, kind_of
from bbt_accel.core.optimizations import in_graph
from bbt_accel.engines.base import failing
from bbt_accel.engines.cuda import GPU_TOKENS
from bbt_accel.engines.staged import GPU_CALL, Arrays, StagedEngine
from bbt_accel.engines.torch_statistics import batch_statistics
from bbt_accel.errors import EngineError
from bbt_accel.exporters.families.loading import DTYPES, load_model
from bbt_accel.exporters.families.registry import family_of


def torch_device(device: str) -> torch.device:
    """PyTorch's own `cuda` is the current GPU of the thread, which an engine on another may have
    changed.
    """
    return torch.device("cuda:0" if device == "cuda" else device)


class TorchThreads:
    """A limit of PyTorch's threads, which are the whole process's, until it is closed or collected;
    None sets none.

    Of several, the last that is open decides.
    """

    limits: ClassVar[dict[object, int]] = {}  # in their order; the first is what the process had

    def __init__(self, threads: int | None) -> None:
        key = object()
        self._close = weakref.finalize(self, self.release, key)
        self._close.atexit = False
        if threads is not None:
            self.limits.setdefault(None, torch.get_num_threads())
            self.limits[key] = threads
            torch.set_num_threads(threads)

    @classmethod
    def release(cls, key: object) -> None:
        if key in cls.limits:
            del cls.limits[key]
            torch.set_num_threads(list(cls.limits.values())[-1])
        if len(cls.limits) == 1:
            cls.limits.clear()

    def close(self) -> None:
        self._close()


def load(bundle: Bundle, device: str, threads: int | None) -> tuple[torch.nn.Module, TorchThreads]:
    """The bundle's checkpoint on a device, in its precision, and the limit of PyTorch's threads.

    Raises EngineError where the device is not available.
    """
    if kind_of(device) == "cuda" and index_of(device) >= torch.cuda.device_count():
        raise EngineError(f"--device {device}: PyTorch finds no such GPU; see bbt-accel doctor")
    limit = TorchThreads(threads)
    try:
        with computing("to load the checkpoint"):
            return load_model(bundle.path, dtype=DTYPES[bundle.info.precision]).to(
                torch_device(device)
            ), limit
    except BaseException:
        limit.close()
        raise


@contextmanager
def computing(where: str, tf32: bool = False) -> Iterator[None]:
    """PyTorch's errors as an EngineError of one line; one for a GPU that is out of memory says what
    to do.

    tf32: let a GPU round the inputs of fp32 matmuls to TF32. Otherwise they are fp32, whatever the
    process has set. The setting is that of the whole process, so it is put back; but for one made
    per backend, which becomes fp32.
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
            why = "the GPU is out of memory; use a smaller backbone, --popsize or --k-shot, or fp16"
            raise EngineError(f"PyTorch failed {where}: {why}") from error.__cause__
        raise
    finally:
        torch.set_float32_matmul_precision(before)


def torch_versions(device: str) -> dict[str, str]:
    import transformers

    cpu = kind_of(device) == "cpu"
    name = (
        f"cpu, {torch.get_num_threads()} threads"
        if cpu
        else torch.cuda.get_device_name(index_of(device))
    )
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": name}


class TorchEngine(StagedEngine):
    """The backbone's stages in PyTorch, with the same optimizations as the exported graphs."""

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
                return {
                    "statistics": batch_statistics(logits, inputs["targets"], inputs["classes"])
                }
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
