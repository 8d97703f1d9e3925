"""Device memory, a stream and CUDA graphs through cuda-python, as far as the TensorRT engine needs
them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bbt_accel.errors import EngineError, MissingDependency, first_line

LAYOUTS = (
    "cuda.bindings.runtime",
    "cuda.cudart",
)  # cuda-python's modules with the runtime, the current one first
ALIGNMENT = 256
"""TensorRT's alignment of device memory in bytes; buffer sizes are multiples of it, so that buffers
can be reused.
"""
GPU_TOKENS = 2**17
"""Candidates × rows × tokens of a call on a GPU, where calls have an overhead and memory is the
limit.
"""
Buffer = tuple[int, int]  # its number, in the order in which they were made, and its address


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str  # compute capability, e.g. 8.9
    driver: str


class DeviceArray:
    """An array in device memory; `release` returns its memory to the pool when it is
    garbage-collected.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        address: int,
        release: Callable[[], None],
    ) -> None:
        self.shape, self.dtype, self.address = shape, np.dtype(dtype), address
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        weakref.finalize(self, release).atexit = False


class Cuda:
    """One GPU, one stream, and a memory pool.

    Everything runs in stream order, so a buffer can be reused as soon as the work that reads it has
    been enqueued. The
    pool returns the free buffer that was made first: a search that repeats the same steps gets the
    same addresses, which CUDA graphs need, from its first generation on. What is uploaded has
    buffers of its own, because some of it is kept, and would take a buffer in the first generation
    that a result needs in every other.
    """

    def __init__(self, index: int = 0) -> None:
        self.runtime, self.index = load_runtime(), index
        count = self.call("cudaGetDeviceCount")
        if not count:
            raise EngineError("no NVIDIA GPU found; see bbt-accel doctor")
        if index >= count:
            raise EngineError(
                f"--device cuda:{index}: this machine has {count} GPU(s), counted from 0"
            )
        found = self.call("cudaGetDeviceProperties", index)
        self.gpu = Gpu(
            decoded(found.name).strip("\0 "), f"{found.major}.{found.minor}", self.driver()
        )
        self.stream: Any = None
        self.free: dict[tuple[int, bool], list[Buffer]] = defaultdict(list)
        """Idle buffers by their size and whether they are for uploads, each list a heap."""
        self.buffers: set[int] = set()
        self.numbers = itertools.count()
        self.uploads: list[npt.NDArray[Any]] = []
        """What the stream may still have to read."""
        self.forget: Callable[[], None] = lambda: None
        """Called before idle buffers are freed, to drop the CUDA graphs that use their
        addresses.
        """

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime. Raises EngineError with CUDA's own message.

        The runtime keeps an error until it is read, and TensorRT would take it for its own: it is
        cleared.
        """
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status):
            self.runtime.cudaGetLastError()
            raise EngineError(failure(self.runtime, name, status))
        return values[0] if len(values) == 1 else values or None

    def driver(self) -> str:
        """The driver's version; if the system does not provide it, the CUDA version that the driver
        supports.
        """
        try:
            return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
        except OSError:
            version = self.call("cudaDriverGetVersion")
            return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def open(self) -> None:
        """Create the stream. Raises EngineError."""
        if self.stream is None:
            self.enter()
            # Not one that waits for the default stream: another library's call there would end a
            # capture.
            self.stream = self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)

    def enter(self) -> None:
        """Make the GPU the current one of this thread, on which memory is allocated and TensorRT
        launches kernels.

        Before any work: the thread may be another than before, or have served an engine on another
        GPU.
        """
        self.call("cudaSetDevice", self.index)

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody has allocated."""
        return int(self.call("cudaMemGetInfo")[0])

    def empty(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, upload: bool = False
    ) -> DeviceArray:
        """A new, uninitialized array. Raises EngineError when the GPU is out of memory."""
        size = -(-max(1, math.prod(shape) * np.dtype(dtype).itemsize) // ALIGNMENT) * ALIGNMENT
        pile = self.free[size, upload]
        buffer = heapq.heappop(pile) if pile else (next(self.numbers), self.allocate(size))
        return DeviceArray(shape, dtype, buffer[1], lambda: heapq.heappush(pile, buffer))

    def allocate(self, size: int) -> int:
        """New memory; if there is none left, the pool's idle buffers are released first."""
        try:
            address = int(self.call("cudaMalloc", size))
        except EngineError:
            if not any(self.free.values()):
                raise
            self.release_idle()
            address = int(self.call("cudaMalloc", size))
        self.buffers.add(address)
        return address

    def release_idle(self) -> None:
        """Free the idle buffers, after `forget` has dropped the CUDA graphs that use their
        addresses.
        """
        self.synchronize()
        self.forget()
        for pile in self.free.values():
            for _, address in pile:
                self.buffers.discard(address)
                self.call("cudaFree", address)
            pile.clear()

    def upload(self, array: npt.NDArray[Any], target: DeviceArray | None = None) -> DeviceArray:
        """Copy an array to the device, into `target` (of the same size) or into a new array."""
        self.enter()
        array = np.ascontiguousarray(array)
        target = self.empty(array.shape, array.dtype, upload=True) if target is None else target
        if target.nbytes != array.nbytes:
            raise ValueError(f"{array.nbytes} bytes do not fit into {target.nbytes}")
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        # A GPU that reads pageable memory itself, as on Grace, may do so later, when the caller has
        # changed the array.
        self.uploads.append(array := array.copy())
        self.call(
            "cudaMemcpyAsync", target.address, array.ctypes.data, array.nbytes, kind, self.stream
        )
        return target

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """The array on the host, after all work enqueued before."""
        host = np.empty(array.shape, array.dtype)
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(
            "cudaMemcpyAsync", host.ctypes.data, array.address, host.nbytes, kind, self.stream
        )
        self.synchronize()
        return host

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)
        self.uploads.clear()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """An executable CUDA graph of the work that `enqueue` puts on the stream.

        Raises EngineError, and whatever `enqueue` raises; the stream then takes work as before.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
            graph = self.call("cudaStreamEndCapture", self.stream)
        except BaseException:
            self.abandon_capture()
            raise
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """End a capture that has failed, free the part of a graph that there is, and clear
        TensorRT's error.

        A stream stays in capture until it is ended.
        """
        with suppress(EngineError):
            graph = self.call("cudaStreamEndCapture", self.stream)
            if graph is not None:  # there is none of a capture that was invalidated
                self.call("cudaGraphDestroy", graph)
        with suppress(EngineError):
            self.call("cudaGetLastError")

    def launch(self, graph: Any) -> None:
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free the stream and all memory; remaining arrays become invalid.

        After a kernel has failed every call does: the error was raised where the work was, and is
        not raised again.
        """
        if self.stream is not None:
            with suppress(EngineError):
                self.synchronize()
            with suppress(EngineError):
                self.call("cudaStreamDestroy", self.stream)
            self.stream = None
        for address in self.buffers:
            with suppress(EngineError):
                self.call("cudaFree", address)
        self.buffers, self.free = set(), defaultdict(list)


def load_runtime() -> Any:
    """cuda-python's module of the CUDA runtime."""
    for name in LAYOUTS:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(
                f"cuda-python cannot be loaded ({first_line(error)}); see bbt-accel doctor"
            ) from None
    raise MissingDependency('cuda-python is not installed: pip install "bbt-accel[trt]"')


def failure(runtime: Any, function: str, status: Any) -> str:
    """One line for a status other than success."""
    name = getattr(status, "name", str(status))
    if name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary"):
        return "no NVIDIA GPU found, or its driver is too old; see bbt-accel doctor"
    if name == "cudaErrorMemoryAllocation":
        return "the GPU is out of memory; use a smaller backbone, --popsize or --k-shot"
    return f"CUDA failed in {function} ({name}: {decoded(runtime.cudaGetErrorString(status)[1])})"


def decoded(text: bytes | str) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)
