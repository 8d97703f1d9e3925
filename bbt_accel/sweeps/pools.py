"""Where the trials of a sweep run: processes of this machine, or tasks on a Ray cluster.

Each trial has a process of its own, so that one that crashes is a failure and nothing more.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bbt_accel.benchmarks import worker
from bbt_accel.cluster import connect, cpus_of, first_cause, require, share_of_cores
from bbt_accel.cores import physical_cores
from bbt_accel.errors import EngineError, first_line

Answer = dict[str, Any]
"""As `benchmarks.worker.attempt` returns it."""
POLL = 0.05
"""Seconds between two looks at the processes."""


class Pool(ABC):
    """Runs a few trials at a time. When the block ends, what still runs is stopped."""

    jobs: int
    """Trials at a time."""
    threads: int
    """CPU threads of each."""

    @abstractmethod
    def start(self, name: str, arguments: dict[str, Any]) -> None:
        """Begin a trial; there must be room for it."""

    @abstractmethod
    def wait(self) -> tuple[str, Answer]:
        """Wait until a trial ends; its name and its answer."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Processes(Pool):
    """Processes of this machine, which share its cores."""

    def __init__(self, jobs: int | None, threads: int | None) -> None:
        self.jobs = jobs or 1
        self.threads = threads or max(1, physical_cores() // self.jobs)
        self._folder = tempfile.TemporaryDirectory(prefix="bbt-sweep-")
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path, IO[bytes]]] = {}
        self._count = 0

    def start(self, name: str, arguments: dict[str, Any]) -> None:
        self._count += 1
        folder = Path(self._folder.name, str(self._count))
        folder.mkdir()
        command = worker.prepare("trial", arguments, folder)
        errors = (folder / "stderr").open("wb")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=worker.env())
        self._running[name] = process, folder, errors

    def wait(self) -> tuple[str, Answer]:
        while True:
            for name, (process, folder, errors) in self._running.items():
                code = process.poll()
                if code is not None:
                    errors.close()
                    del self._running[name]
                    stderr = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
                    return name, worker.read_answer(folder, code, stderr)
            time.sleep(POLL)

    def close(self) -> None:
        for process, _, _ in self._running.values():
            process.terminate()  # the search keeps every generation that it has done
        for process, _, errors in self._running.values():
            process.wait()
            errors.close()
        self._running = {}
        self._folder.cleanup()


class RayTasks(Pool):
    """Tasks on a Ray cluster, whose nodes must see the bundles, the rows and the sweep's folder by the same paths.

    Each asks for its CPUs, and for a GPU where that is the device. jobs: unless given, one a GPU or one a node.
    Raises MissingDependency without ray, EngineError when there is no such cluster, or none that could hold a trial.
    """

    def __init__(self, address: str, jobs: int | None, threads: int | None, device: str) -> None:
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.close)
            ray = self._ray = self._stack.enter_context(connect(address))
            gpus = 1 if device == "cuda" else 0
            self.jobs = jobs or max(1, int(ray.cluster_resources().get("GPU", 0)) if gpus else len(cpus_of(ray)))
            self.threads = threads or share_of_cores(ray, self.jobs)
            require(ray, 1, self.threads, gpus, "a trial")
            options = {"num_cpus": self.threads, "num_gpus": gpus, "max_calls": 1, "max_retries": 0}
            self._attempt = ray.remote(**options)(worker.attempt).remote
            self._running: dict[Any, str] = {}
            undo.pop_all()

    def start(self, name: str, arguments: dict[str, Any]) -> None:
        self._running[self._attempt("trial", arguments)] = name

    def wait(self) -> tuple[str, Answer]:
        [ready], _ = self._ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(ready)
        try:
            return name, self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            cause = first_cause(error)
            return name, {"error": EngineError.__name__, "message": f"the process ended ({first_line(cause):.200})"}

    def close(self) -> None:
        for reference in getattr(self, "_running", {}):
            self._ray.cancel(reference, force=True)
        self._stack.close()
