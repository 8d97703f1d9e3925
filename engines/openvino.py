"""OpenVINO on the CPU."""

from __future__ import annotations

from typing import Any

import openvino

from bbt_accel.bundle import OPENVINO_WEIGHTS
from bbt_accel.engines.base import failing
from bbt_accel.engines.staged import Arrays, StagedEngine


class OpenVinoEngine(StagedEngine):
    """The bundle's stages in OpenVINO, from its own format or from ONNX, in the bundle's precision."""

    name = "openvino"

    def load(self) -> None:
        super().load()
        core = openvino.Core()
        self.requests = {stage: self.open(core, stage) for stage in self.bundle.info.stages}

    def open(self, core: Any, stage: str) -> Any:
        """Compile one stage. Without the precision hint OpenVINO would compute fp32 graphs in bf16 where it can."""
        if self.bundle.info.target == "openvino":
            file, weights = self.bundle.path / f"{stage}.xml", str(self.bundle.path / OPENVINO_WEIGHTS)
        else:
            file, weights = self.bundle.path / f"{stage}.onnx", ""
        hint = "bf16" if self.bundle.info.precision == "bf16" else "f32"
        threads = {"INFERENCE_NUM_THREADS": str(self.threads)} if self.threads else {}
        config = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", **threads}
        with failing("OpenVINO", f"to load {file.name}", RuntimeError):
            return core.compile_model(core.read_model(str(file), weights), "CPU", config).create_infer_request()

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        request = self.requests[stage]
        names = [i.get_any_name() for i in request.model_inputs]
        with failing("OpenVINO", f"in {stage}", RuntimeError):
            found = request.infer({name: inputs[name] for name in names}, share_inputs=True)
        if self.bundle.info.method == "bbtv2":  # otherwise each stage would keep activations that only it can use
            request.get_compiled_model().release_memory()
        return {o.get_any_name(): found[o] for o in request.model_outputs}

    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "device": "CPU"}

    def close(self) -> None:
        super().close()
        self.requests = {}
