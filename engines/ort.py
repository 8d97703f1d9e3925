"""ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import onnxruntime

from bbt_accel.engines.base import failing
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError
from bbt_accel.machine import installed

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


class OrtEngine(StagedEngine):
    """The bundle's graphs in ONNX Runtime, on the requested provider or not at all."""

    name = "ort"

    def load(self) -> None:
        super().load()
        if not hasattr(onnxruntime, "InferenceSession"):
            raise EngineError(
                "onnxruntime is broken (onnxruntime and onnxruntime-gpu overwrite each other): "
                "uninstall both, then install one extra, [cpu] or [gpu]"
            )
        self.provider = PROVIDERS[self.device]
        self.require_provider()
        self.sessions = {stage: self.open(stage) for stage in self.bundle.info.stages}

    def require_provider(self) -> None:
        """Raises EngineError where ONNX Runtime lacks the provider; one that it has may still not start."""
        if self.provider not in onnxruntime.get_available_providers():
            found = f"--device {self.device}: this ONNX Runtime has no {self.provider}"
            raise EngineError(f"{found}; see bbt-accel doctor for what to install")

    def open(self, stage: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or 0
        options.enable_mem_pattern = self.device == "cuda"  # on a CPU it would keep memory for each input shape
        share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        with failing("ONNX Runtime", f"to load {stage}.onnx"):
            session = self.session(stage, options)
        if session.get_providers()[0] != self.provider:  # it fell back to the CPU silently
            raise EngineError(f"--device {self.device}: {self.provider} could not start; see bbt-accel doctor")
        return session

    def session(self, stage: str, options: Any, providers: Sequence[Any] = ()) -> Any:
        file = str(self.bundle.path / f"{stage}.onnx")
        return onnxruntime.InferenceSession(file, options, providers=providers or [self.provider])

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        session = self.sessions[stage]
        with failing("ONNX Runtime", f"in {stage}.onnx"):
            outputs = session.run(None, {i.name: inputs[i.name] for i in session.get_inputs()})
        return dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))

    def versions(self) -> dict[str, str]:
        names = ("onnxruntime", "onnxruntime-gpu")
        found = {name: version for name in names if (version := installed(name)) is not None}
        return {**found, "provider": self.provider}

    def close(self) -> None:
        super().close()
        self.sessions = {}
