"""Calls in processes of their own: what they import, and that they end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bbt_accel.errors import BbtError, MissingDependency
from bbt_accel.io import processes
from bbt_accel.io.machine import physical_cores

BROKEN = 'raise RuntimeError("imported from the working directory")\n'


@pytest.fixture
def surrounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders that are named like packages."""
    for name in ("bbt_accel", "numpy", "onnx", "torch", "triton"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path


def imported_twice() -> bool:
    """Whether this process and a child of its own import what is installed."""
    import numpy

    code = "import numpy; print(numpy.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() == numpy.__version__


def test_folders_in_the_working_directory_are_no_modules(
    surrounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert processes.call(physical_cores) == physical_cores()
    there = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    monkeypatch.setenv("PYTHONPATH", there)
    assert processes.call(imported_twice)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "last", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)", "child.wait()"]
)
def test_a_child_ends_with_its_parent(tmp_path: Path, last: str) -> None:
    parent = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
from bbt_accel.io import processes
command = processes.prepare(signal.pause, {{}}, Path({str(tmp_path)!r}))
child = subprocess.Popen(command, stdin=subprocess.PIPE)
print("started", flush=True)
{last}
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        if last == "child.wait()":
            process.terminate()
        # Both have the pipe, which ends with the last of them.
        assert process.communicate(timeout=60)[0] == ""


TERMINATED = """
import signal
from bbt_accel.io import processes
former = signal.getsignal(signal.SIGTERM)
try:
    with processes.interrupted_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGTERM) is former, flush=True)
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_sigterm_is_an_interrupt_inside_the_block_alone() -> None:
    done = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("interrupted True\n", -signal.SIGTERM)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "x is not installed"),
        (ImportError("libx.so: no memory"), "a library cannot be loaded (libx.so: no memory)"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_named_or_explained(
    error: ImportError, message: str
) -> None:
    def fail() -> None:
        raise error

    reply = processes.attempt(fail, {})
    assert reply["error"] == MissingDependency.__name__
    assert reply["message"].startswith(message)
    assert issubclass(MissingDependency, BbtError)
