"""The server: backbones and tuned prompts over HTTP. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of the server's cache."""

    request_bytes: int = 64 * 2**20
    batch: int = 16384  # rows times candidates
    timeout: float = 300.0  # seconds for the body to arrive, and again for the response to be ready
    cached_batches: int = (
        16  # batches of rows in the cache; the least recently used one is dropped first
    )
    requests: int = 64  # inference requests at a time; others get 503
    bodies: int = (
        4  # of the largest size; together no more bytes than these are held, others get 503
    )
    row_tokens: int | None = (
        None  # of a row; a longer text is truncated. None for what the backbone takes
    )
    words: int = 2**14  # label words of a request, whose weights are gathered
    idle: float = 10.0  # seconds without the next part of a request, or of its response being read
    # seconds without a request; proxies keep connections for 60, and must close them first
    keep_alive: float = 75.0

    @property
    def tokens(self) -> int:
        """Of one batch of rows, and of all that are in the cache."""
        return 64 * self.batch

    @property
    def logits(self) -> int:
        """Of one request: candidates times rows times label words, and numbers of hidden states."""
        return 1024 * self.batch
