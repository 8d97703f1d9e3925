"""Ray: a cluster that is joined, or one of this machine's that is started and stopped again."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from bbt_accel.cores import physical_cores
from bbt_accel.errors import EngineError, MissingDependency, first_line

STORE = 100 * 2**20
"""Bytes of shared memory for Ray's objects: rows and losses need little, and Ray would take a third of the machine."""

PATIENCE = 10.0
"""Seconds to wait for a cluster's address to answer."""


@contextmanager
def connect(address: str = "local", cpus: int | None = None) -> Iterator[ModuleType]:
    """The ray module, connected while the block runs.

    address: of a cluster (HOST:PORT, or auto for the one that runs here); `local` starts one on this machine, with
        `cpus` to give away (its cores unless given). A program that is connected already stays so.
    Raises MissingDependency without ray, EngineError when there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # which it would print; they are raised anyway
    try:
        import ray
    except ImportError:
        raise MissingDependency('ray is not installed; pip install "bbt-accel[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    folder = tempfile.mkdtemp(prefix="bbt-ray-")  # sockets and logs
    with _silent():
        try:
            _init(ray, address, cpus, folder)
            yield ray
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _init(ray: ModuleType, address: str, cpus: int | None, folder: str) -> None:
    options: dict[str, object] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": cpus or physical_cores(), "include_dashboard": False, "object_store_memory": STORE}
        options |= {"_temp_dir": folder}
    try:
        _reach(address)
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        if address == "local":
            raise EngineError(f"Ray does not start here ({reason:.200})") from error
        hint = "start one with ray start --head, and set RAY_AUTH_MODE=token where it asks for a token"
        raise EngineError(f"no Ray cluster at {address} ({reason:.200}); {hint}") from error


def _reach(address: str) -> None:
    """Raises OSError when nothing listens at HOST:PORT, which Ray itself takes minutes to find out."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Ray from printing the deaths of processes on standard output, which is for results; they are raised, too.

    Ray has no setting for it.
    """
    worker = import_module("ray._private.worker")
    former = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *arguments, **options: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        worker.print_to_stdstream = former  # type: ignore[attr-defined]


def cpus_of(ray: ModuleType) -> list[int]:
    """CPUs of each node that is alive, those without any left out."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [cpus for cpus in found if cpus]


def share_of_cores(ray: ModuleType, parts: int) -> int:
    """CPUs for each of so many equal parts of the cluster: one at least, and no more than every node has."""
    nodes = cpus_of(ray) or [1]
    return max(1, min(sum(nodes) // parts, *nodes))


def require(ray: ModuleType, parts: int, cpus: int, gpus: int, what: str) -> None:
    """Raises EngineError when the cluster could never hold so many parts at once."""
    have = ray.cluster_resources()
    for kind, each, hint in (("CPU", cpus, "lower --threads"), ("GPU", gpus, "use --device cpu")):
        found = have.get(kind, 0)
        if parts * each > found:
            raise EngineError(
                f"{what} needs {parts * each} {kind}s, the Ray cluster has {found:g}; {hint}, or take a larger one"
            )


def first_cause(error: BaseException) -> BaseException:
    """The error that a task raised, out of what Ray wraps around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
