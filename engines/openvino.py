"""OpenVINO on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino

from bbt_accel.batch import Float32, Int64
from bbt_accel.bundle import Bundle
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError, first_line


class OpenVinoEngine(StagedEngine):
    """The bundle's stages in OpenVINO: of an optimized bundle, or read from ONNX."""

    name = "openvino"

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(bundle, device, threads, without)
        if device != "cpu":
            raise EngineError(f"the openvino engine runs on the CPU, not on {device}")
        if bundle.info.target not in ("onnx", "openvino"):
            raise EngineError(f"{bundle.path} was built for {bundle.info.target}; use --engine {bundle.info.target}")
        core = openvino.Core()
        self.requests = {stage: self.open(core, stage) for stage in bundle.info.stages}

    def open(self, core: Any, stage: str) -> Any:
        """Compile one stage. The precision hint keeps OpenVINO from computing fp32 graphs in bf16."""
        ending = "xml" if self.bundle.info.target == "openvino" else "onnx"
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = str(self.threads)
        try:
            model = core.compile_model(str(self.bundle.path / f"{stage}.{ending}"), "CPU", config)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {stage}.{ending} ({first_line(error)})") from error
        return model.create_infer_request()

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        request = self.requests[stage]
        model = request.model_inputs
        try:
            found = request.infer({i.get_any_name(): inputs[i.get_any_name()] for i in model}, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in {stage} ({first_line(error)})") from error
        if len(self.requests) > 1:  # else each of bbtv2's stages would keep its activations, for none but itself
            request.get_compiled_model().release_memory()
        return {o.get_any_name(): found[o] for o in request.model_outputs}

    def put(self, array: Float32 | Int64) -> Any:
        return np.ascontiguousarray(array)

    def get(self, array: Any) -> Float32:
        return np.asarray(array, np.float32)

    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "device": "CPU"}

    def close(self) -> None:
        super().close()
        self.requests = {}
