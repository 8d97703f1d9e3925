"""Where the trials of a sweep or a comparison run: processes on this machine, or tasks on a Ray
cluster.

Each job has a process of its own, so that a crash fails that job alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from bbt_accel.errors import EngineError, first_line
from bbt_accel.io.cluster import connect, cpus_of, first_cause, require, share_of_cores
from bbt_accel.io.machine import physical_cores
from bbt_accel.io.processes import Child, Reply, attempt
from bbt_accel.io.progress import JobProgress, progress_bar

POLL = 0.05  # seconds between two looks at the processes


class PoolJob(NamedTuple):
    """A module-level function to call, with arguments and a result that are JSON."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]


class Pool(ABC):
    """Runs several jobs at a time."""

    jobs: int  # at a time
    threads: int  # CPU threads of each job

    def run(
        self, jobs: Sequence[PoolJob], done: int = 0, progress: bool = True
    ) -> Iterator[tuple[str, Reply]]:
        """Run jobs, and yield the name and the reply of each as it ends; `done`: others that were
        run before.
        """
        waiting, running = deque(jobs), 0
        with JobProgress(done + len(jobs), done, progress) as bar:
            while waiting or running:
                while waiting and running < self.jobs:
                    job = waiting.popleft()
                    self.start(job)
                    bar.begin(job.name)
                    running += 1
                name, reply = self.wait()
                running -= 1
                bar.end(name, "error" in reply)
                yield name, reply

    @abstractmethod
    def start(self, job: PoolJob) -> None:
        """Start a job; fewer than `jobs` may be running."""

    @abstractmethod
    def wait(self) -> tuple[str, Reply]:
        """Wait until a job ends; its name and its reply."""

    @abstractmethod
    def close(self) -> None:
        """Terminate the jobs that still run."""


class ProcessPool(Pool):
    """Processes on this machine, which share its cores."""

    def __init__(self, jobs: int | None, threads: int | None) -> None:
        self.jobs = jobs or 1
        self.threads = threads or max(1, physical_cores() // self.jobs)
        self._running: dict[str, Child] = {}

    def start(self, job: PoolJob) -> None:
        self._running[job.name] = Child(job.function, job.arguments)

    def wait(self) -> tuple[str, Reply]:
        while not (ended := [name for name, child in self._running.items() if child.ended()]):
            time.sleep(POLL)
        with self._running.pop(ended[0]) as child:
            return ended[0], child.reply()

    def close(self) -> None:
        for child in self._running.values():
            child.close()  # a search keeps every finished generation


class RayPool(Pool):
    """Tasks on a Ray cluster, whose nodes must see the bundles, the rows and the sweep's folder
    under the same paths.

    Each task requests its CPUs, and a GPU for the device cuda. jobs: one per GPU or per node unless
    given. Raises MissingDependency without ray, EngineError for a cluster that does not exist or
    cannot hold a job.
    """

    def __init__(self, address: str, jobs: int | None, threads: int | None, device: str) -> None:
        self._running: dict[Any, str] = {}
        with ExitStack() as stack:
            ray = self._ray = stack.enter_context(connect(address))
            gpus = 1 if device == "cuda" else 0
            self.jobs = jobs or max(
                1, int(ray.cluster_resources().get("GPU", 0)) if gpus else len(cpus_of(ray))
            )
            self.threads = threads or share_of_cores(ray, self.jobs)
            require(ray, 1, self.threads, gpus, "a trial")
            options = {"num_cpus": self.threads, "num_gpus": gpus, "max_calls": 1, "max_retries": 0}
            self._attempt = ray.remote(**options)(attempt).remote
            self._stack = stack.pop_all()

    def start(self, job: PoolJob) -> None:
        self._running[self._attempt(job.function, job.arguments)] = job.name

    def wait(self) -> tuple[str, Reply]:
        [ready], _ = self._ray.wait(list(self._running), num_returns=1)
        name = self._running.pop(ready)
        try:
            return name, self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            cause = first_cause(error)
            return name, {
                "error": EngineError.__name__,
                "message": f"the process ended ({first_line(cause):.200})",
            }

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._stack.close()


def open_pool(
    ray: str | None, jobs: int | None, threads: int | None, device: str, progress: bool
) -> Pool:
    """Processes on this machine, or with an address tasks on Ray."""
    if ray is None:
        return ProcessPool(jobs, threads)
    with progress_bar("connecting to Ray", progress):
        return RayPool(ray, jobs, threads, device)
