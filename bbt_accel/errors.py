"""What can go wrong, as types. Each message is one line that says what is wrong and what to do."""

from __future__ import annotations


class BbtError(Exception):
    """Base of every error that bbt-accel raises on purpose; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(BbtError):
    """An argument or option that cannot be right, whatever the machine or the data."""

    exit_code = 2


class MissingDependency(BbtError):
    """An optional package is not installed; the message names the extra that brings it."""


class BundleError(BbtError):
    """A bundle that is missing, damaged, of another format, or not fit for what was asked."""


class ExportError(BbtError):
    """A backbone that cannot be exported, or whose export differs from eager PyTorch."""


def first_line(error: BaseException) -> str:
    """The first line of an error; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class EngineError(BbtError):
    """An engine, provider or device that is not there, or a forward pass that failed."""


class PlanError(EngineError):
    """A TensorRT plan that cannot be built, is damaged, or does not run here."""


class TaskError(UsageError):
    """A task file that is missing, malformed or asks for something that the bundle cannot do."""


class DataError(BbtError):
    """Rows that are missing, unreadable, wrongly labelled or too few."""


class RunError(BbtError):
    """A run folder that is missing, damaged, or belongs to other settings."""


class NonFiniteLoss(BbtError):
    """A candidate whose loss is NaN or infinite."""


class RequestError(BbtError):
    """A request that the server refuses; `status` is the HTTP status that says why."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
