"""What several options share: each limit, each description and each default is written once."""

from __future__ import annotations

from numbers import Integral
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from bbt_accel.errors import UsageError

MAX_THREADS = 1024
"""More than that, and runtimes fail while they start them."""
MAX_RMSE = 0.05
"""Relative logit RMSE of int8 above which matmuls are kept in fp32."""
PROMPT_TOKENS = 50
"""Of the papers."""
FIT_BUDGET, FIT_PROMPT_TOKENS = 300, 20
"""Of a classifier from a few rows, in minutes on a CPU."""

BACKBONE = "Hub id, checkpoint folder, .gguf file, or demo (shipped with bbt-accel)."
METHOD = "bbt: a prompt at the input; bbtv2: a prompt in every layer."
PROMPT_MODE = (
    "add: added to the embeddings of the first tokens; cat: prepended to the input (bbt only)."
)
JOBS = "Trials at a time (default: 1; with --ray: one per node or GPU)."
TASK_FOLDERS = (
    "Folder with a subfolder of rows for each task, or the only one's own "
    "(default: the tasks' datasets)."
)


def unique(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("the same value is listed twice")
    return values


Count = Annotated[int, Field(ge=1)]
PromptTokens = Annotated[int, Field(ge=1, le=2**16, description="Soft prompt vectors, n.")]
Threads = Annotated[
    int, Field(ge=1, le=MAX_THREADS, description="CPU threads (default: all cores).")
]
KShot = Annotated[
    int, Field(ge=1, description="Examples per class in the train set, and again in the dev set.")
]
Budget = Annotated[
    int, Field(ge=1, description="Calls of the search, one per candidate on the train set.")
]
Seed = Annotated[
    int, Field(ge=0, le=2**32 - 1, description="Seed of the rows, the projection and the search.")
]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(unique)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(unique)]
Budgets = Annotated[list[Budget], Field(min_length=1), AfterValidator(unique)]
Demonstrations = Annotated[
    int, Field(ge=0, description="Labelled train rows in front of each row (decoders).")
]


def check_threads(threads: int | None) -> None:
    """Raises UsageError for a number outside the limits of `Threads`; None is all cores."""
    if threads is not None and not (isinstance(threads, Integral) and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads must be a whole number in 1..{MAX_THREADS}, not {threads!r}")
