"""Packages whose model is one ONNX graph: onnx, triton and web."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from bbt_accel.core.batch import Int64
from bbt_accel.core.engine_specs import Precision
from bbt_accel.engines.base import failing
from bbt_accel.engines.ort_sessions import inference_session, session_options
from bbt_accel.package.comparison import LoadedModel
from bbt_accel.package.compose import save
from bbt_accel.package.packaged_run import CHECKED, PackagedRun

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def write_onnx(made: PackagedRun, file: Path) -> None:
    save(made.graph(), file)


def open_onnx(file: Path, precision: Precision, threads: int | None) -> LoadedModel:
    """The graph in ONNX Runtime on the CPU, with what the comparison reads as further outputs.

    Without VNNI its sums are wide, as those of `predict` are: the graph is compared, not the
    processor.
    """
    model = onnx.load(file, load_external_data=False)
    for name in CHECKED.values():
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None)
        )
    options = session_options(threads)
    options.add_session_config_entry(EXTERNAL_FOLDER, str(file.parent))
    with failing("ONNX Runtime", f"to load {file.name}"):
        session = inference_session(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = {"logits": "logits", **CHECKED}

    def run(inputs: dict[str, Int64]) -> dict[str, np.ndarray]:
        with failing("ONNX Runtime", f"in {file.name}"):
            return dict(zip(names, session.run(list(names.values()), inputs), strict=True))

    return run
