"""Error types. Each message is one line that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from pydantic import ValidationError


class BbtError(Exception):
    """Base of every error that bbt-accel raises on purpose; the command line prints it and exits
    with `exit_code`.
    """

    exit_code = 1


class UsageError(BbtError):
    """An argument or option that is wrong whatever the machine or the data."""

    exit_code = 2


class MissingDependency(BbtError):
    """An optional package is not installed; the message names the extra that installs it."""


class BundleError(BbtError):
    """A bundle that is missing, damaged, of another format, or unsuitable for the request."""


class ExportError(BbtError):
    """A backbone that cannot be exported, or whose export differs from eager PyTorch."""


class EngineError(BbtError):
    """An engine, provider or device that is not available, or a forward pass that failed."""


class PlanError(EngineError):
    """A TensorRT plan that cannot be built, is damaged, or does not run on this machine."""


class TaskError(UsageError):
    """A task file that is missing, malformed or incompatible with the bundle."""


class DataError(BbtError, ValueError):
    """Rows that are missing, unreadable, wrongly labelled or too few; a ValueError, as
    scikit-learn's users expect.
    """


class RunError(BbtError):
    """A run folder that is missing, damaged, or belongs to other settings."""


class PackageError(BbtError):
    """A run that cannot be packaged, or a package that is damaged or differs from its run."""


class HubError(BbtError):
    """A repository of the Hugging Face hub that cannot be read or written."""


class NonFiniteLoss(BbtError):
    """A candidate whose loss is NaN or infinite."""


class RequestError(BbtError):
    """A request that the server refuses; `status` is the HTTP status of the response."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def translated(kind: type[BbtError], what: str) -> Iterator[None]:
    """Whatever a library raises over damaged input becomes one line: `what`, and the reason.

    Errors of our own and those of the machine pass.
    """
    try:
        yield
    except (BbtError, MemoryError, OSError):
        raise
    except Exception as error:
        cause = (
            error.__cause__ or error
        )  # PyTorch's own message of a failed export is advice of many lines
        raise kind(f"{what} ({type(cause).__name__}: {first_line(cause):.200})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error message, and the next one if that is what it announces.

    The name of its class where the message is empty.
    """
    first, *others = filter(
        None, map(str.strip, (str(error).strip() or type(error).__name__).splitlines())
    )
    return f"{first} {others[0]}" if first.endswith(":") and others else first


def missing_module(error: ImportError) -> str:
    """What is wrong with a module: it is missing, or there and cannot be loaded, e.g. for lack of
    memory.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    cause = first_line(error.__cause__ or error)  # numpy's own message is advice of many lines
    return f"{error.name or 'a library'} cannot be loaded ({cause:.200})"


def clipped(text: str, limit: int = 200) -> str:
    """The text, or its beginning: what others have sent is repeated only in part."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A hint for a name that is not known: the closest known one, or all of them."""
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"


def check_known(
    what: str, name: str, known: Collection[str], error: type[Exception] = UsageError
) -> None:
    """Raises `error` for a name that is not among those known, and suggests the closest one."""
    if name not in known:
        raise error(f"unknown {what} {name!r}; {did_you_mean(name, known)}")


def first_problem(error: Exception) -> str:
    """The first problem of a validation error, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where, message = (
            ".".join(map(str, first["loc"])),
            first["msg"].removeprefix("Value error, "),
        )
        if first["type"] == "model_type":  # pydantic names the class
            message = "Input should be an object"
        return f"{where}: {message}" if where else message
    return str(error).splitlines()[0]
