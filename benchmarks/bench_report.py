"""The report of a benchmark: the schema of report.json, when a row passes, report.md and
report.png.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.benchmarks.script import (
    Columns,
    Outcome,
    Report,
    Timed,
    columns_legend,
    page,
    rows_table,
)
from bbt_accel.core.batch import Float32, Int64
from bbt_accel.core.comparison import AGREEMENT, EXPORT, scaled_error
from bbt_accel.core.engine_specs import index_of, kind_of
from bbt_accel.core.objective import Objective
from bbt_accel.core.optimizations import OPTIMIZATIONS
from bbt_accel.core.settings import Metric
from bbt_accel.io.report_page import hover
from bbt_accel.io.reporting import (
    BLUE,
    GREY,
    METRICS,
    ORANGE,
    Schema,
    digits,
    figure,
    markdown_list,
    markdown_table,
    tidy,
)

STEADY = 0.1  # drift of the machine beyond which the report warns


class TuningScores(Schema):
    """Whole searches, one per seed."""

    seeds: list[int] = Field(
        description="Seeds of the few-shot rows, the projection and the search."
    )
    budget: int = Field(description="Calls of each search.")
    scores: list[float] = Field(
        description="Test score of each search's prompt on the engine that searched for it."
    )
    mean: float = Field(description="Mean of the scores.")
    std: float | None = Field(
        description="Standard deviation of the scores (n − 1); None for one seed."
    )
    seconds: float = Field(description="Mean duration of a search.")

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.std:.3f}" if self.std is not None else "")


class Measurement(Outcome, Timed):
    """An engine at a precision. None means not measured; `reason` says why."""

    engine: str = Field(description="Name of the engine.")
    precision: str = Field(description="fp32, fp16, bf16, int8 or int4.")
    baseline: bool = Field(
        default=False, description="PyTorch without bbt-accel (`EngineSpec.baseline`)."
    )
    without: list[str] = Field(default=[], description="Optimizations that were switched off.")
    ablation: bool = Field(
        default=False, description="Measured to find what an optimization contributes; not tuned."
    )
    bundle_mib: float | None = Field(
        default=None, description="Size of the bundle that was read, tokenizer included."
    )
    flops: int | None = Field(
        default=None, description="FLOP per candidate, padding included; PyTorch engines only."
    )
    calls_ms: list[float] = Field(
        default=[], description="ms per candidate of each timed call, z to batch statistics."
    )
    calls_per_second: float | None = Field(
        default=None, description="Candidates/s, from the median."
    )
    speedup: float | None = Field(
        default=None, description="Time of the original's forward over this row's, medians."
    )
    speedup_over_fastest: float | None = None
    """Time of the fastest baseline that passed over this row's, medians."""
    fp32_share: float | None = None
    """Operations of the original's forward × calls/s over the fp32 rate; beyond 100 % where
    redundant computation is avoided or the precision is lower."""
    graph_share: float | None = None
    """Of the timed calls of the device, the share that were launched as CUDA graphs."""
    call_overhead: float | None = None
    """On a GPU, what a call costs beyond its tokens, as a number of tokens; from a population of
    half the size.
    """
    peak_mib: float | None = Field(
        default=None, description="Largest resident memory of the row's process, MiB."
    )
    max_error: float | None = None
    """Largest difference of a test row's label logits from eager fp32, relative to the largest
    logit where that is beyond 1; None if a logit is not finite."""
    agreement: float | None = Field(
        default=None, description="Share of test rows with eager fp32's predicted class."
    )
    score: float | None = Field(
        default=None, description="Metric of the test rows, with the same prompt in all rows."
    )
    tuned: TuningScores | None = Field(
        default=None, description="Scores of whole searches on this engine."
    )
    versions: dict[str, str] = Field(
        default={}, description="Of the libraries that compute; the device or provider."
    )

    @property
    def label(self) -> str:
        """How tables and plots name the row."""
        names = (
            ", ".join(self.without)
            if len(self.without) < 3
            else f"{len(self.without)} optimizations"
        )
        return f"{self.engine} {self.precision}" + (f" without {names}" if names else "")

    @property
    def search_seconds(self) -> float | None:
        return self.tuned.seconds if self.tuned else None

    def compare(self, logits: Float32, eager: Float32, targets: Int64, metric: Metric) -> None:
        """Set error, agreement, score and status from the row's test logits (N, C) and eager's."""
        finite = np.asarray(np.isfinite(logits).all(axis=1))
        self.agreement = float((finite & (logits.argmax(1) == eager.argmax(1))).mean())
        if not finite.all():
            self.reason = (
                f"{(~finite).sum()} of {len(finite)} test rows have NaN or infinite logits"
            )
        else:
            self.max_error, self.score = scaled_error(logits, eager), score(logits, targets, metric)
            if self.precision == "fp32" and not self.max_error <= EXPORT:
                self.reason = f"logit error {self.max_error:.1e} is more than {EXPORT:.0e}"
            if self.precision != "fp32" and self.agreement < AGREEMENT:
                self.reason = f"agreement {self.agreement:.3f} is less than {AGREEMENT}"
        self.status = "differs" if self.reason else "passed"


