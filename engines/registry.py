"""Engines by name, imported when they are asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path

from bbt_accel.bundle import Bundle
from bbt_accel.engines.base import Engine
from bbt_accel.errors import MissingDependency, UsageError
from bbt_accel.savings import check_savings

ENGINES = {
    "torch": ("bbt_accel.engines.pytorch", "TorchEngine", "export"),
    "eager": ("bbt_accel.engines.pytorch", "EagerEngine", "export"),
    "ort": ("bbt_accel.engines.ort", "OrtEngine", "cpu"),
    "openvino": ("bbt_accel.engines.openvino", "OpenVinoEngine", "openvino"),
    "trt": ("bbt_accel.engines.trt", "TrtEngine", "trt"),
    "remote": ("bbt_accel.engines.remote", "connect", "remote"),
    "dummy": ("bbt_accel.engines.dummy", "DummyEngine", ""),
}
"""Name → module, class (or the function that makes one), and the extra that brings what it needs."""
ON_CUDA = {"ort": ("bbt_accel.engines.ort_cuda", "OrtCudaEngine", "gpu")}
"""The same for `--device cuda`, where that is another class."""


def load_engine(
    bundle: str | Path | Bundle,
    name: str = "ort",
    *,
    device: str = "cpu",
    threads: int | None = None,
    without: Collection[str] = (),
    url: str | None = None,
) -> Engine:
    """Load a bundle into an engine: torch, ort, openvino, trt, or `eager`, the naive reference of benchmarks.

    device: cpu or cuda; trt runs on cuda whatever it says. threads: at most so many (default: all cores). without:
    savings to switch off for measurement, by the names in `bbt_accel.savings`. url: of the server, for the engine
    `remote`. Raises UsageError for an unknown name, MissingDependency when the engine's library is not installed,
    EngineError when the device is not there or the bundle does not fit.
    """
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Engines are {', '.join(ENGINES)}."
        raise UsageError(f"there is no engine {name!r}. {hint}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda, not {device!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    if url is not None and name != "remote":
        raise UsageError(f"--url is for --engine remote, not {name}")
    if url is None and name == "remote":
        raise UsageError("--engine remote needs --url, e.g. --url http://127.0.0.1:8000")
    module, cls, extra = ON_CUDA[name] if device == "cuda" and name in ON_CUDA else ENGINES[name]
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
    savings = check_savings(without)
    try:
        engine: Callable[..., Engine] = getattr(import_module(module), cls)
    except ImportError as error:
        raise MissingDependency(f'engine {name} needs {error.name}: pip install "bbt-accel[{extra}]"') from None
    options = {"url": url} if name == "remote" else {}
    return engine(loaded, device=place(name, device), threads=threads, without=savings, **options)


def place(name: str, device: str) -> str:
    """Where an engine runs: TensorRT needs no --device cuda, for it runs nowhere else."""
    return "cuda" if name == "trt" else device
