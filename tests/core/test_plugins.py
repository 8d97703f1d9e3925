"""A package that is installed beside bbt-accel adds an engine and a family, by entry points
alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import transformers
from search_parts import task_file
from tiny_backbones import BACKBONES, save_tokenizer

pytestmark = pytest.mark.slow
FILES = {
    "toy_plugin/__init__.py": """
from bbt_accel.core.engine_specs import Backend, EngineSpec

ENGINE = EngineSpec(
    "toy",
    {"cpu": Backend("toy_plugin.engine:ToyEngine")},
    reads=("onnx", "toy"),
    optimized=("fp32",),
    converter="toy_plugin.converter:ToyConverter",
)
""",
    "toy_plugin/engine.py": """
from dummy_engine import DummyEngine

class ToyEngine(DummyEngine):
    def versions(self):
        return {"toy": "1.0"}
""",
    "toy_plugin/converter.py": """
from bbt_accel.exporters.convert.converters import Converter

class ToyConverter(Converter):
    def write_fp32(self, file, folder, stage, others):
        (folder / f"{stage}.toy").write_text("converted")
        return super().write_fp32(file, folder, stage, others)
""",
    "toy_plugin/family.py": """
from dataclasses import replace
from transformers import AutoConfig, BertConfig, BertForMaskedLM
from bbt_accel.exporters.families.bert import BERT

class ToyConfig(BertConfig):
    model_type = "toy"

class ToyForMaskedLM(BertForMaskedLM):
    config_class = ToyConfig

AutoConfig.register("toy", ToyConfig)
FAMILY = replace(BERT, model_type="toy", model_class=ToyForMaskedLM)
""",
    "toy_plugin-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n",
    "toy_plugin-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
    "Root-Is-Purelib: true\nTag: py3-none-any\n",
    "toy_plugin-1.0.dist-info/entry_points.txt": """
[bbt_accel.engines]
toy = toy_plugin:ENGINE
[bbt_accel.families]
toy = toy_plugin.family:FAMILY
""",
    "toy_plugin-1.0.dist-info/RECORD": "",
}
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The command line in an environment in which pip has installed the package."""
    folder = tmp_path_factory.mktemp("plugin")
    wheel = folder / "toy_plugin-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(folder / "site"),
    ]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bbt_accel.cli.commands", *map(str, words)]
        path = os.pathsep.join(
            [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_its_family_is_exported_and_its_engine_tunes(cli: Cli, tmp_path: Path) -> None:
    config = transformers.BertConfig(**BACKBONES["bert"][2]).to_dict() | {"model_type": "toy"}
    transformers.BertForMaskedLM(transformers.BertConfig(**BACKBONES["bert"][2])).save_pretrained(
        tmp_path / "toy"
    )
    (tmp_path / "toy" / "config.json").write_text(json.dumps(config))
    save_tokenizer("bert", tmp_path / "toy")

    exported = cli(
        "export", tmp_path / "toy", "-o", tmp_path / "bundle", "--n-prompt-tokens", 3, "--json"
    )
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["family"] == "toy"

    optimized = cli(
        "optimize", tmp_path / "bundle", "-o", tmp_path / "converted", "--target", "toy", "--json"
    )
    assert optimized.returncode == 0, optimized.stderr
    assert json.loads(optimized.stdout)["target"] == "toy"
    assert [file.name for file in (tmp_path / "converted").glob("*.toy")] == ["model.toy"]

    task = task_file(tmp_path / "data")
    options = [
        "--task",
        task,
        "--data",
        task.parent,
        "--engine",
        "toy",
        "--k-shot",
        2,
        "-o",
        tmp_path / "run",
        "--json",
    ]
    tuned = cli("tune", "--bundle", tmp_path / "converted", *options)
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)["engine"]["versions"] == {"toy": "1.0"}


def test_its_engine_is_listed_and_runs_where_it_says(cli: Cli, tmp_path: Path) -> None:
    assert json.loads(cli("doctor", "--json").stdout)["engines"]["toy"]["runs"]
    wrong = cli(
        "tune", "--bundle", tmp_path, "--task", "demo", "--engine", "tyo", "-o", tmp_path / "run"
    )
    assert (wrong.returncode, "did you mean toy?" in wrong.stderr) == (2, True)
    refused = cli(
        "optimize", tmp_path / "bundle", "-o", tmp_path / "made", "--target", "toy", "--int8"
    )
    assert (refused.returncode, "--target toy supports fp32, not int8" in refused.stderr) == (
        2,
        True,
    )
