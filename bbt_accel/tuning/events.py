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
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise MissingDependency(
                'tensorboard is not installed; pip install "bbt-accel[tensorboard]", or omit --tensorboard'
            ) from None
        for old in folder.glob("events.out.tfevents.*"):  # a resumed search writes all of its events again
            old.unlink()
        self._event, self._writer = Event, EventFileWriter(str(folder))

    def __call__(self, generation: Generation) -> None:
        event = self._event(wall_time=time.time(), step=generation.calls)
        for name in FIELDS:
            if (value := getattr(generation, name)) is not None:
                event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
