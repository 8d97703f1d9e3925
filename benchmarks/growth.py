"""How the cost of a candidate grows with rows, sequence length, population and layers: one plot each.

python -m bbt_accel.benchmarks.growth -o benchmarks/results/growth

Random weights of a published shape, random rows without padding; one factor changes, the others stay as in `BASE`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.progress import track

from bbt_accel.batch import Batch
from bbt_accel.benchmarks import worker
from bbt_accel.benchmarks.timing import percentiles
from bbt_accel.benchmarks.workload import save_batch
from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called, one_line
from bbt_accel.cores import physical_cores
from bbt_accel.display import markdown_table, text
from bbt_accel.doctor import describe_machine, installed_versions

BASE = {"rows": 16, "length": 96, "population": 8, "layers": 4}
STEPS = {
    "rows": (4, 8, 16, 32, 64),
    "length": (64, 96, 128, 192, 256),
    "population": (1, 4, 8, 16, 32),
    "layers": (2, 4, 8, 12),
}
AXES = {
    "rows": "rows of the batch",
    "length": "tokens a row",
    "population": "candidates a generation",
    "layers": "blocks of the backbone",
}
ROWS = {"eager fp32": ("eager", "fp32"), "ort fp32": ("ort", "fp32"), "ort int8": ("ort", "int8")}
COLOURS = {"eager fp32": "#7f7f7f", "ort fp32": "#0072b2", "ort int8": "#d55e00"}


class Point(BaseModel):
    """Milliseconds a candidate (median) of one engine, where `factor` has this value."""

    factor: str
    value: int
    row: str
    ms: float


class Growth(BaseModel):
    """growth.json."""

    command: str
    shape: str
    base: dict[str, int]
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str] = {}
    points: list[Point]


@dataclass
class Measuring:
    """Bundles, made when they are first needed, and the points measured so far."""

    shape: str
    work: Path
    threads: int
    repeats: int

    def bundle(self, layers: int, target: str, precision: str) -> Path:
        path = self.work / f"{layers}-{target}-{precision}"
        if path.exists():
            return path
        if target == "eager":
            from bbt_accel.benchmarks.make_backbone import make_backbone

            checkpoint = self.work / f"{layers}"
            make_backbone(self.shape, checkpoint, layers=layers)
            worker.call("export", backbone=checkpoint, output=path)
        else:
            source = self.bundle(layers, "eager", "fp32")
            # Random weights have no accuracy to keep: every product is quantized.
            worker.call(
                "optimize", source=source, output=path, target=target, precision=precision, max_noise=1e9, data=None
            )
        return path

    def point(self, factor: str, value: int, row: str) -> Point:
        at = BASE | {factor: value}
        engine, precision = ROWS[row]
        bundle = Bundle.read(self.bundle(at["layers"], engine, precision), verify=False)
        save_batch(self.work / "batch.npz", random_batch(bundle, at["rows"], at["length"]))
        measured = worker.call(
            "measure",
            engine={"bundle": bundle.path, "name": engine, "device": "cpu", "threads": self.threads, "without": []},
            batch=self.work / "batch.npz",
            # Eager takes its candidates one after the other: two give the same time each.
            popsize=min(at["population"], 2) if engine == "eager" else at["population"],
            repeats=self.repeats,
            seed=0,
            flops=False,
        )
        return Point(factor=factor, value=value, row=row, ms=percentiles(measured["seconds"])[0])


def random_batch(bundle: Bundle, rows: int, length: int) -> Batch:
    """Rows of random tokens without padding, all read at their last position but one."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, bundle.info.vocab_size, (rows, length))
    mask = np.ones_like(ids)
    return Batch(ids, mask, np.full(rows, length - 2), np.zeros(rows, np.int64), np.array([10, 11]))


def measure(shape: str, threads: int, repeats: int, command: str) -> Growth:
    wanted = [(factor, value, row) for factor, values in STEPS.items() for value in values for row in ROWS]
    console = Console(stderr=True)
    with TemporaryDirectory(prefix="bbt-growth-") as work:
        measuring = Measuring(shape, Path(work), threads, repeats)
        points = [
            measuring.point(*one)
            for one in track(wanted, "measuring", console=console, disable=not console.is_terminal)
        ]
    return Growth(
        command=command, shape=shape, base=BASE, threads=threads, machine=dict(describe_machine()),
        versions=installed_versions(), points=points,
    )  # fmt: skip


def table(growth: Growth) -> str:
    """Milliseconds a candidate, one Markdown table a factor."""
    base = "{rows} rows of {length} tokens, {population} candidates, {layers} blocks".format_map(growth.base)
    lines = [
        f"# How the cost of a candidate grows ({growth.shape})",
        "",
        f"Median milliseconds a candidate; {base} unless the table says otherwise. {growth.machine.get('cpu', '')}, "
        f"{growth.threads} threads. `{growth.command}`",
        *([f"\n{text(growth.versions)}"] if growth.versions else []),
    ]
    for factor in STEPS:
        found = {(p.value, p.row): p.ms for p in growth.points if p.factor == factor}
        cells = [[str(value), *(f"{found[value, row]:.1f}" for row in ROWS)] for value in STEPS[factor]]
        header = [AXES[factor], *ROWS]
        lines += ["", markdown_table(header, cells, text_columns=0), "", f"![{AXES[factor]}]({factor}.png)"]
    return "\n".join(lines) + "\n"


def draw(folder: Path, growth: Growth) -> None:
    """One PNG a factor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for factor in STEPS:
        figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for row in ROWS:
            line = sorted((p.value, p.ms) for p in growth.points if p.factor == factor and p.row == row)
            axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[row])
            axes.annotate(row, line[-1], xytext=(6, 0), textcoords="offset points", va="center", color=COLOURS[row])
        axes.set(xlabel=AXES[factor], ylabel="milliseconds a candidate", ylim=(0, None), xticks=STEPS[factor])
        axes.margins(x=0.18)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{growth.shape}, {growth.threads} threads", loc="left", fontsize=10)
        figure.savefig(folder / f"{factor}.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="growth", description="How the cost of a candidate grows.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--shape", default="bert-small", help="a shape of make_backbone")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    command = called("growth")
    with one_line(), new_folder(given.output) as folder:
        growth = measure(given.shape, given.threads, given.repeats, command)
        (folder / "growth.json").write_text(growth.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "growth.md").write_text(table(growth), encoding="utf-8")
        draw(folder, growth)


if __name__ == "__main__":
    main()
