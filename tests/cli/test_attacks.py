"""Attacks, each with bounded time: kills at file operations, and malformed inputs.

By default some of the short ones are tried; BBT_ATTACKS=all tries every one, in about half an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]
ALL = os.environ.get("BBT_ATTACKS") == "all"
HERE = Path(__file__).parent


def attacked(*words: str) -> str:
    """The output of an attack, run as a script: it forks, and forks of a process with threads may
    hang.
    """
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("command", "every"), [("tune", 7), ("tune-v2", 11), ("overwrite", 7)])
def test_a_command_killed_anywhere_leaves_nothing_broken(command: str, every: int) -> None:
    found = attacked("kills.py", command, "1" if ALL else str(every))
    assert found.endswith(" 0 went wrong"), found


@pytest.mark.skipif(not ALL, reason="takes minutes: set BBT_ATTACKS=all")
@pytest.mark.parametrize("command", ["export", "package", "fit", "sweep"])
def test_a_command_that_takes_long_killed_anywhere(command: str) -> None:
    if command != "sweep":
        pytest.importorskip("torch")
        pytest.importorskip("onnxruntime")
    found = attacked("kills.py", command)
    assert found.endswith(" 0 went wrong"), found


def test_malformed_inputs_are_refused_in_one_line() -> None:
    found = attacked("malformed.py", "1" if ALL else "17")
    assert "mishandled 0" in found, found
