"""A function call in a separate process, so that its memory is measured alone and a crash becomes a
result.

The child runs `python -m bbt_accel.io.processes PARENT MODULE:FUNCTION REQUEST REPLY`: keyword
arguments come as a JSON file, the result or the error goes back as another. It ends with its
parent, whose process id is PARENT.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from bbt_accel import errors
from bbt_accel.errors import BbtError, EngineError, MissingDependency, first_line, missing_module
from bbt_accel.io.files import write_atomically

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONSAFEPATH": "1",  # a folder named triton or onnx where the user works is no module
}
"""What a child has in its environment, and its own children have."""
Reply = dict[str, Any]  # {"value": ...}, or {"error": class name, "message": ...}


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a module-level function in a new process. Arguments and the result must be JSON; paths
    become strings.

    Raises the BbtError that the function raised; MissingDependency for a module that is not
    installed; EngineError for any other error, and for a process that died.
    """
    with Child(function, arguments) as child:
        reply = child.reply()
    if "error" in reply:
        raise getattr(errors, reply["error"], EngineError)(reply["message"])
    return reply["value"]


class Child:
    """A process that calls a function; it is killed when the block ends or at `close`."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="bbt-accel-")
        self._folder = Path(self._temporary.name)
        command = prepare(function, arguments, self._folder)
        with (self._folder / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | ENVIRONMENT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def reply(self) -> Reply:
        """Wait for what the process replies; the cause of death, as an error, of one that died."""
        exit_code = self._process.wait()
        file = self._folder / "reply.json"
        if file.is_file():
            content: Reply = json.loads(file.read_text(encoding="utf-8"))
            return content
        stderr = (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")
        return {"error": EngineError.__name__, "message": _cause_of_death(exit_code, stderr)}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._temporary.cleanup()


def prepare(function: Callable[..., Any], arguments: dict[str, Any], folder: Path) -> list[str]:
    """The command of a process that calls the function; request and reply are files in `folder`."""
    request, reply = folder / "request.json", folder / "reply.json"
    request.write_text(json.dumps(arguments, default=str), encoding="utf-8")
    name = f"{function.__module__}:{function.__name__}"
    # -P, for the same reason as PYTHONSAFEPATH
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), name, str(request), str(reply)]


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> Reply:
    """Call the function in this process and reply with its result or its error."""
    try:
        return {"value": function(**arguments)}
    except BbtError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        return {
            "error": MissingDependency.__name__,
            "message": f"{missing_module(error)}; see bbt-accel doctor",
        }
    except MemoryError:
        return {"error": EngineError.__name__, "message": "out of memory"}
    except Exception as error:  # whatever an engine raises is a row of the table
        return {
            "error": EngineError.__name__,
            "message": f"{type(error).__name__}: {first_line(error):.200}",
        }


def _cause_of_death(exit_code: int, stderr: str) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"the process was ended by {name}" + (
            ", perhaps for lack of memory" if name == "SIGKILL" else ""
        )
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    return f"the process ended with exit code {exit_code} ({last:.200})"


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, which batch systems send, raises KeyboardInterrupt in the block, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def end_with(parent: int) -> None:
    """End this process as soon as its parent has ended, even by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.name == "posix":  # elsewhere a process keeps the number of its parent
        threading.Thread(target=watch, daemon=True).start()


def main(parent: str, name: str, request: str, reply: str) -> None:
    end_with(int(parent))
    module, _, function = name.partition(":")
    arguments = json.loads(Path(request).read_text(encoding="utf-8"))
    with interrupted_by_sigterm():
        answer = attempt(
            lambda **given: getattr(import_module(module), function)(**given), arguments
        )
    write_atomically(Path(reply), json.dumps(answer).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
