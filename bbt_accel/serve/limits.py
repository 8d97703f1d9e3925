"""The server: backbones and tuned prompts over HTTP. Nothing heavy is imported here."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of the server's cache: the settings of `bbt-accel serve`."""

    request_bytes: int = Field(default=64 * 2**20, ge=1, description="Largest request body.")
    batch: int = Field(default=16384, ge=1, description="Rows times candidates of a request.")
    timeout: float = Field(
        default=300.0,
        ge=0.1,
        allow_inf_nan=False,
        description="Seconds for a request to arrive, and again for the response to be ready.",
    )
    cached_batches: int = Field(
        default=16, ge=1, description="Batches of rows cached for later requests."
    )
    requests: int = Field(
        default=64, ge=1, description="Inference requests at a time; others get 503."
    )
    bodies: int = Field(
        default=4, ge=1, description="Bodies of the largest size held at a time; others get 503."
    )
    row_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a row, what the backbone takes unless given; texts are truncated.",
    )
    words: int = Field(default=2**14, ge=1, description="Label words of a request.")
    idle: float = Field(
        default=10.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without the next part of a request, or of its response being read.",
    )
    keep_alive: float = Field(
        default=75.0,
        ge=1,
        allow_inf_nan=False,
        description="Seconds between two requests until a connection is closed; a proxy, which "
        "keeps them for 60, must close its own first.",
    )

    @property
    def tokens(self) -> int:
        """Of one batch of rows, and of all that are in the cache."""
        return 64 * self.batch

    @property
    def logits(self) -> int:
        """Of one request: candidates times rows times label words, and numbers of hidden states."""
        return 1024 * self.batch
