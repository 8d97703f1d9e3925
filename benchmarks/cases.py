"""Which rows a benchmark has: the baselines, then what the declarations of the engines say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import get_args

from bbt_accel.benchmarks.bench_report import Measurement
from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.bundle import BundleInfo
from bbt_accel.engine_specs import EngineSpec, Precision, engine_spec, engine_specs
from bbt_accel.errors import check_known
from bbt_accel.machine import describe_machine
from bbt_accel.optimizations import OPTIMIZATIONS, check_optimizations

BASELINES = ("eager", "eager-readout", "compiled")
"""PyTorch as one would use it without bbt-accel, the plainest first."""
COMPILERS = ("c++", "g++", "clang++")
"""One of these must be there for torch.compile."""


def check_names(options: BenchOptions) -> None:
    """Raises UsageError for an unknown engine, precision or optimization."""
    for name in options.engines:
        engine_spec(name)
    for name in options.precisions:
        check_known("precision", name, get_args(Precision))
    check_optimizations(options.without)


def plan_measurements(options: BenchOptions, info: BundleInfo) -> tuple[list[Measurement], list[str]]:
    """The rows of a benchmark in their order, and notes on what this machine leaves out by default."""
    bf16 = options.device == "cuda" or "bf16" in describe_machine()["features"]
    compiles = any(map(shutil.which, COMPILERS))
    notes = []
    if not bf16:
        wish = "" if "bf16" in options.precisions else "; --precisions bf16 measures the engines anyway"
        notes.append(f"no bf16 baselines: this processor has neither AVX512_BF16 nor AMX{wish}")
    if not compiles:
        notes.append(f"no torch.compile: there is no C++ compiler ({', '.join(COMPILERS)})")
    baselines = [
        Measurement(engine=name, precision=precision, baseline=True)
        for name in BASELINES
        for precision in ("fp32", *(["bf16"] if bf16 else []))
        if compiles or name != "compiled"
    ]
    return [*baselines, *_engine_rows(options, info, bf16)], notes


def _engine_rows(options: BenchOptions, info: BundleInfo, bf16: bool) -> Iterator[Measurement]:
    """The rows after the baselines. A pair that does not exist is a row if engine and precision were both asked for."""
    asked = [name for name in dict.fromkeys(options.engines) if name not in BASELINES]
    specs = [engine_spec(name) for name in asked] if options.engines else engine_specs().values()
    off = sorted(options.without)
    for spec in specs:
        if not (spec.benched or options.engines):
            continue
        default = [name for name in spec.benched or spec.precisions if bf16 or name != "bf16"]
        wanted = dict.fromkeys(options.precisions or default)
        rows = [_row(spec, name, off, options) for name in wanted if options.engines or name in spec.precisions]
        yield from rows
        if options.ablate and rows and rows[0].status == "passed":
            for names in ablations(info, off):
                yield rows[0].model_copy(update={"without": names, "ablation": True})


def _row(spec: EngineSpec, precision: str, off: list[str], options: BenchOptions) -> Measurement:
    row = Measurement(engine=spec.name, precision=precision, without=off)
    if precision not in spec.precisions:
        row.status, row.reason = "failed", f"{spec.name} runs in {', '.join(spec.precisions)}"
    elif options.device not in spec.backends:
        other = " or ".join(f"--device {name}" for name in spec.backends)
        row.status, row.reason = "failed", f"{spec.name} needs {other}, for the baselines too"
    return row


def ablations(info: BundleInfo, off: list[str]) -> list[list[str]]:
    """Each optimization that applies to the backbone, then all of them, on top of those that are off anyway."""
    names = [name for name, optimization in OPTIMIZATIONS.items() if name not in off and optimization.applies(info)]
    each = [[*off, name] for name in names]
    return [*each, [*off, *names]] if len(names) > 1 else each
