"""A GPU of the tests' own: TensorRT and the CUDA runtime as far as bbt-accel uses them, on the CPU.

Device memory is host memory, a plan names the ONNX file that it was built from, and running it is
running ONNX Runtime on what lies at the addresses. So the engine's own work (addresses, shapes,
CUDA graphs, caches, errors) is validated against the naive forward without a GPU. What TensorRT and
CUDA themselves do is not tested by it.
"""

# ruff: noqa: N802, N815 - the names are CUDA's
from __future__ import annotations

import ctypes
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from enum import Enum, IntEnum
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


FIRST_STREAM = 7


class FakeRuntime:
    """cuda.bindings.runtime. Each GPU has one stream, numbered from 7; a thread's current GPU is 0
    until it is set.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, memory: int = 2**30, devices: int = 1) -> None:
        self.memory, self.total, self.devices = memory, memory, devices
        self.current = threading.local()
        self.error = Status.cudaSuccess
        """What the last call that failed left, until it is read."""
        self.partial = 0
        """Graphs of failed captures that nobody has freed."""
        self.blocks: dict[int, Any] = {}
        self.places: dict[int, int] = {}
        """Address → the GPU whose memory it is."""
        self.capturing: list[Callable[[], None]] | None = None
        self.launches = self.uploaded = self.downloaded = 0
        self.course: list[str] = []
        """What came in which order: `run` for a plan or a graph, `upload`, `download`."""
        self.captures = self.instantiates = True
        self.broken = False
        """Whether a kernel has failed: then every call does."""
        self.properties = SimpleNamespace(name=b"NVIDIA Fake 1000\0\0", major=8, minor=9)

    def failed(self, status: Status) -> Status:
        self.error = status
        return status

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (
            (Status.cudaSuccess, self.devices)
            if self.devices >= 0
            else (Status.cudaErrorInsufficientDriver, None)
        )

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.properties

    @property
    def device(self) -> int:
        """The current GPU of this thread."""
        return getattr(self.current, "device", 0)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self.current.device = device
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.memory, self.total

    def cudaGetLastError(self) -> tuple[Any, ...]:
        self.error, last = Status.cudaSuccess, self.error
        return (last,)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, 13000

    def cudaGetErrorString(self, status: Any) -> tuple[Any, ...]:
        return Status.cudaSuccess, b"in words"

    cudaStreamNonBlocking = 1

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaStreamNonBlocking
        return Status.cudaSuccess, FIRST_STREAM + self.device

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (self.failed(Status.cudaErrorIllegalAddress) if self.broken else Status.cudaSuccess,)

    cudaStreamSynchronize = cudaStreamDestroy

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.memory:
            return self.failed(Status.cudaErrorMemoryAllocation), None
        self.memory -= size
        block = ctypes.create_string_buffer(
            b"\xff" * size, size
        )  # NaN to whoever reads what nobody wrote
        self.blocks[ctypes.addressof(block)] = block
        self.places[ctypes.addressof(block)] = self.device
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        if self.broken:
            return (self.failed(Status.cudaErrorIllegalAddress),)
        self.memory += len(self.blocks.pop(address))
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Any, ...]:
        assert self.places[to if kind == 1 else source] == stream - FIRST_STREAM, (
            "memory of another GPU"
        )
        assert self.capturing is None, "a copy from pageable memory cannot be captured"
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.uploaded += size
            self.course.append("upload")
        else:
            self.downloaded += size
            self.course.append("download")
        ctypes.memmove(to, source, size)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.capturing = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        captured, self.capturing = self.capturing, None
        if captured is None or not self.captures:
            return self.failed(Status.cudaErrorStreamCaptureUnsupported), None
        self.partial += 1
        return Status.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        if not self.instantiates:
            return self.failed(Status.cudaErrorMemoryAllocation), None
        return Status.cudaSuccess, graph

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any, ...]:
        self.launches += 1
        self.course.append("run")
        for work in graph:
            work()
        return (Status.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self.partial -= 1
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = np.float32
    INT64 = np.int64


class Logger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"

    def __init__(self) -> None: ...


class Host(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Tensor:
    def __init__(self, arg: Any) -> None:
        self.name = arg.name
        self.dtype = DataType.FLOAT if arg.type == "tensor(float)" else DataType.INT64
        self.shape = tuple(s if isinstance(s, int) else -1 for s in arg.shape)


def session(file: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])


class Network:
    file: str

    @cached_property
    def session(self) -> Any:
        return session(self.file)

    num_layers = 3
    num_inputs = property(lambda self: len(self.session.get_inputs()))
    num_outputs = property(lambda self: len(self.session.get_outputs()))

    def get_input(self, i: int) -> Tensor:
        return Tensor(self.session.get_inputs()[i])

    def get_output(self, i: int) -> Tensor:
        return Tensor(self.session.get_outputs()[i])


class Parser:
    num_errors = 0

    def __init__(self, network: Network, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, file: str) -> bool:
        self.network.file = file
        return True

    def get_error(self, i: int) -> Any: ...


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.captured = False
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 16 == 0
        self.memory = size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.captured, "a CUDA graph was captured from this context: it must not change"
        low, _, high = self.engine.profile[name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        assert not self.captured, "a CUDA graph was captured from this context: it must not change"
        self.addresses[name] = address

    def view(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        block = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(dtype).itemsize)).from_address(
            self.addresses[name]
        )
        return np.frombuffer(block, dtype).reshape(shape)

    def run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        feeds = {
            t.name: self.view(t.name, shapes[t.name], t.dtype.value) for t in self.engine.inputs
        }
        outputs = self.engine.session.run(None, feeds)
        for tensor, value in zip(self.engine.outputs, outputs, strict=True):
            self.view(tensor.name, value.shape, value.dtype)[...] = value

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        feeds = {t.name: np.zeros(self.shapes[t.name], t.dtype.value) for t in self.engine.inputs}
        for mask in ("attention_mask",):
            if mask in feeds:
                feeds[mask] += 1
        return tuple(self.engine.session.run([name], feeds)[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory >= self.engine.device_memory_size_v2
        if (
            self.engine.cuda.error
        ):  # TensorRT looks for errors of CUDA after a launch, and takes an older one for its own
            return False
        if self.engine.fails or (
            self.engine.fails_in_capture and self.engine.cuda.capturing is not None
        ):
            return False
        shapes, runtime = dict(self.shapes), self.engine.cuda
        assert runtime.device == stream - FIRST_STREAM, "kernels are launched on the current GPU"
        assert {runtime.places[a] for a in self.addresses.values()} == {runtime.device}, (
            "memory of another GPU"
        )
        if runtime.capturing is not None:
            self.captured = True
            runtime.capturing.append(lambda: self.run(shapes))
        else:
            runtime.course.append("run")
            self.run(shapes)
        return True


class Engine:
    device_memory_size_v2 = 4096
    fails = fails_in_capture = False

    def __init__(self, plan: dict[str, Any], cuda: FakeRuntime) -> None:
        self.cuda, self.profile = cuda, plan["profile"]
        self.session = session(plan["file"])
        self.inputs = [Tensor(i) for i in self.session.get_inputs()]
        self.outputs = [Tensor(o) for o in self.session.get_outputs()]
        self.tensors = {t.name: t for t in (*self.inputs, *self.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in {t.name for t in self.inputs} else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_profile_shape(self, name: str, i: int) -> Any:
        return self.profile[name]

    def create_execution_context(self, strategy: Any) -> Context:
        return Context(self)


class Config:
    def __init__(self) -> None:
        self.profile: dict[str, Any] = {}

    def add_optimization_profile(self, profile: Any) -> int:
        self.profile = profile.shapes
        return 0

    def clear_flag(self, flag: Any) -> None: ...


class Builder:
    out_of_memory = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *s: shapes.update({name: s}))

    def build_serialized_network(self, network: Network, config: Config) -> Host | None:
        if self.out_of_memory:
            self.logger.log(Logger.ERROR, "Error Code 2: OutOfMemory (no memory for tactic 0x0)")
            return None
        return Host(
            json.dumps({"file": kept(Path(network.file)), "profile": config.profile}).encode()
        )


KEPT: list[tempfile.TemporaryDirectory[str]] = []


def kept(file: Path) -> str:
    """A copy of a graph and its weights, which a plan holds itself: its bundle may be moved."""
    KEPT.append(tempfile.TemporaryDirectory(prefix="plan-"))
    for source in (file, *file.parent.glob("*.data")):
        shutil.copy(source, KEPT[-1].name)
    return str(Path(KEPT[-1].name, file.name))


def fake_tensorrt(cuda: FakeRuntime) -> Any:
    """A module like `tensorrt`, whose engines run on `cuda`."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            try:
                return Engine(json.loads(plan), cuda)
            except ValueError:
                self.logger.log(Logger.ERROR, "Serialization assertion magicTag failed")
                return None

    return SimpleNamespace(
        __version__="11.0",
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        OnnxParser=Parser,
        ParserError=SimpleNamespace(node_name=1, node_operator=1, desc=1),
        IBuilderConfig=Config,
        ICudaEngine=Engine,
        IExecutionContext=Context,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        BuilderFlag=SimpleNamespace(TF32=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED=1, NONE=0),
        TensorIOMode=Mode,
        ILogger=Logger,
        Builder=Builder,
        Runtime=Runtime,
    )
