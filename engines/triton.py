"""A backbone whose stages are models of Triton, or of any other server of the Open Inference
Protocol.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from bbt_accel.core import inference_protocol as protocol
from bbt_accel.core.bundle import Bundle
from bbt_accel.engines.client import Server
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import BundleError


class TritonEngine(StagedEngine):
    """Any other server, with one model for each stage of the bundle (`bbt-accel triton` writes
    them).

    Every request carries all its tensors; buckets, chunks and bbtv2's cached layers stay on the
    client.
    """

    def __init__(self, bundle: Bundle, server: Server, without: frozenset[str]) -> None:
        super().__init__(bundle, without=without)
        if bundle.info.target == "trt":
            from bbt_accel.engines.plans import profile_of

            self.limit(profile_of(bundle))
        self.server = server
        name = server.model or bundle.path.resolve().name
        self.models = {stage: protocol.stage_model(name, stage) for stage in bundle.info.stages}
        self.inputs, self.outputs = dict[str, list[str]](), dict[str, list[str]]()
        for stage, model in self.models.items():
            self.inputs[stage], self.outputs[stage] = self.tensors_of(stage, model)

    def tensors_of(self, stage: str, model: str) -> tuple[list[str], list[str]]:
        """Names of a model's inputs and outputs. BundleError for another bundle, or prompts of
        another shape.
        """
        self.server.check(self.bundle, model)
        metadata = self.server.described(self.server.client.get_model_metadata, model)
        shapes = {
            tensor["name"]: [int(size) for size in tensor["shape"]] for tensor in metadata["inputs"]
        }
        found, wanted = shapes.get("prompts"), [-1, *self.bundle.info.prompt_shape[-2:]]
        if stage not in ("context", "embed") and found != wanted:
            takes = f"model {model} of {self.server.url} takes prompts {found}, not {wanted}"
            raise BundleError(f"{takes}; it belongs to another bundle")
        return list(shapes), [tensor["name"] for tensor in metadata["outputs"]]

    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs[stage]}
        wanted = [name for name in self.outputs[stage] if name not in skip]
        result = self.server.infer(self.models[stage], arrays, outputs=wanted)
        return {
            out["name"]: result.as_numpy(out["name"]) for out in result.get_response()["outputs"]
        }

    def versions(self) -> dict[str, str]:
        return self.server.versions()

    def close(self) -> None:
        super().close()
        self.server.close()
