"""OpenVINO on the CPU."""

from __future__ import annotations

from typing import Any

import openvino

from bbt_accel.bundle import Bundle
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError, first_line


class OpenVinoEngine(StagedEngine):
    """The bundle's stages in OpenVINO, from its own format or from ONNX, in the bundle's precision."""

    name = "openvino"

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(bundle, device, threads, without)
        core = openvino.Core()
        self.requests = {stage: self.open(core, stage) for stage in bundle.info.stages}

    def open(self, core: Any, stage: str) -> Any:
        """Compile one stage. Without the precision hint OpenVINO would compute fp32 graphs in bf16 where it can."""
        suffix = "xml" if self.bundle.info.target == "openvino" else "onnx"
        hint = "bf16" if self.bundle.info.precision == "bf16" else "f32"
        config = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = str(self.threads)
        try:
            model = core.compile_model(str(self.bundle.path / f"{stage}.{suffix}"), "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {stage}.{suffix} ({first_line(error)})") from error
        return model.create_infer_request()

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        request = self.requests[stage]
        model = request.model_inputs
        try:
            found = request.infer({i.get_any_name(): inputs[i.get_any_name()] for i in model}, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in {stage} ({first_line(error)})") from error
        if len(self.requests) > 1:  # otherwise each of bbtv2's stages would keep activations that only it can use
            request.get_compiled_model().release_memory()
        return {o.get_any_name(): found[o] for o in request.model_outputs}

    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "device": "CPU"}

    def close(self) -> None:
        super().close()
        self.requests = {}
