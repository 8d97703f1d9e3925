"""What `optimize --target` writes: bundles of ONNX graphs, and how those of each engine differ.

`EngineSpec.converter` names the class, which plug-ins may subclass.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import OPENVINO_WEIGHTS, Bundle, write_info
from bbt_accel.core.engine_specs import EngineSpec, Precision
from bbt_accel.engines.openvino_ir import openvino_bf16
from bbt_accel.errors import MissingDependency, UsageError
from bbt_accel.exporters.convert.calibration import Calibration
from bbt_accel.exporters.convert.formats import (
    Fused,
    convert_checkpoint,
    fuse_for_ort,
    transpose_in_matmuls,
    transpose_weights,
)
from bbt_accel.exporters.convert.half import emulate_bf16
from bbt_accel.exporters.convert.openvino_ir import save_openvino
from bbt_accel.exporters.convert.tensorrt import (
    OPERATORS,
    build_plans,
    check_capabilities,
    shape_profile,
)
from bbt_accel.exporters.trace import graph
from bbt_accel.exporters.trace.sessions import run_stages, temporary_graph
from bbt_accel.exporters.trace.validate import naive_forward
from bbt_accel.io.machine import installed
from bbt_accel.io.progress import Tell

Report = dict[str, object]
Converted = tuple[Report, Float32 | None]
"""What was done, and the new bundle's label logits where they are known."""


