"""Processes that share the evaluation of each population, on this machine or on others: actors of
Ray.

Every worker has the backbone, the rows and the projections, which follow from the settings. So a
generation sends the workers the candidates' z and, in BBTv2, the prompts of all layers, and
receives losses.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from bbt_accel.core.batch import Float32, Float64
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import kind_of
from bbt_accel.errors import BbtError, BundleError, EngineError, UsageError, first_line
from bbt_accel.io.cluster import connect, first_cause, require, share_of_cores
from bbt_accel.io.machine import physical_cores
from bbt_accel.search.evaluator import Evaluator, Job
from bbt_accel.search.methods import PromptSpace

MAX_DEATHS = (
    3  # of workers in a row, without any work done in between, after which the search fails
)


class Worker:
    """The actor. Its constructor does nothing, so that an error in `open` is returned as that
    error.
    """

    def open(self, job: Job, digest: str, layer_stds: Float32 | None) -> None:
        path = job.bundle.path
        if not path.is_dir() or Bundle.read(path).digest != digest:
            raise BundleError(
                f"{platform.node()} does not have the bundle {path}; put it where every node can "
                "read it"
            )
        self.job, self.evaluator = job, job.evaluator()
        if job.bundle.info.method == "bbt" or layer_stds is not None:
            self.make_space(layer_stds)

    def make_space(self, layer_stds: Float32 | None) -> None:
        self.space = PromptSpace(self.job.bundle, self.job.settings, layer_stds)

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.evaluator, name)(*arguments)

    def train(
        self, layer: int, candidates: Float32, stack: Float32, part: slice
    ) -> tuple[Float64, Float64]:
        """Losses and metrics of a part of the candidates. stack: the prompts of all layers."""
        self.space.stack = stack
        return self.evaluator.train(self.space, layer, candidates, part)


class WorkersEvaluator(Evaluator):
    """N workers. One that dies is replaced, and its work is repeated.

    The losses equal those of a single process, bit for bit, if the engine's results depend neither
    on the other
    candidates of a population of two or more nor on the number of threads: true of ONNX Runtime on
    a CPU, and of PyTorch with one thread per worker. (A population too large for one call may leave
    one candidate alone in the last call.)

    job: its `engine.threads` are those of each worker; None for an equal share of the cores.
    address: of a Ray cluster, or `local` to start one on this machine. report: called when a worker
    is replaced. Raises UsageError for more workers than pairs of candidates; MissingDependency
    without ray; what loading the engine raises; EngineError when the cluster is too small, or
    workers keep dying.
    """

    def __init__(
        self, workers: int, address: str, job: Job, report: Callable[[str], object] = lambda _: None
    ) -> None:
        check_workers(workers, job.settings.popsize)
        self._report, self._deaths, self._stack = report, 0, ExitStack()
        self._stds: Float32 | None = None
        self.actors: list[Any] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            self._connect(workers, address, job)
            self.actors += [self._make() for _ in range(workers)]
            for number, opened in enumerate([self._open(number) for number in range(workers)]):
                self._await_open(number, opened)
            undo.pop_all()

    def _connect(self, workers: int, address: str, job: Job) -> None:
        cores = max(physical_cores(), workers * (job.engine.threads or 1))
        ray = self._ray = self._stack.enter_context(connect(address, cores))
        cpus = job.engine.threads or share_of_cores(ray, workers)
        kind = kind_of(job.engine.device)  # a worker sees its own GPU alone, so that has no number
        gpus = 1 if kind == "cuda" else 0
        require(ray, workers, cpus, gpus, f"--workers {workers}")
        bundle = Bundle(job.bundle.path.absolute(), job.bundle.info)
        job = replace(
            job,
            bundle=bundle,
            engine=job.engine.model_copy(update={"threads": cpus, "device": kind}),
        )
        self._job, self._digest = ray.put(job), bundle.digest
        self._make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker).remote
        self._dead = (
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
        )

    def versions(self) -> dict[str, str]:
        return dict(self._first("versions"))

    def layer_stds(self) -> Float32:
        self._stds = self._first("layer_stds")
        self._all(lambda number: self.actors[number].make_space.remote(self._stds))
        return self._stds

    def train(self, space: PromptSpace, layer: int, candidates: Float64) -> tuple[Float64, Float64]:
        z, stack = (
            candidates.astype(np.float32),
            self._ray.put(space.stack),
        )  # float32 is what a projection takes
        shares = np.array_split(np.arange(len(z)), len(self.actors))
        parts = [slice(int(share[0]), int(share[-1]) + 1) for share in shares]
        found = self._all(
            lambda number: self.actors[number].train.remote(layer, z, stack, parts[number])
        )
        losses, metrics = zip(*found, strict=True)
        return np.concatenate(losses), np.concatenate(metrics)

    def dev(self, prompt: Float32) -> tuple[float, float]:
        loss, score = self._first("dev", prompt)
        return loss, score

    def dev_logits(self, prompt: Float32) -> Float32:
        logits: Float32 = self._first("dev_logits", prompt)
        return logits

    def outputs(self, prompt: Float32, states: bool) -> dict[str, Float32]:
        return dict(self._first("outputs", prompt, states))

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        self._stack.close()

    def _first(self, name: str, *arguments: Any) -> Any:
        return self._all(
            lambda number: self.actors[number].call.remote(name, *arguments), workers=1
        )[0]

    def _all(self, start: Callable[[int], Any], workers: int | None = None) -> list[Any]:
        """The results of all or the first `workers`. `start` calls one, and is called again for its
        replacement.
        """
        running = {start(number): number for number in range(workers or len(self.actors))}
        results: dict[int, Any] = {}
        while running:
            [ready], _ = self._ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            try:
                results[number] = self._get(ready)
                self._deaths = 0
            except self._dead as death:
                self._replace(number, death)
                running[start(number)] = number
        return [results[number] for number in sorted(results)]

    def _replace(self, number: int, death: Exception) -> None:
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            problem = f"{MAX_DEATHS} workers died in a row ({first_line(death):.200})"
            raise EngineError(f"{problem}; if they run out of memory, use fewer") from death
        self._report(f"worker {number + 1} died ({first_line(death):.200}); it is replaced")
        self._ray.kill(self.actors[number])  # if it is only unreachable
        self.actors[number] = self._make()
        self._await_open(number, self._open(number))

    def _open(self, number: int) -> Any:
        return self.actors[number].open.remote(self._job, self._digest, self._stds)

    def _await_open(self, number: int, opened: Any) -> None:
        try:
            self._get(opened)
        except self._dead as death:
            self._replace(number, death)

    def _get(self, reference: Any) -> Any:
        """The result of a worker; raises the BbtError that it raised."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = first_cause(error)
            if isinstance(cause, BbtError):
                raise cause from error
            raise EngineError(
                f"a worker failed ({type(cause).__name__}: {first_line(cause):.200})"
            ) from error


def check_workers(workers: int, popsize: int) -> None:
    """Raises UsageError when a worker would get fewer than two candidates.

    A single candidate takes other kernels than several (its matrices have one row), with other last
    bits.
    """
    if not 1 <= workers <= popsize // 2:
        raise UsageError(
            f"--workers must lie in 1..{popsize // 2}, half of --popsize {popsize}; got {workers}"
        )
