"""One trial of a sweep: tune, score on the test rows, and write the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from bbt_accel.errors import RunError
from bbt_accel.files import write_atomically
from bbt_accel.inference import evaluate
from bbt_accel.reporting import Schema
from bbt_accel.sweeps.grid import Trial
from bbt_accel.tuning import tune

SCORE, RUN = "score.json", "run"


class TrialResult(Schema):
    """score.json in the folder of a trial."""

    trial: Trial
    score: float = Field(description="Test score of the tuned prompt, by the task's metric.")
    without_prompt: float = Field(description="Test score of a zero prompt.")
    dev_score: float = Field(description="Dev score of the tuned prompt, by which it was chosen.")
    test_rows: int = Field(description="Test rows behind score and without_prompt.")
    calls: int = Field(description="Candidates evaluated.")
    seconds: float = Field(description="Duration of the search.")
    versions: dict[str, str] = Field(description="Versions of the libraries that ran the backbone.")


def run_trial(trial: dict[str, Any], folder: str, threads: int | None) -> dict[str, Any]:
    """Run a trial in its folder, or what remains of it; arguments and result are JSON. Raises what `tune` raises."""
    t, place = Trial.model_validate(trial), Path(folder)
    place.mkdir(parents=True, exist_ok=True)
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
        raise RunError(f"interrupted after {run.info.calls} calls; resume with --resume")
    score = evaluate(run.path, data=t.data, threads=threads)
    result = TrialResult(
        trial=t,
        score=score["score"],
        without_prompt=score["without_prompt"],
        dev_score=run.info.best.dev_score,
        test_rows=score["rows"],
        calls=run.info.calls,
        seconds=run.info.seconds,
        versions=run.info.engine.versions,
    )
    write_atomically(place / SCORE, result.model_dump_json(indent=1).encode() + b"\n")
    return result.model_dump(mode="json")


def read_result(trial: Trial, folder: Path) -> TrialResult | None:
    """The result of a trial that was done with the same description; None where there is none."""
    try:
        result = TrialResult.model_validate_json((folder / SCORE).read_bytes())
    except (OSError, ValidationError):
        return None
    return result if result.trial == trial else None
