"""Options of a command made from the fields of a pydantic model: name, type, help text and default are written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

EMPTY = inspect.Parameter.empty
KEYWORD = inspect.Parameter.KEYWORD_ONLY


@dataclass(frozen=True)
class Fields:
    """In a parameter's annotation: options for the fields of `model`; the command gets the given ones as a dict.

    exclude: fields without an option. task_presets: fields whose default a task may set. required: whether fields
    without a default are required options.
    """

    model: type[BaseModel]
    exclude: Collection[str] = ()
    task_presets: Collection[str] = ()
    required: bool = True
    panel: str | None = None

    @property
    def options(self) -> dict[str, FieldInfo]:
        return {name: field for name, field in self.model.model_fields.items() if name not in self.exclude}

    def parameter(self, name: str) -> inspect.Parameter:
        """The option of a field. Lists are comma-separated; None is the value of an option that is not given."""
        field = self.options[name]
        kind, several = _option_type(field.annotation)
        text = " ".join((field.description or "").split()).removesuffix(".")
        if several:
            head, default, tail = text.partition(" (default")
            text = f"{head}, comma-separated{default}{tail}"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=f"{text}{self._default(name, kind)}.",
            metavar=f"{'INTEGER' if kind is int else 'TEXT'},..." if several else None,
            rich_help_panel=self.panel,
        )
        unset = EMPTY if field.is_required() and self.required else False if kind is bool else None
        annotation = bool if kind is bool else (str if several else kind) | None
        return inspect.Parameter(name, KEYWORD, default=unset, annotation=Annotated[annotation, option])

    def _default(self, name: str, kind: Any) -> str:
        field = self.options[name]
        if field.is_required() or field.default in (None, []) or field.default is False:
            return ""
        value = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        preset = "the task's, or " if name in self.task_presets else ""
        return f" (default: {preset}{f'{value:g}' if kind is float else value})"

    def given(self, values: dict[str, Any]) -> dict[str, Any]:
        """Take the values of the options out of `values`; returns those that were given, lists split at commas."""
        found = {name: values.pop(name) for name in self.options}
        return {
            name: comma_separated(value) if _option_type(self.options[name].annotation)[1] else value
            for name, value in found.items()
            if value is not None and value is not False
        }


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: parameters annotated with `Fields` become options, and help texts end with the default."""
    fields: dict[str, Fields] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        if isinstance(info, Fields):
            fields[parameter.name] = info
            parameters += map(info.parameter, info.options)
        else:
            info = _with_default(info, parameter.default)
            parameters.append(parameter.replace(kind=KEYWORD, annotation=Annotated[kind, info]))

    def command(**values: Any) -> None:
        function(**{name: group.given(values) for name, group in fields.items()}, **values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def comma_separated(text: str | None) -> list[str]:
    """The entries of a comma-separated list, without spaces around them."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def _with_default(info: Any, default: object) -> Any:
    info = copy(info)
    info.show_default = False  # typer would set it apart, in brackets
    if default not in (EMPTY, None, False, ""):
        info.help = f"{info.help.removesuffix('.')} (default: {default})."
    return info


def _option_type(annotation: Any) -> tuple[Any, bool]:
    """The type of an option for a field's annotation, and whether it takes several values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _option_type(arguments[0])
    if origin in (Union, UnionType):
        return _option_type(next(kind for kind in arguments if kind is not NoneType))
    if origin in (list, tuple, Sequence):
        return _option_type(arguments[0])[0], True
    return annotation, False
