"""Reading bundles in OpenVINO's own format, which `exporters/convert/openvino_ir.py` writes, and
compiling them.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel.core.bundle import OPENVINO_WEIGHTS
from bbt_accel.io.machine import describe_machine


class StageReader:
    """Reads the stages of a bundle, whose constants it maps into memory once. It must outlive what
    is compiled.
    """

    def __init__(self, folder: Path) -> None:
        import openvino

        self.folder, self.core = folder, openvino.Core()
        with (folder / OPENVINO_WEIGHTS).open("rb") as stream:
            # OpenVINO refuses arrays that cannot be written to, but does not write.
            self.pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self.weights = openvino.Tensor(np.frombuffer(self.pages, np.uint8), shared_memory=True)

    def read(self, stage: str) -> Any:
        """A stage as OpenVINO's model."""
        return self.core.read_model(
            (self.folder / f"{stage}.xml").read_text(encoding="utf-8"), self.weights
        )

    def compile(self, stage: str, config: dict[str, str]) -> Any:
        """A stage compiled for the CPU, which has most of its weights in a format of its own."""
        compiled = self.core.compile_model(self.read(stage), "CPU", config)
        if hasattr(
            mmap, "MADV_DONTNEED"
        ):  # what was read to compile is read again only where it is used in place
            self.pages.madvise(mmap.MADV_DONTNEED)
        return compiled


def compile_options(precision: str, threads: int | None) -> dict[str, str]:
    """How a model is compiled for the CPU. threads: as many as cores unless given.

    Without a precision, OpenVINO would compute fp32 graphs in bf16 on processors that have it. It
    would also pin its
    threads, and those of every process to the same cores: two workers with a thread each would
    share one core.
    """
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    return options | (
        {"INFERENCE_NUM_THREADS": str(threads), "ENABLE_CPU_PINNING": "NO"} if threads else {}
    )


def openvino_bf16() -> str:
    """How OpenVINO computes bf16 on this processor: natively, emulated (much slower than fp32), or
    not at all.
    """
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "not supported by this processor: computed in fp32"
    if "bf16" in describe_machine()["features"]:
        return "native"
    return "emulated by this processor: slower than fp32"  # AVX-512 without bf16
