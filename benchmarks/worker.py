"""One step of the benchmark in a process of its own, so that its memory is its own and a crash is a result.

Run as `python -m bbt_accel.benchmarks.worker STEP REQUEST REPLY`: a JSON object of arguments in, a JSON reply out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bbt_accel import errors
from bbt_accel.errors import BbtError, EngineError, MissingDependency

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}


def call(step: str, **arguments: Any) -> Any:
    """Do a step in a new process and return what it returns.

    Raises the BbtError that the step raised; MissingDependency for a module that is not installed; EngineError for any
    other error, and for a process that died.
    """
    with tempfile.TemporaryDirectory(prefix="bbt-bench-") as folder:
        request, reply = Path(folder, "request.json"), Path(folder, "reply.json")
        request.write_text(json.dumps(arguments, default=str), encoding="utf-8")
        command = [sys.executable, "-m", "bbt_accel.benchmarks.worker", step, str(request), str(reply)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=os.environ | QUIET, check=False
        )
        if not reply.is_file():
            raise EngineError(death(done.returncode, done.stderr))
        answer = json.loads(reply.read_text(encoding="utf-8"))
    if "error" in answer:
        kind = getattr(errors, answer["error"], EngineError)
        raise kind(answer["message"])
    return answer["value"]


def death(code: int, stderr: str) -> str:
    """Why a process ended without a reply."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"the process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"the process ended with exit code {code} ({last:.200})"


def main(step: str, request: str, reply: str) -> None:
    answer: dict[str, Any]
    try:
        from bbt_accel.benchmarks.steps import STEPS

        answer = {"value": STEPS[step](**json.loads(Path(request).read_text(encoding="utf-8")))}
    except BbtError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        message = f"{error.name} is not installed; see bbt-accel doctor"
        answer = {"error": MissingDependency.__name__, "message": message}
    except MemoryError:
        answer = {"error": EngineError.__name__, "message": "out of memory"}
    except Exception as error:  # whatever an engine raises is a row of the table
        line = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": EngineError.__name__, "message": f"{type(error).__name__}: {line:.200}"}
    partial = Path(reply).with_suffix(".part")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.rename(reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
