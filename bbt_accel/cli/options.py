"""The options that several commands share, each declared once; `commands` has those of one command.

An option for a field of a settings model is `option_of(MODEL, "--spelling")`: the field has its
limits, description and default. Fields without an option are for `--set`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from rich.markup import escape

from bbt_accel.core import option_types as types
from bbt_accel.core.engine_specs import ENGINES, engine_names, engine_spec, targets
from bbt_accel.core.settings import Settings
from bbt_accel.errors import UsageError, check_known, first_problem
from bbt_accel.io.command import comma_separated
from bbt_accel.io.reporting import plain
from bbt_accel.tasks.task import task_names

LIST: dict[str, Any] = {"parser": comma_separated, "metavar": "A,B,..."}
PRESET_BY_TASK = ("budget", "sigma", "alpha", "loss", "demonstrations")


def fields_of(model: Any) -> dict[str, Any]:
    """What a model, or a dataclass of pydantic, says of its fields, in JSON Schema."""
    fields: dict[str, Any] = TypeAdapter(model).json_schema()["properties"]
    for field in fields.values():  # of an optional one the type that is not null
        kinds = (kind for kind in field.get("anyOf", []) if kind["type"] != "null")
        field.update(next(kinds, {}) | field)
    return fields


def option_of(model: Any, spelling: str, **more: Any) -> Any:
    """The option for the field of its name; a list is given as a comma-separated text."""
    name = spelling.removeprefix("--").replace("-", "_")
    field = fields_of(model)[name]
    if field["type"] == "array":
        more |= LIST
    default = default_of(name, field)
    shown = f" (default: {default})" if default not in ("", "False") else ""
    about = escape(f"{meaning_of(field)}{shown}.")
    limits = {"min": field.get("minimum"), "max": field.get("maximum")}
    return typer.Option(None, spelling, help=about, **limits, **more)


def default_of(name: str, field: Mapping[str, Any]) -> str:
    text = "" if field.get("default") in (None, []) else plain(field["default"])
    return f"the task's, or {text}" if name in PRESET_BY_TASK else text


def meaning_of(field: Mapping[str, Any]) -> str:
    return " ".join(field["description"].split()).removesuffix(".")


def parse_settings(model: Any, keys: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """The values of KEY=VALUE texts. Raises UsageError for another key, and for one whose value is
    missing or refused by the model.
    """
    found, fields = {}, fields_of(model)
    declared = getattr(model, "__pydantic_fields__", None) or model.model_fields
    for assignment in given:
        key, equals, text = assignment.partition("=")
        if key in fields and key not in keys:
            raise UsageError(f"--set {key}: it has an option of its own; see --help")
        check_known("setting", key, keys)
        if not equals:
            raise UsageError(f"--set {key}: give a value, as in --set {key}=VALUE")
        value = comma_separated(text) if fields[key]["type"] == "array" else text
        try:
            kind: Any = Annotated[declared[key].annotation, declared[key]]
            found[key] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"--set {key}: {first_problem(error)}; got {text!r}") from None
    return found


def apart(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the search, and the others."""
    settings = {name: value for name, value in found.items() if name in Settings.model_fields}
    return settings, {name: value for name, value in found.items() if name not in settings}


_ENGINES = ", ".join(spec.name for spec in ENGINES if not spec.internal)
_TARGETS = ", ".join(spec.name for spec in ENGINES if spec.optimized)

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle written by export.")]
RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Run folder of fit or tune, saved classifier, or hf://OWNER/NAME."
    ),
]
Backbone = Annotated[str, typer.Option("--backbone", help=types.BACKBONE)]
Task = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        autocompletion=task_names,
        help="Built-in task (sst2, yelpp, agnews, ...) or path of a .toml file.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="File of rows, or folder with train.* and test.* (or validation.*) in jsonl, csv, "
        "parquet, ... (default: the task's dataset).",
    ),
]
DataFolders = Annotated[Path | None, typer.Option("--data", help=types.TASK_FOLDERS)]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        autocompletion=lambda: list(targets()),
        help=f"Engine to optimize for: {_TARGETS}, or a plug-in's (default: ort).",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what was interrupted.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]


def _known(context: typer.Context, engine: str | None) -> str | None:
    if engine not in (None, "auto") and not context.resilient_parsing:
        engine_spec(engine)
    return engine


_execution = partial(typer.Option, rich_help_panel="Execution")
Engine = Annotated[
    str | None,
    _execution(
        "--engine",
        callback=_known,
        autocompletion=engine_names,
        help=f"Engine that runs the backbone: {_ENGINES}, or a plug-in's (default: the run's, or "
        "ort; of fit: auto, what doctor recommends).",
    ),
]
Engines = Annotated[
    Sequence[str] | None,
    _execution("--engines", **LIST, help="Engines (default: ort; of bench: all but remote)."),
]
Device = Annotated[
    str | None,
    _execution(
        "--device",
        metavar="cpu|cuda|cuda:N",
        help="Device of the engine; trt always uses a GPU (default: the run's, or cpu).",
    ),
]
Threads = Annotated[
    int | None,
    _execution("--threads", min=1, max=types.MAX_THREADS, help="CPU threads (default: all cores)."),
]
Url = Annotated[
    str | None,
    _execution("--url", help="Server for --engine remote, e.g. http://127.0.0.1:8000."),
]
OtherBundle = Annotated[
    Path | None,
    _execution("--bundle", help="Another bundle of the same backbone (default: the run's)."),
]
Jobs = Annotated[int | None, _execution("--jobs", min=1, help=types.JOBS)]
Ray = Annotated[
    str | None,
    _execution(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster (HOST:PORT or auto) to run on; local starts one.",
    ),
]
