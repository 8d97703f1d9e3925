"""Callbacks that observe a search: the interface, and the experiment trackers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from bbt_accel.errors import BbtError, MissingDependency, UsageError, check_known, first_line
from bbt_accel.search.history import AGAIN, Generation
from bbt_accel.search.run import EVENTS, Run, RunInfo

FIELDS = (
    "best_loss",
    "mean_loss",
    "metric",
    "step_size",
    "dev_score",
    "dev_loss",
    "calls_per_second",
)


class Callback:
    """Methods that a search calls; each does nothing unless a subclass defines it.

    An exception in one of them ends the search, which can then be resumed. A resumed search begins
    with the generations before it.
    """

    def on_start(self, info: RunInfo, folder: Path) -> None:
        """Before the first generation. folder: that of the run, which has another name until it is
        complete.
        """

    def on_generation(self, generation: Generation) -> None:
        """After each generation."""

    def on_score(self, generation: Generation) -> None:
        """After a generation with `dev_score` and `dev_loss`."""

    def on_end(self, run: Run) -> None:
        """With the complete run, also after Ctrl-C unless the former run stays; not after an
        error.
        """

    def close(self) -> None:
        """At last: after `on_end`, or after an error."""


class Callbacks:
    """Several callbacks as one observer of a search. A context manager, which closes them."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._all, self._stack = list(callbacks), ExitStack()

    def __enter__(self) -> Callbacks:
        for callback in self._all:
            self._stack.callback(callback.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, info: RunInfo, folder: Path) -> None:
        for callback in self._all:
            callback.on_start(info, folder)

    def __call__(self, generation: Generation) -> None:
        for callback in self._all:
            callback.on_generation(generation)
            if generation.dev_score is not None:
                callback.on_score(generation)

    def end(self, run: Run) -> None:
        for callback in self._all:
            callback.on_end(run)


def run_name(folder: Path) -> str:
    """The name that a run's folder will have when it is complete."""
    return folder.name.removeprefix(".").removesuffix(".partial")


def scalars(generation: Generation) -> dict[str, float]:
    """The numbers of a generation, by name, without those that it lacks."""
    return {name: value for name in FIELDS if (value := getattr(generation, name)) is not None}


def parameters(info: RunInfo) -> dict[str, Any]:
    """What identifies a run in a tracker: task, backbone, engine and every setting."""
    return {
        "task": info.task.name,
        "backbone": info.bundle.backbone,
        "method": info.bundle.method,
        "precision": info.bundle.precision,
        "engine": info.engine.name,
        "device": info.engine.device,
        **info.settings.model_dump(),
    }


def results(run: Run) -> dict[str, float]:
    """The scores that a run ends with."""
    info = run.info
    found = (
        {}
        if info.best is None
        else {"best_dev_score": info.best.dev_score, "best_dev_loss": info.best.dev_loss}
    )
    baselines = {} if info.baselines is None else info.baselines.model_dump()
    return {**found, **baselines, "calls": float(info.calls), "seconds": info.seconds}


class TensorBoard(Callback):
    """Scalars of each generation, over calls, in the run's folder `tensorboard`."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._open = Event, EventFileWriter
        self._writer: Any = None

    def on_start(self, info: RunInfo, folder: Path) -> None:
        for old in (folder / EVENTS).glob(
            "events.out.tfevents.*"
        ):  # a resumed search writes all of its events again
            old.unlink()
        self._writer = self._open(str(folder / EVENTS))

    def on_generation(self, generation: Generation) -> None:
        event = self._event(wall_time=time.time(), step=generation.calls)
        for name, value in scalars(generation).items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow(Callback):
    """A run in MLflow's store (MLFLOW_TRACKING_URI), in the experiment MLFLOW_EXPERIMENT_NAME or of
    the task's name.

    Settings are its parameters, scalars of each generation its metrics, and the run's files its
    artifacts.
    """

    def __init__(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric, self._run = MlflowClient(), Metric, ""
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME")

    def on_start(self, info: RunInfo, folder: Path) -> None:
        name = self._experiment or f"bbt-accel {info.task.name}"
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self._run = self._client.create_run(experiment, run_name=run_name(folder)).info.run_id
        for key, value in parameters(info).items():
            self._client.log_param(self._run, key, value)

    def on_generation(self, generation: Generation) -> None:
        self._log(scalars(generation), generation.calls)

    def on_end(self, run: Run) -> None:
        self._log(results(run), run.info.calls)
        self._client.log_artifacts(self._run, str(run.path))
        self._client.set_terminated(
            self._run, "FINISHED" if run.info.status == "done" else "KILLED"
        )
        self._run = ""

    def close(self) -> None:
        if self._run:
            self._client.set_terminated(self._run, "FAILED")

    def _log(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, [self._metric(key, value, now, step) for key, value in values.items()]
        )


class RunLogger(Callback):
    """Weights & Biases, or a library with its interface: `init`, `log` and `finish`.

    WANDB_MODE=offline keeps Weights & Biases from the network.
    """

    def __init__(self, library: Any) -> None:
        self._library, self._started = library, False

    def on_start(self, info: RunInfo, folder: Path) -> None:
        project = f"bbt-accel-{info.task.name}"
        with redirect_stdout(sys.stderr):  # standard output is for results
            self._library.init(project=project, name=run_name(folder), config=parameters(info))
        self._started = True

    def on_generation(self, generation: Generation) -> None:
        self._library.log(scalars(generation), step=generation.calls)

    def on_end(self, run: Run) -> None:
        with redirect_stdout(sys.stderr):
            self._library.log(results(run), step=run.info.calls)

    def close(self) -> None:
        if self._started:
            with redirect_stdout(sys.stderr):
                self._library.finish()


def _wandb() -> Callback:
    import wandb

    return RunLogger(wandb)


def _trackio() -> Callback:
    import trackio

    return RunLogger(trackio)


TRACKERS: dict[str, Callable[[], Callback]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": _wandb,
    "trackio": _trackio,
}


class Tracker(Callback):
    """A tracker whose errors are one line: its server is first asked when the search starts, and
    may go away.
    """

    def __init__(self, name: str, library: Callback) -> None:
        self._name, self._library = name, library

    @contextmanager
    def _asked(
        self, hint: str = f"{AGAIN} continues the search, without it if need be"
    ) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library has its own
            raise BbtError(
                f"the tracker {self._name} failed ({first_line(error):.200}); {hint}"
            ) from error

    def on_start(self, info: RunInfo, folder: Path) -> None:
        with self._asked():
            self._library.on_start(info, folder)

    def on_generation(self, generation: Generation) -> None:
        with self._asked():
            self._library.on_generation(generation)

    def on_score(self, generation: Generation) -> None:
        with self._asked():
            self._library.on_score(generation)

    def on_end(self, run: Run) -> None:
        with self._asked(f"{run.path} is complete"):
            self._library.on_end(run)

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None
        with suppress(BbtError) if failed else nullcontext(), self._asked("the run is complete"):
            self._library.close()  # after an error that says more


def tracker(name: str) -> Callback:
    """A tracker by name.

    Raises UsageError for an unknown one, MissingDependency where it is not installed, BbtError
    where it does not start, as mlflow-skinny does not with a database.
    """
    check_known("tracker", name, TRACKERS, UsageError)
    try:
        return Tracker(name, TRACKERS[name]())
    except ImportError:
        raise MissingDependency(
            f'{name} is not installed; pip install "bbt-accel[{name}]"'
        ) from None
    except Exception as error:  # each library has its own
        raise BbtError(
            f"tracker {name} does not start ({first_line(error):.200}); see its documentation"
        ) from None
