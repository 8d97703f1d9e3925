"""One trial of a sweep: tune, score on the test rows, and a file that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bbt_accel.errors import RunError
from bbt_accel.inference import evaluate
from bbt_accel.run import write_whole
from bbt_accel.sweeps.plan import Trial
from bbt_accel.tuning import tune

SCORE, RUN = "score.json", "run"


class Result(BaseModel):
    """score.json in the folder of a trial."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    trial: Trial
    score: float
    """Of the tuned prompt on the test rows, by the task's metric."""
    without_prompt: float
    """The same of a zero prompt."""
    dev_score: float
    rows: int
    """Test rows."""
    calls: int
    seconds: float
    """Of the search."""
    versions: dict[str, str]
    """Of what computed."""


def run_trial(trial: dict[str, Any], folder: str, threads: int | None) -> dict[str, Any]:
    """Do a trial, or what is left of it, in its folder; arguments and result are JSON. Raises what tune raises."""
    t, place = Trial.model_validate(trial), Path(folder)
    run = tune(
        t.bundle,
        t.task,
        data=t.data,
        engine=t.engine,
        device=t.device,
        threads=threads,
        output=place / RUN,
        resume=True,
        settings={**t.settings, "seed": t.seed},
        progress=False,
    )
    if run.info.status != "done" or run.info.best is None:
        raise RunError(f"interrupted after {run.info.calls} calls; --resume goes on from there")
    score = evaluate(run.path, data=t.data, threads=threads)
    result = Result(
        trial=t,
        score=score["score"],
        without_prompt=score["without_prompt"],
        dev_score=run.info.best.dev_score,
        rows=score["rows"],
        calls=run.info.calls,
        seconds=run.info.seconds,
        versions=run.info.engine.versions,
    )
    write_whole(place / SCORE, result.model_dump_json(indent=1).encode() + b"\n")
    return result.model_dump(mode="json")


def read_result(trial: Trial, folder: Path) -> Result | None:
    """The result of a trial that was done as it is described now."""
    try:
        result = Result.model_validate_json((folder / SCORE).read_bytes())
    except (OSError, ValidationError):
        return None
    return result if result.trial == trial else None
