"""TensorBoard events of a search."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

from bbt_accel.errors import MissingDependency
from bbt_accel.history import Generation

FIELDS = ("best_loss", "mean_loss", "metric", "step_size", "dev_score", "dev_loss", "evaluations_per_second")


class Events:
    """Writes scalars of each generation, over API calls. Raises MissingDependency without tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise MissingDependency(
                'tensorboard is not installed; pip install "bbt-accel[tensorboard]", or omit --tensorboard'
            ) from None
        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):  # a resumed search writes all of its events again
            old.unlink()
        self._writer = RecordWriter((folder / f"events.out.tfevents.{int(time.time())}.bbt-accel").open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __call__(self, generation: Generation) -> None:
        event = self._event(wall_time=time.time(), step=generation.calls)
        for name in FIELDS:
            if (value := getattr(generation, name)) is not None:
                event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def _write(self, event: object) -> None:
        self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
        self._writer.flush()
