"""What installed packages add by entry points."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import TypeVar

from bbt_accel.errors import first_line
from bbt_accel.io.progress import note

T = TypeVar("T")


def with_plugins(built_in: Sequence[T], group: str, kind: type[T], key: str) -> dict[str, T]:
    """Built-in specifications and those of installed packages, by their attribute `key`.

    One that cannot be loaded, is of another kind or has a taken name is noted on standard error and
    left out, so that a broken package stops no command.
    """
    found = {getattr(value, key): value for value in built_in}
    for entry in entry_points(group=group):
        try:
            value = entry.load()
        except Exception as error:
            note(
                f"{entry.value} ({group}) cannot be loaded and is ignored: {first_line(error):.200}"
            )
            continue
        if not isinstance(value, kind):
            note(f"{entry.value} ({group}) is no {kind.__name__} and is ignored")
        elif (name := getattr(value, key)) in found:
            note(f"{entry.value} ({group}) is ignored: there is another {name}")
        else:
            found[name] = value
    return found
