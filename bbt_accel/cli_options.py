"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bbt_accel.engine_specs import ENGINES, engine_names, engine_spec, targets
from bbt_accel.errors import check_known
from bbt_accel.model_options import Fields
from bbt_accel.optimizations import OPTIMIZATIONS
from bbt_accel.settings import Settings
from bbt_accel.tasks import task_names

EXECUTION, SEARCH = "Execution", "Search settings"
"""Panels of --help."""
TASK_PRESETS = ("budget", "sigma", "alpha", "loss")


def execution(text: str, **more: Any) -> Any:
    """An option that says how and where to run."""
    return typer.Option(help=text, rich_help_panel=EXECUTION, **more)


def _check_engine(context: typer.Context, name: str | None) -> str | None:
    if name is not None and not context.resilient_parsing:
        engine_spec(name)
    return name


def _check_target(context: typer.Context, name: str) -> str:
    if not context.resilient_parsing:
        check_known("target", name, targets())
    return name


def _engine(text: str) -> Any:
    return execution(text, callback=_check_engine, autocompletion=engine_names)


def _without(names: list[str], panel: str | None) -> Any:
    text = f"Optimizations to switch off, comma-separated: {', '.join(names)}."
    return typer.Option(metavar="TEXT,...", help=text, rich_help_panel=panel)


_ENGINES = ", ".join(spec.name for spec in ENGINES if not spec.internal)
_TARGETS = ", ".join(spec.name for spec in ENGINES if spec.optimized)
_DEVICE = Literal["cpu", "cuda"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle written by export.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder written by tune.")]
TaskName = Annotated[
    str,
    typer.Option(help="Built-in task (sst2, yelpp, agnews, ...) or path of a .toml file.", autocompletion=task_names),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder with {train,validation,test}.{jsonl,csv,parquet} (default: the task's dataset)."),
]
Target = Annotated[
    str,
    typer.Option(
        help=f"Engine to optimize for: {_TARGETS}, or a plug-in's.",
        callback=_check_target,
        autocompletion=lambda: list(targets()),
    ),
]
EngineName = Annotated[str, _engine(f"Engine that runs the backbone: {_ENGINES}, or a plug-in's.")]
RunEngine = Annotated[str | None, _engine("Engine that runs the backbone (default: the run's).")]
ServeEngine = Annotated[str | None, _engine("Engine that runs the backbone (default: the run's; ort for a bundle).")]
Device = Annotated[_DEVICE, execution("Device of the engine; trt always uses cuda.")]
RunDevice = Annotated[_DEVICE | None, execution("Device of the engine (default: the run's).")]
Threads = Annotated[int | None, execution("CPU threads (default: all cores).", min=1)]
Url = Annotated[str | None, execution("Server for --engine remote, e.g. http://127.0.0.1:8000.")]
OtherBundle = Annotated[
    Path | None, execution("Another bundle of the same backbone, e.g. in another precision (default: the run's).")
]
Without = Annotated[str, _without(list(OPTIMIZATIONS), EXECUTION)]
WithoutInGraph = Annotated[str, _without([name for name, one in OPTIMIZATIONS.items() if one.in_graph], None)]
Ray = Annotated[
    str | None, execution("Ray cluster (HOST:PORT or auto) to run on; local starts one.", metavar="ADDRESS")
]
SearchSettings = Annotated[dict[str, Any], Fields(Settings, task_presets=TASK_PRESETS, panel=SEARCH)]
SweepSettings = Annotated[dict[str, Any], Fields(Settings, ("seed",), task_presets=TASK_PRESETS, panel=SEARCH)]
