"""Engines by name, imported when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from pkgutil import resolve_name

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, engine_spec, kind_of
from bbt_accel.core.optimizations import check_optimizations
from bbt_accel.core.option_types import check_threads
from bbt_accel.engines.base import Engine
from bbt_accel.errors import EngineError, MissingDependency, UsageError, missing_module


def load_engine(
    bundle: str | Path | Bundle,
    name: str = DEFAULT_ENGINE,
    *,
    device: str = "cpu",
    threads: int | None = None,
    without: Collection[str] = (),
    url: str | None = None,
) -> Engine:
    """Load a bundle into an engine: torch, ort, openvino, trt, or any other in
    `bbt_accel.core.engine_specs`.

    device: cpu, cuda or cuda:N; trt runs on a GPU in any case. threads: CPU threads (default: all
    cores). without: optimizations to switch off, by the names in `bbt_accel.core.optimizations`.
    url: of the server, for the engine `remote`. Raises UsageError for an unknown name and for
    options that exclude each other, BundleError for what is not a bundle or is damaged,
    MissingDependency when the engine's library is not installed, EngineError when the device is not
    available or the bundle was optimized for another engine.
    """
    spec = engine_spec(name)
    check_threads(threads)
    if url is not None and not spec.remote:
        raise UsageError(f"--url is for --engine remote, not {name}")
    if spec.remote and url is None:
        raise UsageError(f"--engine {name} needs --url, e.g. --url http://127.0.0.1:8000")
    if spec.remote and (device != "cpu" or threads is not None):
        raise UsageError(
            f"--device and --threads are set on the server; omit them with --engine {name}"
        )
    place = spec.device(device)
    backend = spec.backends[kind_of(place)]
    opened = bundle if isinstance(bundle, Bundle) else Bundle.read(bundle)
    if opened.info.target not in spec.reads:
        if opened.info.target == "onnx":
            raise EngineError(
                f"engine {name} needs a bundle optimized for it: bbt-accel optimize --target {name}"
            )
        target, reads = opened.info.target, ", ".join(spec.reads)
        raise EngineError(
            f"{opened.path} was made for {target}, engine {name} reads {reads}; "
            f"use --engine {target}"
        )
    try:
        make: Callable[..., Engine] = resolve_name(backend.loader)
    except ModuleNotFoundError as error:
        hint = f'pip install "bbt-accel[{backend.extra}]"' if backend.extra else "install it"
        raise MissingDependency(f"engine {name} needs {error.name}: {hint}") from None
    except ImportError as error:  # it is there, e.g. without the memory that it needs
        raise EngineError(f"engine {name}: {missing_module(error)}; see bbt-accel doctor") from None
    options = {"url": url} if spec.remote else {"device": place, "threads": threads}
    engine = make(opened, without=check_optimizations(without), **options)
    engine.name = name
    return engine
