"""Sessions of ONNX Runtime whose products of 8-bit integers are right on every processor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from bbt_accel.io.machine import features
from bbt_accel.io.progress import note

WIDE_SUMS = "session.x64quantprecision"
"""The session option that has signed weights converted to unsigned ones. Without VNNI the product
of unsigned activations and signed weights is added up in pairs of 16 bits, which overflow."""


def session_options(threads: int | None = None) -> Any:
    """Options of a session. threads: all cores unless given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; errors are raised anyway
    options.intra_op_num_threads = threads or 0
    return options


def inference_session(
    model: Path | bytes, options: Any, providers: Sequence[Any], **more: Any
) -> Any:
    """An `onnxruntime.InferenceSession` with these options, on these providers or not at all.

    model: its file or its bytes.
    """
    import onnxruntime

    more["enable_fallback"] = (
        0  # it would print the error to standard output, and load the graph on the CPU
    )
    if lacks_vnni():
        options.add_session_config_entry(WIDE_SUMS, "1")
        with suppress(
            Exception
        ):  # of a weight with two uses, which ONNX Runtime 1.32 cannot convert
            return onnxruntime.InferenceSession(model, options, providers, **more)
        options.add_session_config_entry(WIDE_SUMS, "0")
    session = onnxruntime.InferenceSession(model, options, providers, **more)
    if lacks_vnni():
        warn()
    return session


@cache
def lacks_vnni() -> bool:
    """Whether this processor adds up products of 8-bit integers in 16 bits."""
    found = features()
    return "AVX2" in found and "AVX-512 VNNI" not in found


@cache
def warn() -> None:
    """Once in a process."""
    note(
        "this processor has no VNNI, so sums of this int8 graph may overflow; "
        "use --engine openvino, or fp32"
    )
