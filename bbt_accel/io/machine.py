"""This machine: cores, instruction sets, memory, GPUs, and the versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import TypedDict

import bbt_accel

# instruction sets that matter for speed → the flags of /proc/cpuinfo that announce them
FEATURES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "AVX-512 VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_tile"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
}


class Machine(TypedDict):
    system: str
    cpu: str
    cores: int
    features: list[str]
    memory_gib: float | None
    gpus: list[str]


def describe_machine() -> Machine:
    info = _cpuinfo()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(_allowed_cpus()),
        "features": features(),
        "memory_gib": _memory(),
        "gpus": _gpus(),
    }


def features() -> list[str]:
    """Instruction sets of `FEATURES`; none where the system does not list them."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return [name for name, wanted in FEATURES.items() if wanted & flags]


def physical_cores() -> int:
    """Physical cores that the process may use; hyperthreads count as one where the system reports
    them.
    """
    siblings = set()
    for cpu in _allowed_cpus():
        try:
            file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            siblings.add(file.read_text(encoding="ascii").strip())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


@cache
def dependencies() -> dict[str, str | None]:
    """Every distribution that bbt-accel's metadata requires, and the extra that requires it (None:
    always).
    """
    found: dict[str, str | None] = {}
    for line in importlib.metadata.requires("bbt-accel") or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name is not None and not (extra and extra[1] in ("test", "dev")):
            found.setdefault(name[0].lower(), extra[1] if extra else None)
    return found


def extra_of(module: str) -> str | None:
    """The extra that installs a module, from the names of the distributions; None for an unknown
    one.
    """
    wanted = module.partition(".")[0].replace("_", "-")
    for name, extra in dependencies().items():
        if name == wanted or name.startswith(f"{wanted}-"):
            return extra
    return None


def installed(package: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """1.31.0 → (1, 31, 0); of 2.9.0+cpu what comes before the plus."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def installed_versions() -> dict[str, str]:
    """Python, bbt-accel, and whatever of its dependencies is installed."""
    ours = {"python": platform.python_version(), "bbt-accel": bbt_accel.__version__}
    return ours | {name: found for name in dependencies() if (found := installed(name)) is not None}


def _allowed_cpus() -> set[int]:
    return (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _gpus() -> list[str]:
    """Name, memory, driver and compute capability of each NVIDIA GPU; none without nvidia-smi."""
    fields = "name,memory.total,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
