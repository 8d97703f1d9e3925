"""Libraries that report their use: none does where bbt-accel was imported first, and none leaves
files.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ORT = """
import bbt_accel, numpy, onnx, onnxruntime
from onnx import TensorProto, helper
one = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
two = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [one], [two])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
providers = ["CPUExecutionProvider"]
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers)
session.run(None, {"x": numpy.ones(1, numpy.float32)})
"""
OPENVINO = """
import sys
import bbt_accel, openvino
assert callable(openvino.convert_model)
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""


@pytest.mark.parametrize(("library", "program"), [("onnxruntime", ORT), ("openvino", OPENVINO)])
def test_no_files_and_no_reports(library: str, program: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    silenced = {
        "CI",
        "TF_BUILD",
        "JENKINS_URL",
        "ORT_DISABLE_TELEMETRY",
    }  # some libraries are silent there anyway
    environment = {name: value for name, value in os.environ.items() if name not in silenced}
    places = {
        name: str(tmp_path / name)
        for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    }
    for place in places.values():
        Path(place).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | places, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


OFF = {
    "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}  # fmt: skip
"""What docs/how-to/install.md promises."""


def test_the_settings_reach_every_child() -> None:
    import bbt_accel  # noqa: F401

    assert os.environ.items() >= OFF.items()


def test_a_users_own_choice_is_kept() -> None:
    code = f"import bbt_accel, os; print(*(os.environ[name] for name in {list(OFF)}))"
    environment = os.environ | dict.fromkeys(OFF, "mine")
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    ).stdout
    assert found.split() == ["mine"] * len(OFF)
