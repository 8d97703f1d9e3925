"""The rows of a task or a run that a conversion is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import resolve
from bbt_accel.errors import DataError, UsageError
from bbt_accel.search.run import Run, is_run
from bbt_accel.tasks.data import load_rows
from bbt_accel.tasks.encoding import encoder_with_demonstrations
from bbt_accel.tasks.splits import load_few_shot
from bbt_accel.tasks.task import load_task

if TYPE_CHECKING:  # the module needs onnx, which reading a run does not
    from bbt_accel.exporters.convert.calibration import Calibration

TEST_ROWS = 4096
"""Test rows that are encoded for their lengths, at most: those with the longest texts."""


def calibrate_on(task: str | None, data: Path | None = None) -> Callable[[Bundle], Calibration]:
    """What `optimize_bundle` takes as `calibration`: the rows of `task_calibration`, the shipped
    texts for None.
    """
    if task is not None:
        return partial(task_calibration, task=task, data=data)
    if data is not None:
        raise UsageError("--data is the folder of the rows of --calibrate TASK; give both")
    from bbt_accel.exporters.convert.calibration import Calibration

    return Calibration.shipped


def task_calibration(bundle: Bundle, task: str, data: Path | None = None) -> Calibration:
    """The few-shot train rows of a task, or of the folder of a run, with the settings of that
    search.

    data: the folder of the rows, unless they are the task's or the run's own. Raises TaskError,
    DataError, RunError.
    """
    from bbt_accel.exporters.convert.calibration import Calibration, lengths

    if is_run(Path(task)):
        run = Run.read(task)
        declared, settings, data = run.task, run.info.settings, data or run.data_path
        source = "the run's rows"
    else:
        declared = load_task(task)
        # Calibration works with fewer rows of a class, too.
        settings = resolve(declared.preset(bundle.info.method), {"allow_rare_classes": True})
        source = declared.name
    train, dev = load_few_shot(declared, data, settings)
    encoder, train = encoder_with_demonstrations(bundle, declared, train, settings)
    batches = [encoder.encode(train), encoder.encode(dev)]
    with suppress(DataError):  # a task without test rows can be tuned
        rows = load_rows(declared, "test", data)
        rows.sort(key=lambda row: sum(map(len, row.fields.values())), reverse=True)
        batches.append(encoder.encode(rows[:TEST_ROWS]))
    longest = max(int(lengths(batch).max()) for batch in batches)
    return Calibration(batches[0], longest, settings, source)
