"""Ray: connect to a cluster, or start one on this machine and stop it again."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from types import ModuleType

from bbt_accel.errors import EngineError, MissingDependency, first_line
from bbt_accel.io.machine import physical_cores

OBJECT_STORE = (
    100 * 2**20
)  # bytes: rows and losses need little, and Ray's default is a third of the memory
CONNECT_TIMEOUT = 10.0  # seconds


@contextmanager
def connect(address: str = "local", cpus: int | None = None) -> Iterator[ModuleType]:
    """The ray module, connected while the block runs.

    address: of a cluster (HOST:PORT, or auto for the one running on this machine); `local` starts
        one on this machine that offers `cpus` CPUs (its cores unless given). An existing connection
        of this process is used as it is.
    Raises MissingDependency without ray, EngineError when there is no cluster at the address.
    """
    os.environ.setdefault(
        "RAY_IGNORE_UNHANDLED_ERRORS", "1"
    )  # it would print them; they are raised anyway
    try:
        import ray
    except ImportError:
        raise MissingDependency('ray is not installed; pip install "bbt-accel[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    # Of sockets and logs; a socket's path has 107 bytes at most, which TMPDIR of a batch system
    # would exceed.
    folder = tempfile.mkdtemp(prefix="bbt-ray-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    former = signal.getsignal(signal.SIGTERM)
    try:
        # Ray puts the working directory, where a folder may be named onnx, on the workers' path.
        with chdir(folder):
            _init(ray, address, cpus, folder)
        if former is signal.default_int_handler:  # Ray's own, in its place, ends the process
            signal.signal(signal.SIGTERM, former)
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _init(ray: ModuleType, address: str, cpus: int | None, folder: str) -> None:
    options: dict[str, object] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address == "local":
        options |= {"num_cpus": cpus or physical_cores(), "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE, "_temp_dir": folder}
    host, colon, port = address.rpartition(":")
    try:
        if (
            colon and port.isdigit() and "://" not in host
        ):  # Ray itself takes minutes to notice that nothing listens
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        if address == "local":
            raise EngineError(f"Ray does not start on this machine ({reason:.200})") from error
        hint = "start one with ray start --head; if it requires a token, set RAY_AUTH_MODE=token"
        raise EngineError(f"no Ray cluster at {address} ({reason:.200}); {hint}") from error


def cpus_of(ray: ModuleType) -> list[int]:
    """CPUs of each node that is alive and has any."""
    return [
        cpus
        for node in ray.nodes()
        if node["Alive"] and (cpus := int(node["Resources"].get("CPU", 0)))
    ]


def share_of_cores(ray: ModuleType, parts: int) -> int:
    """CPUs for each of `parts` equal shares of the cluster: at least 1, and no more than the
    smallest node has.
    """
    nodes = cpus_of(ray) or [1]
    return max(1, min(sum(nodes) // parts, *nodes))


def require(ray: ModuleType, parts: int, cpus: int, gpus: int, what: str) -> None:
    """Raises EngineError when the cluster could never run `parts` processes with these resources at
    once.
    """
    have = ray.cluster_resources()
    for kind, each, hint in (("CPU", cpus, "lower threads"), ("GPU", gpus, "use --device cpu")):
        need, found = f"{what} needs {parts * each} {kind}s", have.get(kind, 0)
        if parts * each > found:
            raise EngineError(
                f"{need}, the Ray cluster has {found:g}; {hint}, or use a larger cluster"
            )


def first_cause(error: BaseException) -> BaseException:
    """The error that a task raised, without Ray's wrapper."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
