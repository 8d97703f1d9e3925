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
        done = subprocess.run(
            prepare(step, arguments, Path(folder)), capture_output=True, text=True, errors="replace", env=env()
        )
        return value(read_answer(Path(folder), done.returncode, done.stderr))


def env() -> dict[str, str]:
    return os.environ | QUIET


def prepare(step: str, arguments: dict[str, Any], folder: Path) -> list[str]:
    """The command of a process that does a step; its request and its answer are files of the folder."""
    (folder / "request.json").write_text(json.dumps(arguments, default=str), encoding="utf-8")
    files = str(folder / "request.json"), str(folder / "reply.json")
    return [sys.executable, "-m", "bbt_accel.benchmarks.worker", step, *files]


def read_answer(folder: Path, code: int, stderr: str) -> dict[str, Any]:
    """What the process answered; for one that died, that as an error."""
    reply = folder / "reply.json"
    if not reply.is_file():
        return {"error": EngineError.__name__, "message": death(code, stderr)}
    answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return answer


def value(answer: dict[str, Any]) -> Any:
    """What the step returned. Raises what it raised."""
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


def attempt(step: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do a step here; what it returns, or its error as a name and a line."""
    try:
        from bbt_accel.benchmarks.steps import STEPS

        return {"value": STEPS[step](**arguments)}
    except BbtError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        message = f"{error.name} is not installed; see bbt-accel doctor"
        return {"error": MissingDependency.__name__, "message": message}
    except MemoryError:
        return {"error": EngineError.__name__, "message": "out of memory"}
    except Exception as error:  # whatever an engine raises is a row of the table
        line = (str(error).strip().splitlines() or [""])[0]
        return {"error": EngineError.__name__, "message": f"{type(error).__name__}: {line:.200}"}


def main(step: str, request: str, reply: str) -> None:
    answer = attempt(step, json.loads(Path(request).read_text(encoding="utf-8")))
    partial = Path(reply).with_suffix(".part")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.rename(reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
