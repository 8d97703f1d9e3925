"""OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import openvino

from bbt_accel.engines.base import failing
from bbt_accel.engines.openvino_ir import StageReader, compile_options
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import EngineError

ONNX = b"\x08"  # the first byte of an ONNX file: the tag of its version


class OpenVinoEngine(StagedEngine):
    """The bundle's stages in OpenVINO, from its own format or from ONNX, in the bundle's
    precision.
    """

    def load(self) -> None:
        super().load()
        with failing("OpenVINO", "to map the weights", ValueError):  # of an empty file
            self.reader = (
                StageReader(self.bundle.path) if self.bundle.info.target == "openvino" else None
            )
        self.requests = {stage: self.open(stage) for stage in self.bundle.info.stages}

    def open(self, stage: str) -> Any:
        """Compile one stage."""
        config = compile_options(self.bundle.info.precision, self.threads)
        with failing("OpenVINO", f"to load {stage}", RuntimeError, ValueError):
            if self.reader is not None:
                return self.reader.compile(stage, config).create_infer_request()
            file = self.bundle.path / f"{stage}.onnx"
            with (
                file.open("rb") as stream
            ):  # OpenVINO would try other formats, whose readers print errors of their own
                if stream.read(1) != ONNX:
                    raise EngineError(f"{file} is no ONNX graph; export the bundle again")
            return openvino.Core().compile_model(str(file), "CPU", config).create_infer_request()

    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        request = self.requests[stage]
        names = [i.get_any_name() for i in request.model_inputs]
        with failing("OpenVINO", f"in {stage}", RuntimeError):
            found = request.infer({name: inputs[name] for name in names}, share_inputs=True)
        if (
            self.bundle.info.method == "bbtv2"
        ):  # otherwise each stage would keep activations that only it can use
            request.get_compiled_model().release_memory()
        return {o.get_any_name(): found[o] for o in request.model_outputs}

    def versions(self) -> dict[str, str]:
        return {"openvino": openvino.__version__, "device": "CPU"}

    def close(self) -> None:
        super().close()
        self.requests = {}
        self.reader = None
