"""What a command is: a class whose fields are its options, and whose `execute` does the work."""

# Without postponed annotations: inherited ones would be evaluated in another module.
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from bbt_accel.cli.options import default_of, fields_of, meaning_of, parse_settings

app = typer.Typer(
    name="bbt-accel",
    help="Tune soft prompts for frozen language models with forward passes alone, on fast "
    "inference engines.",
    epilog="Example: bbt-accel export demo -o bundle && "
    "bbt-accel tune --bundle bundle --task demo -o run",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
HEADER = ["key", "type", "default", "meaning"]
COMMANDS: dict[str, type["Command"]] = {}


@dataclass(kw_only=True)
class Command:
    """A field annotated with a `typer.Option` is an option; None where it is not given."""

    context: typer.Context

    def execute(self) -> None:
        raise NotImplementedError

    @property
    def as_json(self) -> bool:
        """--json, an option of the program."""
        return bool(self.context.find_root().params["as_json"])

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that were given."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(kw_only=True)
class Settable(Command):
    """A command with settings that have no option: the fields of `model` that it does not list."""

    model: ClassVar[Any]
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting without an option; repeatable. --help-settings lists them.",
        ),
    ] = None

    @classmethod
    def without_option(cls) -> list[str]:
        """The settings without an option."""
        return [name for name in fields_of(cls.model) if name not in cls.__dataclass_fields__]

    @classmethod
    def table(cls) -> list[tuple[str, str, str, str]]:
        """Key, type, default and meaning of each of them."""
        fields, rows = fields_of(cls.model), []
        for key in cls.without_option():
            kind = "|".join(fields[key].get("enum", [fields[key]["type"]]))
            rows.append((key, kind, default_of(key, fields[key]), meaning_of(fields[key])))
        return rows

    def settings(self) -> dict[str, Any]:
        """The fields of the model that were given, by options or by --set."""
        options = [name for name in fields_of(self.model) if name in self.__dataclass_fields__]
        settings = parse_settings(self.model, self.without_option(), self.set_ or [])
        return self.given(*options) | settings


def command(panel: str, example: str) -> Callable[[type[Command]], type[Command]]:
    """Register a class as the command of its name, in lower case; its docstring is the help."""

    def register(cls: type[Command]) -> type[Command]:
        made = dataclass(kw_only=True)(cls)
        name = cls.__name__.lower()
        COMMANDS[name] = made

        def call(**options: Any) -> None:
            made(**options).execute()

        signature = inspect.signature(made, eval_str=True)
        last = sorted(signature.parameters.values(), key=lambda p: p.name == "set_")
        call.__signature__ = signature.replace(parameters=last)  # type: ignore[attr-defined]
        epilog = f"Example: bbt-accel {example}. With --json it prints JSON."
        help_text = " ".join((cls.__doc__ or "").split())
        app.command(name, help=help_text, epilog=epilog, rich_help_panel=panel)(call)
        return made

    return register
