"""OpenVINO's operator for a whole gated MLP needs two threads; the graphs written for it leave it
no choice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Export

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("torch")

from tiny_backbones import marks, save_backbone  # noqa: E402

from bbt_accel.engines.openvino_ir import StageReader  # noqa: E402
from bbt_accel.exporters.convert.openvino_mlp import separate_mlps  # noqa: E402

GATED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "olmo2",
    "gemma3",
    "eurobert",
    "t5-v1.1",
    "mt5",
]
OTHERS = ["roberta", "gpt2", "bart", "modernbert", "phi3"]


def test_a_gated_mlp_is_computed_in_bf16_with_one_thread(exported: Export, tmp_path: Path) -> None:
    """In a process of its own, which the operator would end: with AMX, and sizes that are multiples
    of 32.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    bundle = exported(save_backbone("llama", tmp_path / "llama", **sizes), mode="cat")
    given = ["--target", "openvino", "--bf16", "--set", "threads=1"]
    given += ["-o", str(tmp_path / "made")]
    command = [sys.executable, "-P", "-m", "bbt_accel", "optimize", str(bundle.path), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "made" / "bundle.json").read_text())["optimization"]
    assert report["agreement"] >= 0.9


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks((name, "bbt", "cat"))) for name in GATED]
)
def test_every_gated_mlp_is_separated_once(tiny: Export, optimized: Export, name: str) -> None:
    source = openvino.convert_model(tiny(name, "bbt", "cat").path / "model.onnx")
    reader = StageReader(optimized((name, "bbt", "cat"), target="openvino").path)
    assert separate_mlps(source) >= 1
    assert separate_mlps(reader.read("model")) == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks((name, "bbt", "cat"))) for name in OTHERS]
)
def test_other_mlps_are_left_alone(tiny: Export, name: str) -> None:
    """ModernBERT's and Phi-3's, too: gate and up projection are one matmul, which OpenVINO keeps as
    it is in fp32.
    """
    assert separate_mlps(openvino.convert_model(tiny(name, "bbt", "cat").path / "model.onnx")) == 0
