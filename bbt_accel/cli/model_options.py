"""Options of a command from the fields of a pydantic model: name, type, limits, help and default
are written once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass
from itertools import chain
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape
from typer.models import OptionInfo

from bbt_accel.io.command import comma_separated

KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Fields:
    """In a parameter's annotation: options for the fields of `model`; the command gets the given
    ones as a dict.

    A `typer.Option` in a field's annotation adds what a field cannot say: other names, a callback,
    completion.

    exclude: fields without an option. task_presets: fields whose default a task may set. required:
    whether fields without a default are required options.
    """

    model: type[BaseModel]
    panel: str | None = None
    exclude: Collection[str] = ()
    task_presets: Collection[str] = ()
    required: bool = True

    def parameters(self) -> list[inspect.Parameter]:
        fields = self.model.model_fields.items()
        return [self._parameter(name, field) for name, field in fields if name not in self.exclude]

    def _parameter(self, name: str, field: FieldInfo) -> inspect.Parameter:
        """The option of a field: a comma-separated text for a list; None where it is not given."""
        kind, notes = plain_type(field.annotation)
        notes = [*field.metadata, *notes]
        option = copy(
            next((entry for entry in notes if isinstance(entry, OptionInfo)), typer.Option())
        )
        option.param_decls = option.param_decls or (f"--{name.replace('_', '-')}",)
        option.rich_help_panel = self.panel
        about = f"{' '.join((field.description or '').split()).removesuffix('.')}{self._default(name, field)}."
        option.help = escape(about)  # typer reads it as Rich's markup, which has brackets
        option.min = next((entry.ge for entry in notes if hasattr(entry, "ge")), None)
        option.max = next((entry.le for entry in notes if hasattr(entry, "le")), None)
        if get_origin(kind) is list:
            kind, option.parser, option.metavar = str, comma_separated, "A,B,..."
        unset = inspect.Parameter.empty if field.is_required() and self.required else None
        return inspect.Parameter(
            name, KEYWORD, default=unset, annotation=Annotated[kind | None, option]
        )

    def _default(self, name: str, field: FieldInfo) -> str:
        value = field.default
        if field.is_required() or value in (None, []) or value is False:
            return ""
        value = ", ".join(map(str, value)) if isinstance(value, list) else value
        preset = "the task's, or " if name in self.task_presets else ""
        return f" (default: {preset}{f'{value:g}' if isinstance(value, float) else value})"


def plain_type(kind: Any) -> tuple[Any, list[Any]]:
    """A type without None and annotations, and what the annotations say: of `Annotated[int, Ge(1)]
    | None` int.
    """
    if get_origin(kind) is Annotated:
        found, notes = plain_type(get_args(kind)[0])
        fields = [
            note.metadata if isinstance(note, FieldInfo) else [note] for note in get_args(kind)[1:]
        ]
        return found, [*chain(*fields), *notes]
    others = [entry for entry in get_args(kind) if entry is not type(None)]
    if get_origin(kind) in (Union, UnionType) and len(others) == 1:
        return plain_type(others[0])
    return kind, []


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: parameters annotated with `Fields` become options."""
    groups: dict[str, list[inspect.Parameter]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        fields = get_args(parameter.annotation)[1]
        if isinstance(fields, Fields):
            groups[parameter.name] = fields.parameters()
        parameters += groups.get(parameter.name, [parameter.replace(kind=KEYWORD)])

    def command(**values: Any) -> None:
        for name, options in groups.items():
            values[name] = {
                o.name: value for o in options if (value := values.pop(o.name)) is not None
            }
        function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
