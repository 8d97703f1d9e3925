"""Packages in OpenVINO's own format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bbt_accel.core.batch import Int64
from bbt_accel.core.bundle import state_name
from bbt_accel.core.engine_specs import Precision
from bbt_accel.engines.base import failing
from bbt_accel.engines.openvino_ir import StageReader, compile_options
from bbt_accel.exporters.convert.openvino_mlp import separate_mlps
from bbt_accel.package.comparison import LoadedModel
from bbt_accel.package.compose import save
from bbt_accel.package.packaged_run import CHECKED, ROWS, PackagedRun


def write_openvino(made: PackagedRun, file: Path) -> None:
    """Write FILE.xml and FILE.bin, in the precision of the bundle's stages."""
    import openvino

    with failing("OpenVINO", f"to write {file.name}", RuntimeError, ValueError):
        if made.info.target == "openvino":
            reader = StageReader(made.bundle.path)  # lives until the weights are written
            openvino.save_model(joined(made, reader), file, compress_to_fp16=False)
            return
        with tempfile.TemporaryDirectory(prefix="bbt-accel-", dir=file.parent) as folder:
            save(made.graph(), Path(folder) / "model.onnx")
            model = openvino.convert_model(Path(folder) / "model.onnx")
            separate_mlps(model)
            openvino.save_model(model, file, compress_to_fp16=False)


def joined(made: PackagedRun, reader: StageReader) -> Any:
    """One model of the rows, the stages of an OpenVINO bundle and the readout."""
    import openvino

    front = converted(made.front())
    known = outputs_of(front)
    for own, name in ROWS.items():
        known[name] = known.pop(own)
        known[name].get_tensor().add_names({CHECKED[name]})
    for stage, constants in made.stages().items():
        model = reader.read(stage)
        connect(model, known, constants)
        known |= {state_name(name): value for name, value in outputs_of(model).items()}
    back = converted(made.back())
    connect(back, known, {})
    logits = outputs_of(back)["logits"]
    whole = openvino.Model([logits], front.get_parameters(), "classifier")
    whole.outputs[0].get_tensor().set_names({"logits"})
    return whole


def converted(model: onnx.ModelProto) -> Any:
    """A small ONNX graph as OpenVINO's model."""
    import openvino

    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as folder:
        file = Path(folder) / "part.onnx"
        onnx.save(model, file)
        return openvino.convert_model(file)


def outputs_of(model: Any) -> dict[str, Any]:
    """What the results of a model return, by name."""
    return {o.get_any_name(): o.get_node().input_value(0) for o in model.outputs}


def connect(model: Any, known: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Replace the inputs of a model by constants and by outputs of other models."""
    from openvino import opset13 as ops
    from openvino.utils import replace_node

    for parameter in model.get_parameters():
        name = parameter.output(0).get_any_name()
        given = ops.constant(constants[name]).output(0) if name in constants else known[name]
        replace_node(parameter, [given])


def open_openvino(file: Path, precision: Precision, threads: int | None) -> LoadedModel:
    """The model on the CPU in the precision that it was written in, with what the comparison reads
    as outputs.
    """
    import openvino

    with failing("OpenVINO", f"to load {file.name}", RuntimeError, ValueError):
        core = openvino.Core()
        model = core.read_model(file)
        model.add_outputs(list(CHECKED.values()))
        compiled = core.compile_model(model, "CPU", compile_options(precision, threads))
    names = {"logits": "logits", **CHECKED}

    def run(inputs: dict[str, Int64]) -> dict[str, np.ndarray]:
        with failing("OpenVINO", f"in {file.name}", RuntimeError):
            found = compiled(inputs)
        return {own: np.array(found[name]) for own, name in names.items()}

    return run
