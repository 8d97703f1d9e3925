"""ONNX Runtime on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import onnxruntime

from bbt_accel.engines.base import failing
from bbt_accel.engines.ort_sessions import inference_session, session_options
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError
from bbt_accel.io.machine import installed


@functools.cache
def share_memory() -> None:
    """One arena of host memory for all stages: a session's own would keep the tensors of its
    largest call.

    It grows by doubling, so that tensors of the many shapes of a search share its blocks. Untouched
    pages take no memory.
    """
    arena, default = (
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        onnxruntime.OrtMemType.DEFAULT,
    )
    memory = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, default)
    doubling = 0  # kNextPowerOfTwo
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, doubling, -1, -1))


class OrtEngine(StagedEngine):
    """The bundle's graphs in ONNX Runtime, on the requested provider or not at all."""

    provider: ClassVar[str] = "CPUExecutionProvider"
    memory_patterns: ClassVar[bool] = False  # ONNX Runtime would keep memory for each input shape

    def load(self) -> None:
        super().load()
        if not hasattr(onnxruntime, "InferenceSession"):
            why = "onnxruntime is broken (onnxruntime and onnxruntime-gpu overwrite each other)"
            raise EngineError(f"{why}: uninstall both, then install one extra, [cpu] or [gpu]")
        self.check_provider()
        self.sessions = {stage: self.open(stage) for stage in self.bundle.info.stages}

    def check_provider(self) -> None:
        """Raises EngineError for one that is not there; one that is may still not start."""
        if self.provider not in onnxruntime.get_available_providers():
            found = f"--device {self.device}: this ONNX Runtime has no {self.provider}"
            raise EngineError(f"{found}; see bbt-accel doctor for what to install")

    def open(self, stage: str) -> Any:
        options = session_options(self.threads)
        options.enable_mem_pattern = self.memory_patterns
        share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        with failing("ONNX Runtime", f"to load {stage}.onnx"):
            session = self.session(stage, options)
        if session.get_providers()[0] != self.provider:  # it fell back to the CPU silently
            raise EngineError(
                f"--device {self.device}: {self.provider} could not start; see bbt-accel doctor"
            )
        return session

    def session(self, stage: str, options: Any, providers: Sequence[Any] = ()) -> Any:
        return inference_session(
            self.bundle.path / f"{stage}.onnx", options, providers or [self.provider]
        )

    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        if stage not in self.sessions:  # closed, or it could not be opened again
            raise EngineError(f"{stage}.onnx is not loaded; load the engine again")
        names = [o.name for o in self.sessions[stage].get_outputs() if o.name not in skip]
        given = {i.name: inputs[i.name] for i in self.sessions[stage].get_inputs()}
        with failing("ONNX Runtime", f"in {stage}.onnx"):
            found = self.call(stage, given, names)
        return dict(zip(names, found, strict=True))

    def call(self, stage: str, given: Arrays, names: list[str]) -> list[Any]:
        """The outputs of these names."""
        return list(self.sessions[stage].run(names, given))

    def versions(self) -> dict[str, str]:
        found = {
            name: version
            for name in ("onnxruntime", "onnxruntime-gpu")
            if (version := installed(name))
        }
        return {**found, "provider": self.provider}

    def close(self) -> None:
        super().close()
        self.sessions = {}
