"""The black box over HTTP: what is served, by which names, to our own client and to any other.

The protocol is the Open Inference Protocol of KServe and Triton (version 2 of their REST interface) with its binary
tensor data. Names that server, client and the Triton repository share are here; nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

BACKBONE = "backbone"
"""Prompts in, label logits out."""
LAYER = "backbone_layer"
"""bbtv2: candidates of one layer in, label logits out; the server keeps what lies below the layer."""
STDS = "backbone_stds"
"""bbtv2: the standard deviation of the hidden states that enter each block."""
CLASSIFIER = "classifier"
"""Texts in, labels and probabilities out, with a tuned prompt."""

ROWS = "rows"
"""The request parameter that refers to rows by their hash, and the response parameter that tells it."""
ROWS_EXTENSION = "bbt_accel_rows"
"""In the extensions of a server's metadata: it keeps rows that were sent once."""
UNKNOWN_ROWS = 409
"""The status of a request that refers to rows which the server does not have (any more)."""
DIGEST = "bundle"
"""The parameter of a model's configuration that holds the sha256 of its bundle.json."""
TOKEN = "BBT_ACCEL_TOKEN"
"""The environment variable that holds the bearer token, at both ends."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    request_bytes: int
    batch: int
    """Rows times candidates."""
    timeout: float
    """Seconds for the body to arrive, and again for the answer to be there."""
    kept: int = 16
    """Batches of rows that the server keeps, the one used longest ago dropped first."""


def backbone_name(backbone: str) -> str:
    """The backbone as others may know it: a hub id, or a folder's name without the path on this machine."""
    return PurePath(backbone).name if PurePath(backbone).is_absolute() else backbone


def stage_model(name: str, stage: str) -> str:
    """The model of one stage of a bundle in a Triton repository."""
    return name if stage == "model" else f"{name}_{stage}"
