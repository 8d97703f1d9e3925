"""A population that is divided among processes, here or on other machines: actors of Ray.

Every worker has the backbone, the rows and the search space, for the space follows from the settings. So what moves
in a generation is the candidates' z to the workers and their losses back; in BBTv2 also the prompt of the layer
whose turn has ended.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from bbt_accel.batch import Float32
from bbt_accel.bundle import Bundle
from bbt_accel.cluster import connect, first_cause, require, share_of_cores
from bbt_accel.cores import physical_cores
from bbt_accel.errors import BbtError, BundleError, EngineError, UsageError, first_line
from bbt_accel.objective import Float64
from bbt_accel.tuning.evaluator import Evaluator, Job
from bbt_accel.tuning.space import Space

DEATHS = 3
"""Deaths of workers in a row, without anything done between them, after which the search gives up."""


class Worker:
    """The actor. Its constructor does nothing, so that an error in `open` comes back as that error."""

    def open(self, job: Job, digest: str, layer_stds: Float32 | None) -> None:
        path = job.bundle.path
        if not path.is_dir() or Bundle.read(path).digest != digest:
            raise BundleError(f"{platform.node()} does not have the bundle {path}; put it where all nodes see it")
        self.job, self.evaluator = job, job.evaluator()
        if job.bundle.info.method == "bbt" or layer_stds is not None:
            self.make_space(layer_stds)

    def make_space(self, layer_stds: Float32 | None) -> None:
        self.space = Space(self.job.bundle.info, self.job.settings, layer_stds)

    def versions(self) -> dict[str, str]:
        return self.evaluator.versions()

    def layer_stds(self) -> Float32:
        return self.evaluator.layer_stds()

    def train(
        self, layer: int, candidates: Float32, first: int, end: int, changed: Mapping[int, Float32]
    ) -> tuple[Float64, Float64]:
        """Losses and metrics of candidates first .. end - 1. changed: prompts that are new in the stack, by layer."""
        for number, prompt in changed.items():
            self.space.stack[number] = prompt
        return self.evaluator.train(self.space, layer, candidates, slice(first, end))

    def dev(self, prompt: Float32) -> tuple[float, float]:
        return self.evaluator.dev(prompt)


class WorkersEvaluator(Evaluator):
    """So many workers. One that dies is replaced, and what it had to do is done again.

    The losses are those of one process, bit for bit, where the engine computes a candidate alike in every population
    of two or more and with every number of threads: ONNX Runtime does on a CPU, PyTorch with one thread a worker.
    (A population that is too large for one call of the engine may leave a candidate alone in the last call.)

    job: its engine's threads are each worker's; None for its share of the cores.
    address: of a Ray cluster, or `local` for one on this machine. tell: is told when a worker is replaced.
    Raises UsageError for more workers than pairs of candidates; MissingDependency without ray; what loading the
    engine raises; EngineError when the cluster is too small, or workers die again and again.
    """

    def __init__(self, workers: int, address: str, job: Job, tell: Callable[[str], object] = lambda line: None) -> None:
        check_workers(workers, job.settings.popsize)
        self._tell = tell
        self._stack = ExitStack()
        self.actors: list[Any] = []
        self._deaths = 0
        with ExitStack() as undo:
            undo.callback(self.close)
            self._connect(workers, address, job)
            self._known: list[dict[int, Float32]] = [{} for _ in range(workers)]
            """The prompts of the stack that each worker has, by layer; zero where there is none."""
            self._stds: Float32 | None = None
            self.actors += [self._make() for _ in range(workers)]
            opened = [actor.open.remote(self._job, self._digest, None) for actor in self.actors]
            for number, reference in enumerate(opened):
                self._await_open(number, reference)
            undo.pop_all()

    def _connect(self, workers: int, address: str, job: Job) -> None:
        cores = max(physical_cores(), workers * (job.engine.threads or 1))
        ray = self._ray = self._stack.enter_context(connect(address, cores))
        cpus = job.engine.threads or share_of_cores(ray, workers)
        gpus = 1 if job.engine.device == "cuda" else 0
        require(ray, workers, cpus, gpus, f"--workers {workers}")
        bundle = Bundle(job.bundle.path.absolute(), job.bundle.info)
        job = replace(job, bundle=bundle, engine=job.engine.model_copy(update={"threads": cpus}))
        self._job, self._digest = ray.put(job), bundle.digest
        self._make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker).remote
        exceptions = ray.exceptions
        self._dead = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError)

    def versions(self) -> dict[str, str]:
        found: dict[str, str] = self._one(lambda number: self.actors[number].versions.remote())
        return found

    def layer_stds(self) -> Float32:
        self._stds = self._one(lambda number: self.actors[number].layer_stds.remote())
        self._all(lambda number: self.actors[number].make_space.remote(self._stds))
        return self._stds

    def train(self, space: Space, layer: int, candidates: Float64) -> tuple[Float64, Float64]:
        z = candidates.astype(np.float32)  # as the projection takes them
        shares = np.array_split(np.arange(len(z)), len(self.actors))

        def ask(number: int) -> Any:
            first, end = int(shares[number][0]), int(shares[number][-1]) + 1
            return self.actors[number].train.remote(layer, z, first, end, self._changed(number, space))

        losses, metrics = zip(*self._all(ask), strict=True)
        return np.concatenate(losses), np.concatenate(metrics)

    def dev(self, prompt: Float32) -> tuple[float, float]:
        loss, score = self._one(lambda number: self.actors[number].dev.remote(prompt))
        return loss, score

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []
        self._stack.close()

    def _changed(self, number: int, space: Space) -> dict[int, Float32]:
        """Prompts of the stack that the worker does not have yet; from now on it has them."""
        known, zero = self._known[number], np.float32(0)
        new = {i: p.copy() for i, p in enumerate(space.stack) if not np.array_equal(p, known.get(i, zero * p))}
        known |= new
        return new

    def _one(self, ask: Callable[[int], Any]) -> Any:
        return self._do(ask, [0])[0]

    def _all(self, ask: Callable[[int], Any]) -> list[Any]:
        return self._do(ask, range(len(self.actors)))

    def _do(self, ask: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
        """What each of these workers answers; `ask` calls a worker and is called again for one that replaces it."""
        running = {ask(number): number for number in numbers}
        answers: dict[int, Any] = {}
        while running:
            [ready], _ = self._ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            try:
                answers[number] = self._get(ready)
            except self._dead as death:
                self._replace(number, death)
                running[ask(number)] = number
            else:
                self._deaths = 0
        return [answers[number] for number in sorted(answers)]

    def _replace(self, number: int, death: Exception) -> None:
        self._deaths += 1
        if self._deaths >= DEATHS:
            raise EngineError(
                f"{DEATHS} workers died one after the other ({first_line(death):.200}); if they lack memory, use fewer"
            ) from death
        self._tell(f"worker {number + 1} died ({first_line(death):.200}); another takes its place")
        self._ray.kill(self.actors[number])  # where it was only out of reach
        self.actors[number], self._known[number] = self._make(), {}
        self._await_open(number, self.actors[number].open.remote(self._job, self._digest, self._stds))

    def _await_open(self, number: int, opened: Any) -> None:
        try:
            self._get(opened)
        except self._dead as death:
            self._replace(number, death)

    def _get(self, reference: Any) -> Any:
        """The answer of a worker; raises the BbtError that it raised."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = first_cause(error)
            if isinstance(cause, BbtError):
                raise cause from error
            raise EngineError(f"a worker failed ({type(cause).__name__}: {first_line(cause):.200})") from error


def check_workers(workers: int, popsize: int) -> None:
    """Raises UsageError when a worker would get fewer than two candidates.

    One candidate alone takes other kernels than several (a matrix of one row), whose last bits differ.
    """
    if not 1 <= workers <= popsize // 2:
        raise UsageError(f"--workers must lie in 1..{popsize // 2}, half of --popsize {popsize}; got {workers}")