def score(logits: Float32, targets: Int64, metric: Metric) -> float:
    """The task's metric of one prompt's logits (N, C). Raises NonFiniteLoss."""
    return float(Objective("ce", metric).score(logits[None], targets)[1][0])


ratio: Callable[[Any], str] = "{:.2f}".format
NAMES: Columns = {"row": ("label", str), "status": ("status", str)}
SPEED: Columns = NAMES | {
    "ms": ("ms_median", digits),
    "p90": ("ms_p90", digits),
    "p99": ("ms_p99", digits),
    "calls/s": ("calls_per_second", digits),
    "× fastest baseline": ("speedup_over_fastest", ratio),
    "× original": ("speedup", ratio),
    "share of fp32 rate": ("fp32_share", "{:.0%}".format),
    "MiB": ("peak_mib", "{:,.0f}".format),
}
FIDELITY: Columns = NAMES | {
    "bundle MiB": ("bundle_mib", "{:,.1f}".format),
    "logit error": ("max_error", "{:.1e}".format),
    "agreement": ("agreement", "{:.3f}".format),
    "score": ("score", "{:.3f}".format),
}
TUNED: Columns = {"tuned score": ("tuned", str), "search s": ("search_seconds", "{:.0f}".format)}


class BenchReport(Report):
    """report.json."""

    caption = "Speed and score of each row"
    version: int = Field(default=2, description="Version of this schema.")
    options: BenchOptions = Field(
        description="What was asked for; the number of threads is that which was used."
    )
    task: str = Field(description="Name of the task.")
    metric: Metric = Field(description="The metric of all scores.")
    machine: dict[str, Any]
    """Where it ran, and its ceilings: the names of `machine.describe_machine` and
    `ceilings.matrix_rates`.
    """
    n_rows: int = Field(description="N, rows of the timed batch, from the task's train split.")
    length: int = Field(description="S, tokens per row after padding.")
    padding: float = Field(description="Share of the N × S tokens that is padding.")
    n_test_rows: int = Field(
        description="Rows on which logits, predictions and scores are compared."
    )
    drift: float | None
    """How much longer the original's forward took when it was timed again after the other rows, as
    a share of the first time; ratios are not more precise than that. None if that failed."""
    fastest_baseline: str = Field(description="Label of the fastest baseline that passed.")
    rows: list[Measurement]
    """The baselines first, then a row per engine, precision and set of optimizations."""
    notes: list[str] = Field(description="What was left out by default on this machine, and why.")

    @property
    def original(self) -> Measurement:
        """The original's forward: eager fp32."""
        return self.rows[0]

    @property
    def fastest(self) -> Measurement | None:
        """The fastest row that passed, baselines and ablations excepted."""
        found = [
            m
            for m in self.rows
            if m.status == "passed" and m.ms_median and not (m.baseline or m.ablation)
        ]
        return min(found, key=lambda m: m.ms_median or 0.0, default=None)

    @property
    def processor(self) -> str:
        """What computed, by its name."""
        if kind_of(self.options.device) == "cpu":
            return f"{self.machine['cpu']} ({self.options.threads} threads)"
        return "; ".join(self.machine["gpus"][index_of(self.options.device) :][:1])

    @property
    def setting(self) -> str:
        asked = self.options
        where = f"{Path(asked.backbone).name} on {self.task}"
        return (
            f"{where}: {asked.method}, {asked.prompt_mode} mode, {asked.n_prompt_tokens} "
            "prompt tokens"
        )

    @property
    def batch(self) -> str:
        return (
            f"{self.n_rows} rows × {self.length} tokens, {self.options.popsize} candidates per call"
        )

    @property
    def prompt(self) -> str:
        return f"one {'tuned' if self.original.tuned else 'random'} prompt"

    def markdown(self) -> str:
        fidelity = FIDELITY | (TUNED if any(row.tuned for row in self.rows) else {})
        reasons = [
            f"- **{row.label}**: {row.status}: {row.reason}" for row in self.rows if row.reason
        ]
        passing = (
            f"- An fp32 row passes with a logit error of at most {EXPORT:.0e}, a row of "
            "lower precision "
        )
        passing += f"with an agreement of at least {AGREEMENT}. Scores are {METRICS[self.metric]}."
        return page(
            f"# {self.options.backbone} on {self.task}",
            self.summary(),
            "## Speed",
            rows_table(self.rows, SPEED, text_columns=2),
            self.image(),
            "## Fidelity",
            rows_table(self.rows, fidelity, text_columns=2),
            self.ablation(),
            "\n".join(["## Not passed\n", *reasons] if reasons else []),
            f"## What was measured\n\n{self.facts()}",
            f"## Columns\n\n{columns_legend(Measurement, SPEED | fidelity)}\n{passing}",
        )

    def summary(self) -> str:
        """The result in a sentence, and a warning if the machine was not steady."""
        states = [row.status for row in self.rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        text = f"{len(states)} rows: {counts}. The fastest baseline is {self.fastest_baseline}."
        if (best := self.fastest) is not None:
            text += (
                f" The fastest engine that passed is **{best.label}**: "
                f"{best.speedup_over_fastest:.2f} times the "
            )
            text += (
                f"fastest baseline and {best.speedup:.2f} times the original's forward, on "
                f"{self.processor}."
            )
        if abs(self.drift or 0.0) > STEADY:
            text += (
                "\n\n**The machine was not steady:** the time of the original's forward changed by "
            )
            text += (
                f"{self.drift:+.0%}, and no ratio here is more precise than that. Measure "
                "again on an idle machine."
            )
        return text

    def ablation(self) -> str:
        """What each optimization contributes: the time without it over the time of the same row
        with it.
        """
        lines, whole = (
            [],
            {
                (row.engine, row.precision): row
                for row in self.rows
                if not (row.ablation or row.baseline)
            },
        )
        for row in self.rows:
            base = whole.get((row.engine, row.precision))
            if (
                row.ablation
                and base is not None
                and row.ms_median is not None
                and base.ms_median is not None
            ):
                off = ", ".join(name for name in row.without if name not in base.without)
                times = [
                    digits(base.ms_median),
                    digits(row.ms_median),
                    ratio(row.ms_median / base.ms_median),
                ]
                lines.append([base.label, off, *times])
        header = ["row", "optimization", "ms with it", "ms without it", "factor"]
        used = {name for row in self.rows if row.ablation for name in row.without}
        legend = markdown_list(
            {f"`{name}`": each.what for name, each in OPTIMIZATIONS.items() if name in used}
        )
        return (
            f"## Ablation\n\n{markdown_table(header, lines, text_columns=2)}\n\n{legend}"
            if lines
            else ""
        )

    def facts(self) -> str:
        machine, flops = self.machine, (self.original.flops or 0) / 1e9
        lines = {
            "Setting": f"{self.setting}; {self.options.threads} threads, {self.options.device}",
            "Timed": (
                f"{self.batch} ({self.padding:.0%} padding), {self.options.repeats} calls "
                "after warm-up"
            ),
            "Compared": f"{self.n_test_rows} test rows, {self.prompt} for all rows of the report",
            "Arithmetic": f"{flops:,.1f} GFLOP per candidate in the original's forward",
            "Ceiling": f"fp32 {digits(machine['fp32_rate'])} GFLOP/s by {machine['fp32_rate_by']}",
            "Rates, 10⁹/s": machine["rates"],
            "Rates not measured": machine["unavailable"],
            "Drift of the original's forward": "–" if self.drift is None else f"{self.drift:+.1%}",
            "Left out": "; ".join(self.notes),
        }
        return markdown_list(lines | self.provenance())

    def draw(self, file: Path) -> None:
        """Speed over the fastest baseline on the left, the score on the right, one line per row."""
        layout: dict[str, Any] = {"nrows": 1, "ncols": 2, "sharey": True, "width_ratios": (3, 2)}
        with figure(file, 10.5, 2.4 + 0.42 * len(self.rows), **layout) as (drawn, (left, right)):
            drawn.suptitle(f"{self.setting}\n{self.batch}; {self.processor}", fontsize=11)
            self._draw_speed(left)
            self._draw_scores(right)
            labels = [row.label.replace(" without", "\nwithout") for row in self.rows]
            left.set_yticks(range(len(labels)), labels)
            left.set_ylim(len(labels) - 0.4, -0.6)  # the baselines on top
            for axes in (left, right):
                tidy(axes, "x")

    def _draw_speed(self, axes: Any) -> None:
        most = max([1.0, *(row.speedup_over_fastest or 0.0 for row in self.rows)])
        for place, row in enumerate(self.rows):
            found, passed = row.speedup_over_fastest or 0.0, row.status == "passed"
            colour = GREY if row.baseline else BLUE if passed else ORANGE
            (bar,) = axes.barh(
                place,
                found,
                color=colour,
                height=0.66,
                hatch=None if passed else "///",
                edgecolor="white",
            )
            hover(
                bar,
                [
                    f"{row.label}: {digits(row.ms_median)} ms per candidate, {ratio(found)} × "
                    "fastest baseline"
                ],
            )
            note = f"{found:.2f}×  ({digits(row.ms_median)} ms)  " * bool(found) + row.status * (
                not passed
            )
            box = {
                "facecolor": "white",
                "edgecolor": "none",
                "pad": 1.0,
            }  # keeps lines from running through the text
            axes.text(found + 0.015 * most, place, note, va="center", fontsize=9, bbox=box)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1.42 * most)
        axes.set_xlabel(
            f"times as fast as the fastest baseline, {self.fastest_baseline} (ms per candidate)"
        )
        axes.set_title(f"Speed on {self.processor}", fontsize=11, loc="left")

    def _draw_scores(self, axes: Any) -> None:
        name, tuned = (
            METRICS[self.metric],
            {"color": "black", "markerfacecolor": "none", "markersize": 8, "capsize": 3},
        )
        for place, row in enumerate(self.rows):
            if row.score is not None:
                (point,) = axes.plot(
                    row.score, place, "o", color=BLUE, markersize=8, label=self.prompt
                )
                hover(point, [f"{row.label}, {self.prompt}: {name} {row.score:.3f}"])
            if row.tuned is not None:
                label = f"tuned on the row's engine, {len(row.tuned.seeds)} seeds (mean ± std)"
                drawn = axes.errorbar(
                    row.tuned.mean, place, xerr=row.tuned.std or 0.0, fmt="D", label=label, **tuned
                )
                hover(drawn[0], [f"{row.label}, {label}: {name} {row.tuned}"])
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        axes.figure.legend(
            shown.values(),
            shown.keys(),
            fontsize=9,
            loc="outside lower right",
            ncols=2,
            frameon=False,
        )
        axes.set(xlim=(-0.03, 1.03), xlabel=f"test {name}, {self.n_test_rows} rows")
        axes.set_title(name[0].upper() + name[1:], fontsize=11, loc="left")
