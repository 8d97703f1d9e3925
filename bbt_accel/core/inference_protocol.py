"""Names that the server, its client and packages for Triton share.

The protocol is the Open Inference Protocol of KServe and Triton (version 2 of their REST interface)
with binary data.
"""

from __future__ import annotations

from bbt_accel.core.backbone_names import backbone_name
from bbt_accel.core.bundle import Bundle

# The models.
BACKBONE = "backbone"  # from prompts to label logits
OUTPUTS = "backbone_outputs"  # from prompts to label logits and hidden states
# bbtv2: from candidates of one layer to label logits; the server caches the layers below it
LAYER = "backbone_layer"
STDS = "backbone_stds"  # bbtv2: the standard deviation of the hidden states that enter each block
CLASSIFIER = "classifier"  # from texts to labels and probabilities, with a tuned prompt

# the request parameter that refers to rows by their hash; the response parameter that returns it
ROWS = "rows"
ROWS_EXTENSION = (
    "bbt_accel_rows"  # listed in the server's extensions: it caches rows that were sent once
)
UNKNOWN_ROWS = (
    409  # status of a request that refers to rows which the server does not have (any more)
)
DIGEST = (
    "bundle"  # the parameter of a model's configuration that holds the sha256 of its bundle.json
)
TOKEN = "BBT_ACCEL_TOKEN"  # the environment variable with the bearer token, on both sides
# that with the seconds for which a client tries again to reach a server; default 60
PATIENCE = "BBT_ACCEL_PATIENCE"


def bundle_facts(bundle: Bundle) -> dict[str, str]:
    """The parameters of a model's configuration by which clients recognize its bundle."""
    info = bundle.info
    own = {
        "backbone": backbone_name(info.backbone),
        "method": info.method,
        "precision": info.precision,
    }
    return {DIGEST: bundle.digest, **own}