class Converter:
    """ONNX graphs without operators of a runtime's own. Other converters override what differs."""

    weights: ClassVar[str] = "weights.data"
    """The file of the weights that the checkpoint does not hold as the graphs take them."""
    counts: ClassVar[str] = "operators"
    """What the report calls the counts that `write` returns."""
    operators: ClassVar[tuple[str, ...]] = ()
    """Operators whose nodes are counted."""
    fp32_graphs: ClassVar[tuple[Precision, ...]] = ("fp32",)
    """Precisions that the runtime computes in from graphs in fp32."""
    matmul_nbits: ClassVar[bool] = False
    """int4: as ONNX Runtime's MatMulNBits, not as DequantizeLinear."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.name = spec, spec.name

    def prepare(self, compute_capability: str | None) -> None:
        """Called before any work. Raises UsageError, EngineError or MissingDependency for what
        cannot be built here.
        """
        if compute_capability is not None:
            raise UsageError(f"--compute-capability is for --target trt, not {self.name}")

    def convert(self, job: OptimizeJob, folder: Path) -> Converted | None:
        """Write all files in a way of its own; None, without any, for graphs by the methods
        below.
        """
        return None

    def fuse(self, model: ir.Model) -> Fused:
        """Fuse operators; most runtimes do that by themselves."""
        return model, {}

    def write_fp32(
        self, file: Path, folder: Path, stage: str, others: graph.NewWeights
    ) -> Counter[str]:
        """Write a stage of the exported bundle in fp32. Returns the counts for the report."""
        model = ir.load(file)
        transpose_weights(model)
        graph.save_stage(model, folder, stage, None, others)
        return self.counted(model.graph)

    def write(
        self, model: onnx.ModelProto, folder: Path, stage: str, others: graph.NewWeights
    ) -> Counter[str]:
        """Write a converted stage, as `write_fp32`."""
        graph.save_stage(graph.from_proto(model, folder), folder, stage, None, others)
        return self.counted(model.graph.node)

    def counted(self, nodes: Iterable[Any]) -> Counter[str]:
        return Counter(node.op_type for node in nodes if node.op_type in self.operators)

    def label_logits(self, bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
        """(P, N, C) of a bundle that was written, computed on the CPU."""
        return run_stages(bundle, batch, prompts)

    def emulated(self, bundle: Bundle, folder: Path) -> Bundle:
        """A bundle that gives on the CPU what this one gives on its device; the same, or one in
        `folder`.

        ONNX Runtime has no kernels for bf16 there.
        """
        in_graphs = bundle.info.precision == "bf16" and "bf16" not in self.fp32_graphs
        return emulate_bf16(bundle, folder) if in_graphs else bundle

    def finish(self, bundle: Bundle, rows: Calibration, tell: Tell) -> Report:
        """What remains to be done when the bundle is converted and measured; a part of the
        report.
        """
        return {}


class TorchConverter(Converter):
    """PyTorch's weights, without graphs."""

    def convert(self, job: OptimizeJob, folder: Path) -> Converted:
        shutil.copyfile(job.bundle.path / "tokenizer.json", folder / "tokenizer.json")
        convert_checkpoint(job.bundle.path, folder, job.precision)
        return {}, None

    def label_logits(self, bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
        return naive_forward(bundle)(batch, prompts)

    def emulated(self, bundle: Bundle, folder: Path) -> Bundle:
        return bundle


class OrtConverter(Converter):
    """Graphs with ONNX Runtime's own operators; in fp32 they refer to the checkpoint's own
    tensors.
    """

    counts = "fused"
    matmul_nbits = True

    def fuse(self, model: ir.Model) -> Fused:
        return fuse_for_ort(model)

    def write_fp32(
        self, file: Path, folder: Path, stage: str, others: graph.NewWeights
    ) -> Counter[str]:
        if not (
            folder / graph.CHECKPOINT
        ).exists():  # a copy: runtimes refuse external data with several hard links
            shutil.copyfile(file.with_name(graph.CHECKPOINT), folder / graph.CHECKPOINT)
        model = ir.load(file)
        originals = transpose_weights(model)
        model, fused = self.fuse(model)
        transpose_in_matmuls(model, originals)
        graph.save_stage(model, folder, stage, None, others)
        return Counter(fused)


class OpenVinoConverter(Converter):
    """OpenVINO's own format. bf16 is rounded to when the fp32 graphs are compiled."""

    weights = OPENVINO_WEIGHTS
    fp32_graphs = ("fp32", "bf16")

    def prepare(self, compute_capability: str | None) -> None:
        super().prepare(compute_capability)
        if not installed("openvino"):
            extra = self.spec.backends["cpu"].extra
            raise MissingDependency(
                f'--target {self.name} needs openvino: pip install "bbt-accel[{extra}]"'
            )

    def write_fp32(
        self, file: Path, folder: Path, stage: str, others: graph.NewWeights
    ) -> Counter[str]:
        return save_openvino(file, folder, stage, others)

    def write(
        self, model: onnx.ModelProto, folder: Path, stage: str, others: graph.NewWeights
    ) -> Counter[str]:
        with temporary_graph(model, folder) as file:
            return save_openvino(file, folder, stage, others)

    def finish(self, bundle: Bundle, rows: Calibration, tell: Tell) -> Report:
        return {"bf16": openvino_bf16()} if bundle.info.precision == "bf16" else {}


class TrtConverter(Converter):
    """Graphs with plans of TensorRT, which does not say what it fused."""

    operators = OPERATORS

    def prepare(self, compute_capability: str | None) -> None:
        self.capabilities = check_capabilities(compute_capability)

    def finish(self, bundle: Bundle, rows: Calibration, tell: Tell) -> Report:
        profile = shape_profile(bundle.info, rows.train, rows.longest, rows.settings).model_dump()
        info = bundle.info.model_copy(update={"optimization": {"profile": profile}})
        planned = Bundle(bundle.path, write_info(bundle.path, info))
        return {"profile": profile, **build_plans(planned, self.capabilities, tell)}


@dataclass(frozen=True)
class OptimizeJob:
    """What is converted, for which target, and the rows and prompts (4, …) that it is calibrated
    and measured on.
    """

    bundle: Bundle
    converter: Converter
    precision: Precision
    batch: Batch
    prompts: Float32
    max_rmse: float
    tell: Tell

    @cached_property
    def reference(self) -> Float32:
        """The source's label logits of these rows and prompts, (P, N, C)."""
        return run_stages(self.bundle, self.batch, self.prompts)
