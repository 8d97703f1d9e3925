"""The GPU that a check runs on: its name, clocks and power, and whether its ceilings are those of
such a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

from pydantic import Field

from bbt_accel.io.machine import nvidia_smi
from bbt_accel.io.reporting import Schema

PLAUSIBLE = (0.45, 1.05)
"""Shares of a published peak between which a measured ceiling lies: a GPU that is throttled,
limited in power or shared is below, and a wrong table above."""
UNDER_LOAD = 1.0  # seconds of products during which clocks and power are read


class Peak(NamedTuple):
    """NVIDIA's published figures, 10⁹/s: fp16 operations of the tensor cores with fp32 sums, dense,
    and bytes.
    """

    fp16: float
    bytes: float


PEAKS: dict[
    str, Peak
] = {  # the name that nvidia-smi reports, as in `peak_of`; from the data sheets
    "H200": Peak(989e3, 4800),
    "H100 PCIe": Peak(756e3, 2000),
    "H100 NVL": Peak(835e3, 3900),
    "H100": Peak(989e3, 3350),
    "A100-SXM4-40GB": Peak(312e3, 1555),
    "A100-PCIE-40GB": Peak(312e3, 1555),
    "A100": Peak(312e3, 1935),
    "A30": Peak(165e3, 933),
    "A10": Peak(125e3, 600),
    "L40S": Peak(362e3, 864),
    "L4": Peak(121e3, 300),
    "T4": Peak(65e3, 320),
    "V100": Peak(125e3, 900),
    "RTX 4090": Peak(165e3, 1008),
    "RTX 3090": Peak(71e3, 936),
}
NAME = "(?:NVIDIA |Tesla |GeForce )*{}(?:[ -](?:[0-9]+GB|HBM[0-9]\\w*|SXM[0-9]|PCIe))*"
"""A name by its words in `PEAKS`, with the maker, the memory and the form, and no more: an RTX 4090
D is another.
"""
CEILINGS = {"fp16 PyTorch": "fp16", "copy, bytes": "bytes"}
"""Measured rate → the peak that it is compared with."""
QUERY = {
    "name": "name", "driver": "driver_version", "clock_mhz": "clocks.sm", "max_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw", "power_limit_w": "power.limit", "temperature": "temperature.gpu",
}  # fmt: skip
"""Field → what nvidia-smi calls it."""


class GpuState(Schema):
    """A GPU as nvidia-smi reports it; None for what it does not."""

    name: str
    driver: str | None = None
    clock_mhz: float | None = Field(
        default=None, description="Of the multiprocessors, while fp16 matrices multiply."
    )
    max_clock_mhz: float | None = Field(default=None, description="Their highest clock.")
    power_w: float | None = Field(default=None, description="Drawn at the same time.")
    power_limit_w: float | None = Field(default=None, description="At which the clock is lowered.")
    temperature: float | None = Field(default=None, description="At the same time, °C.")
    others: int | None = Field(
        default=None, description="Other processes that computed on it when the check began."
    )

    def __str__(self) -> str:
        facts = [
            f"driver {self.driver}",
            f"{self.clock_mhz} of {self.max_clock_mhz} MHz",
            f"{self.power_w} of {self.power_limit_w} W",
            f"{self.temperature} °C",
        ]
        return ", ".join([self.name, *(fact for fact in facts if "None" not in fact)])


def identity(index: int) -> str:
    """What nvidia-smi calls the GPU that is number `index` in this process.

    Its own numbers follow the bus; CUDA's begin with the fastest, and count those in
    CUDA_VISIBLE_DEVICES alone.
    """
    import torch

    if not torch.cuda.is_available():
        return str(index)
    found: Any = torch.cuda.get_device_properties(index)  # with more or fewer fields by version
    if hasattr(found, "uuid"):
        return f"GPU-{found.uuid}"
    if hasattr(found, "pci_bus_id"):
        return f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    return str(index)


def read_gpu(gpu: str) -> GpuState | None:
    """The GPU's present state; None without nvidia-smi."""
    lines = nvidia_smi(
        "-i", gpu, "--format=csv,noheader,nounits", f"--query-gpu={','.join(QUERY.values())}"
    )
    if not lines or len(lines[0]) != len(QUERY):
        return None
    known = [
        None if value.startswith("[") else value for value in lines[0]
    ]  # [N/A], [Not Supported]
    return GpuState.model_validate(dict(zip(QUERY, known, strict=True)))


def processes_on(gpu: str) -> int:
    """Processes that compute on the GPU."""
    return len(nvidia_smi("-i", gpu, "--format=csv,noheader", "--query-compute-apps=pid"))


def read_under_load(call: Callable[[], object], gpu: str) -> GpuState | None:
    """The GPU's state while `call` is repeated: clocks fall, and power rises, with the load."""
    with ThreadPoolExecutor(1) as pool:
        started, reading = monotonic(), None
        while monotonic() - started < UNDER_LOAD or (reading is not None and not reading.done()):
            call()
            if reading is None and monotonic() - started > UNDER_LOAD / 2:
                reading = pool.submit(read_gpu, gpu)
        return None if reading is None else reading.result()


def peak_of(name: str) -> Peak | None:
    """The published figures of a GPU by the name that nvidia-smi reports; None for one that is not
    in `PEAKS`.
    """
    exact = (
        peak
        for words, peak in PEAKS.items()
        if re.fullmatch(NAME.format(re.escape(words)), name, re.IGNORECASE)
    )
    return next(exact, None)


def doubts(gpu: GpuState | None, rates: Mapping[str, float]) -> list[str]:
    """Why the measured ceilings, 10⁹/s by their names, are not to be compared with: one line
    each.
    """
    if gpu is None:
        return ["nvidia-smi does not describe the GPU: its ceilings cannot be checked"]
    found = [f"{gpu.others} other processes computed on the GPU"] if gpu.others else []
    peak = peak_of(gpu.name)
    if peak is None:
        return [
            *found,
            f"the peak of {gpu.name} is not known (gpu_state.PEAKS): its ceilings cannot be checked",
        ]
    low, high = PLAUSIBLE
    for rate, figure in CEILINGS.items():
        share = rates.get(rate, 0.0) / getattr(peak, figure)
        if not low <= share <= high:
            found.append(
                f"{rate}: {share:.0%} of the peak of {gpu.name}, not {low:.0%} to {high:.0%}; {gpu}"
            )
    return found
