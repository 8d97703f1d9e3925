"""The cores of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Cores that the process may use, two hyperthreads counted as one where the system tells: one thread each."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        try:
            file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            siblings.add(file.read_text(encoding="ascii").strip())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)
