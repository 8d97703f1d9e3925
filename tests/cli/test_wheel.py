"""The wheel, as a user gets it: in an empty environment it tunes and predicts from a bundle,
without torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import bbt_accel

ROOT = Path(__file__).parents[2]
LEFT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo-run")

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=clean, check=False)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT)  # a build leaves files in the source
    built = run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    if built.returncode:
        output = built.stdout + built.stderr
        if "No matching distribution" in output or "onnection" in output:
            pytest.skip("pip cannot reach an index for setuptools")
        pytest.fail(output)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    return next(release.glob("*.whl"))


def test_a_release_is_one_that_the_index_takes(release: Path, wheel: Path) -> None:
    pytest.importorskip("twine")
    files = sorted(release.iterdir())
    name = f"bbt_accel-{bbt_accel.__version__}"
    assert [file.name for file in files] == [f"{name}-py3-none-any.whl", f"{name}.tar.gz"]
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert checked.returncode == 0, checked.stdout
    assert wheel.stat().st_size < 25 * 2**20


def test_wheel_holds_what_it_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
    assert {name.split("/")[0] for name in names} == {"bbt_accel", info.rstrip("/")}
    licenses = ("LICENSE", "bbt_accel/core/demo/backbone/NOTICE")
    assert {f"{info}licenses/{name}" for name in licenses} <= names
    for folder in ("exporters", "engines", "benchmarks"):
        code = (ROOT / folder).rglob("*.py")
        assert {f"bbt_accel/{file.relative_to(ROOT)}" for file in code} <= names
    suffixes = ["py", "toml", "jsonl", "json", "safetensors", "md", "typed", "html", "css", "js"]
    for suffix in [*suffixes, "j2"]:
        shipped = (ROOT / "bbt_accel").rglob(f"*.{suffix}")
        assert {str(file.relative_to(ROOT)) for file in shipped} <= names


def test_tunes_and_predicts_without_torch(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bbt_accel.export_bundle("demo", tmp_path / "bundle", n_prompt_tokens=5)
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (binaries / "python", "-m", "pip", "--retries", "1", "install", "-q")
    installed = run(*pip, f"{wheel}[cpu]")
    if installed.returncode:
        reason = installed.stderr.strip().splitlines()[-1]
        pytest.skip(f"pip cannot install the dependencies: {reason}")
    program = binaries / "bbt-accel"

    words = ["--bundle", tmp_path / "bundle", "--task", "demo", "--engine", "ort", "--json"]
    words += ["--set", "threads=2", "--k-shot", "4", "--popsize", "4", "--budget", "8"]
    tuned = run(program, "tune", *words, "-o", tmp_path / "run")
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)["calls"] == 5  # one fits the readout, and 4 are a generation
    text = "The striker scored twice in the final"
    predicted = run(program, "predict", tmp_path / "run", text, "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout)["word"] in bbt_accel.load_task("demo").words("masked")
    assert run(binaries / "python", "-c", "import torch").returncode, "torch was there after all"
    exported = run(program, "export", "demo", "-o", tmp_path / "other")
    assert exported.returncode == 1
    assert exported.stderr.startswith("error:"), exported.stderr
    assert "[export]" in exported.stderr
