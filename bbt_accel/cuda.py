"""Device memory, streams and CUDA graphs through cuda-python: what the TensorRT engine needs of CUDA, and no more."""

from __future__ import annotations

import heapq
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bbt_accel.errors import EngineError, MissingDependency, first_line

LAYOUTS = ("cuda.bindings.runtime", "cuda.cudart")
"""Where cuda-python keeps the runtime's functions, the present place first."""
ALIGNMENT = 256
"""Bytes that TensorRT wants device memory aligned to; buffers are multiples of it, so that they can be used again."""


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str
    """Compute capability, as NVIDIA writes it: 8.9."""
    driver: str


class DeviceArray:
    """An array in device memory. Its memory goes back to the pool when nothing refers to it any more."""

    def __init__(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, address: int, give_back: Callable[[], None]
    ) -> None:
        self.shape, self.dtype, self.address = tuple(shape), np.dtype(dtype), address
        weakref.finalize(self, give_back).atexit = False

    @property
    def nbytes(self) -> int:
        return size_of(self.shape, self.dtype)


def size_of(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class Cuda:
    """The first GPU, one stream, and a pool of memory.

    Everything runs in the order of the stream, so a buffer may be used again as soon as the work that reads it has been
    enqueued. The pool gives the free buffer of the lowest address: from its second generation on, a search that does
    the same again gets the same addresses, which is what a CUDA graph needs.
    """

    def __init__(self) -> None:
        self.runtime = load_runtime()
        count = self.call("cudaGetDeviceCount")
        if not count:
            raise EngineError("there is no NVIDIA GPU; see bbt-accel doctor")
        self.gpu = self.describe()
        self.stream: Any = None
        self.free: dict[int, list[int]] = defaultdict(list)
        self.buffers: set[int] = set()
        self.forget: Callable[[], None] = lambda: None
        """Called before idle buffers are freed."""

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the CUDA runtime. Raises EngineError with CUDA's own words for what failed."""
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status):
            raise EngineError(failure(self.runtime, name, status))
        return values[0] if len(values) == 1 else values or None

    def describe(self) -> Gpu:
        properties = self.call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Gpu(name.strip("\0 "), f"{properties.major}.{properties.minor}", self.driver())

    def driver(self) -> str:
        """The driver's own version; where the system does not tell, the CUDA version that it supports."""
        try:
            return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
        except OSError:
            version = self.call("cudaDriverGetVersion")
            return f"CUDA {version // 1000}.{version % 1000 // 10}"

    # Memory ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the stream. Raises EngineError."""
        if self.stream is None:
            self.stream = self.call("cudaStreamCreate")

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new array, of whatever its memory holds. Raises EngineError when there is no memory left."""
        size = -(-max(1, size_of(shape, dtype)) // ALIGNMENT) * ALIGNMENT
        pile = self.free[size]
        address = heapq.heappop(pile) if pile else self.allocate(size)
        return DeviceArray(shape, dtype, address, lambda: heapq.heappush(pile, address))

    def allocate(self, size: int) -> int:
        """New memory; what lies idle in the pool is given up for it when there is no more."""
        try:
            address = int(self.call("cudaMalloc", size))
        except EngineError:
            if not any(self.free.values()):
                raise
            self.give_up()
            address = int(self.call("cudaMalloc", size))
        self.buffers.add(address)
        return address

    def give_up(self) -> None:
        """Free the buffers that lie idle, after `forget` has dropped the CUDA graphs that know their addresses."""
        self.synchronize()
        self.forget()
        for pile in self.free.values():
            for address in pile:
                self.buffers.discard(address)
                self.call("cudaFree", address)
            pile.clear()

    def upload(self, array: npt.NDArray[Any], there: DeviceArray | None = None) -> DeviceArray:
        """Copy an array to the device: into another of its size, or into a new one."""
        array = np.ascontiguousarray(array)
        there = self.empty(array.shape, array.dtype) if there is None else there
        if there.nbytes != array.nbytes:
            raise ValueError(f"{array.nbytes} bytes do not fit into {there.nbytes}")
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        # From pageable memory this returns when the array has been read: it may change right after.
        self.call("cudaMemcpyAsync", there.address, array.ctypes.data, array.nbytes, kind, self.stream)
        return there

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """The array on the host, when all that was enqueued before has been done."""
        here = np.empty(array.shape, array.dtype)
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", here.ctypes.data, array.address, here.nbytes, kind, self.stream)
        self.synchronize()
        return here

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    # Graphs ---------------------------------------------------------------------------------------------------

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream as a CUDA graph that can be launched. Raises EngineError."""
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        finally:
            graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free the stream and all memory. Arrays that are still referred to are void."""
        if self.stream is not None:
            self.synchronize()
            self.call("cudaStreamDestroy", self.stream)
            self.stream = None
        for address in self.buffers:
            self.call("cudaFree", address)
        self.buffers, self.free = set(), defaultdict(list)


def load_runtime() -> Any:
    """cuda-python's module of the CUDA runtime, in whichever place its release has it."""
    for name in LAYOUTS:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            raise EngineError(f"cuda-python cannot be loaded ({first_line(error)}); see bbt-accel doctor") from None
    raise MissingDependency('cuda-python is not installed: pip install "bbt-accel[trt]"')


def failure(runtime: Any, function: str, status: Any) -> str:
    """One line for a status that is no success."""
    name = getattr(status, "name", str(status))
    if name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary"):
        return "there is no NVIDIA GPU, or its driver is too old for this cuda-python; see bbt-accel doctor"
    if name == "cudaErrorMemoryAllocation":
        return "the GPU is out of memory; use a smaller backbone, --popsize, --k-shot or --intrinsic-dim"
    _, text = runtime.cudaGetErrorString(status)
    return f"CUDA failed in {function} ({name}: {text.decode() if isinstance(text, bytes) else text})"
