"""How the cost of a candidate grows with rows, row length, population and layers.

python -m bbt_accel.benchmarks.growth -o growth

Random weights of a published shape, random rows without padding; one factor changes, the others
stay as in `BASE`. Lengths beyond the backbone's are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pydantic import Field

from bbt_accel.benchmarks.make_backbone import make_backbone
from bbt_accel.benchmarks.script import Report, Timed, count, run_script
from bbt_accel.benchmarks.steps import Bundles, measure, save_batch
from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import engine_spec
from bbt_accel.io import processes
from bbt_accel.io.machine import physical_cores
from bbt_accel.io.progress import StepProgress
from bbt_accel.io.reporting import BLUE, GREY, RED, figure, tidy

BASE = {"rows": 16, "length": 96, "population": 8, "layers": 4}
FACTORS = {  # what changes: its description and its values
    "rows": ("rows of the batch", (4, 8, 16, 32, 64)),
    "length": ("tokens per row", (64, 96, 128, 192, 256)),
    "population": ("candidates per generation", (1, 4, 8, 16, 32)),
    "layers": ("blocks of the backbone", (2, 4, 8, 12)),
}
ENGINES = {"eager fp32": GREY, "ort fp32": BLUE, "ort int8": RED}  # engine and precision → colour


class GrowthPoint(Timed):
    """An engine where `factor` has this value."""

    factor: str = Field(description="rows, length, population or layers.")
    value: int = Field(description="The factor's value; the others have those of `BASE`.")
    engine: str = Field(description="Engine and precision.")


class GrowthReport(Report):
    """How the cost of a candidate grows."""

    caption = "Milliseconds per candidate by each factor"
    rows: list[GrowthPoint] = Field(description="Every engine at every value of every factor.")

    def draw(self, file: Path) -> None:
        """A plot per factor."""
        with figure(file, 11, 8, nrows=2, ncols=2) as (_, grid):
            for axes, (factor, (description, values)) in zip(
                grid.flat, FACTORS.items(), strict=True
            ):
                for name, colour in ENGINES.items():
                    line = [
                        (p.value, p.ms_median)
                        for p in self.rows
                        if (p.factor, p.engine) == (factor, name)
                    ]
                    axes.plot(*zip(*line, strict=True), "o-", color=colour)
                    axes.annotate(
                        name,
                        line[-1],
                        xytext=(6, 0),
                        textcoords="offset points",
                        va="center",
                        color=colour,
                    )
                axes.set(
                    xlabel=description, ylabel="ms per candidate", ylim=(0, None), xticks=values
                )
                axes.margins(x=0.18)
                tidy(axes, "y")


def measure_growth(given: argparse.Namespace, work: Path, tell: StepProgress) -> GrowthReport:
    backbones: dict[int, Bundles] = {}
    wanted = [
        (factor, value, name)
        for factor, (_, values) in FACTORS.items()
        for value in values
        for name in ENGINES
    ]
    tell.expect(len(wanted))
    points = []
    for factor, value, name in wanted:
        tell(f"{name}, {factor} {value}")
        at = BASE | {factor: value}
        engine, precision = name.split()
        if (layers := at["layers"]) not in backbones:
            make_backbone(given.shape, work / f"{layers}" / "checkpoint", layers=layers)
            # Random weights have no accuracy to preserve: every matmul is quantized.
            backbones[layers] = Bundles(
                work / f"{layers}", work / f"{layers}" / "checkpoint", {}, max_rmse=1e9
            )
        bundle = Bundle.read(backbones[layers].bundle(engine_spec(engine), precision), verify=False)
        if at["length"] > bundle.info.max_length:
            continue
        save_batch(work / "batch.npz", random_batch(bundle, at["rows"], at["length"]))
        # Eager takes its candidates one by one: two give the same time each.
        popsize = min(at["population"], 2) if engine == "eager" else at["population"]
        load = {"bundle": bundle.path, "name": engine, "device": "cpu", "threads": given.threads}
        asked = {
            "engine": load,
            "batch": work / "batch.npz",
            "popsize": popsize,
            "repeats": given.repeats,
        }
        points.append(GrowthPoint(factor=factor, value=value, engine=name))
        points[-1].set_times(processes.call(measure, **asked)["ms"])
    return GrowthReport(rows=points, **given.report)


def random_batch(bundle: Bundle, rows: int, length: int) -> Batch:
    """Rows of random tokens without padding, all read at their last position but one."""
    ids = np.random.default_rng(0).integers(5, bundle.info.vocab_size, (rows, length))
    return Batch(
        ids,
        np.ones_like(ids),
        np.full(rows, length - 2),
        np.zeros(rows, np.int64),
        np.array([10, 11]),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="bert-small", help="a shape of make_backbone")
    parser.add_argument("--threads", type=count, default=physical_cores())
    parser.add_argument("--repeats", type=count, default=3, help="timed calls per point")


if __name__ == "__main__":
    run_script("growth", __doc__, add_options, measure_growth)
