"""ONNX Runtime."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnxruntime

from bbt_accel.bundle import Bundle
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@functools.cache
def share_memory() -> None:
    """One arena of host memory for all stages: a session's own would keep the tensors of its largest call.

    It grows by doubling, so that tensors of the many shapes of a search share its blocks. Untouched pages take no
    memory.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    doubling = 0  # kNextPowerOfTwo
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, doubling, -1, -1))


@contextmanager
def failing(where: str) -> Iterator[None]:
    """Turns whatever ONNX Runtime raises into an EngineError."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(f"ONNX Runtime failed {where} ({first_line(error)})") from error


class OrtEngine(StagedEngine):
    """The bundle's graphs in ONNX Runtime, on the requested provider or not at all."""

    name = "ort"

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(bundle, device, threads, without)
        if not hasattr(onnxruntime, "InferenceSession"):
            raise EngineError(
                "onnxruntime is broken (onnxruntime and onnxruntime-gpu overwrite each other): "
                "uninstall both, then install one extra, [cpu] or [gpu]"
            )
        self.provider = PROVIDERS[device]
        self.require_provider()
        self.sessions = {stage: self.open(stage) for stage in bundle.info.stages}

    def require_provider(self) -> None:
        """Raises EngineError where ONNX Runtime lacks the provider; one that it has may still not start."""
        if self.provider not in onnxruntime.get_available_providers():
            raise EngineError(
                f"--device {self.device}: this ONNX Runtime has no {self.provider}; "
                "see bbt-accel doctor for what to install"
            )

    def open(self, stage: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or 0
        # On a CPU it would keep a block of memory for each input shape.
        options.enable_mem_pattern = self.device == "cuda"
        share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        try:
            session = self.session(stage, options)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(f"ONNX Runtime cannot load {stage}.onnx ({first_line(error)})") from error
        if session.get_providers()[0] != self.provider:  # it fell back to the CPU silently
            raise EngineError(f"--device {self.device}: {self.provider} could not start; see bbt-accel doctor")
        return session

    def session(self, stage: str, options: Any, providers: Sequence[Any] = ()) -> Any:
        file = str(self.bundle.path / f"{stage}.onnx")
        return onnxruntime.InferenceSession(file, options, providers=providers or [self.provider])

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        session = self.sessions[stage]
        with failing(f"in {stage}.onnx"):
            outputs = session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        return dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))

    def versions(self) -> dict[str, str]:
        names = ("onnxruntime", "onnxruntime-gpu")
        found = {
            d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in names
        }
        return {**found, "provider": self.provider}

    def close(self) -> None:
        super().close()
        self.sessions = {}
