"""ONNX Runtime on an NVIDIA GPU, where arrays stay there and repeated calls become CUDA graphs."""

from __future__ import annotations

import ctypes
import functools
import heapq
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime

from bbt_accel.core.batch import Float32, Int64
from bbt_accel.core.bundle import PROJECT, STATISTICS
from bbt_accel.core.engine_specs import ORT_GRAPHS_SINCE, index_of
from bbt_accel.core.population import Latent, LayerPrompts
from bbt_accel.engines.base import failing
from bbt_accel.engines.cuda import GPU_TOKENS
from bbt_accel.engines.ort import OrtEngine
from bbt_accel.engines.staged import GPU_CALL, Arrays
from bbt_accel.errors import EngineError, first_line
from bbt_accel.io.machine import release
from bbt_accel.io.progress import note

MAX_GRAPHS = 64  # CUDA graphs at most: ONNX Runtime frees them only with the session
DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
Shapes = list[tuple[int, ...]]
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""The library of NVIDIA's driver, which no Python package installs."""


@functools.cache
def find_cuda() -> None:
    """Load CUDA and cuDNN from pip's packages if they are installed; otherwise ONNX Runtime finds
    the system's.

    Raises EngineError without NVIDIA's driver: ONNX Runtime would log it at length and fall back to
    the CPU.
    """
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        why = f"there is no NVIDIA GPU, or no driver for it ({DRIVER})"
        raise EngineError(
            f"--device cuda: {why}; use --device cpu or see bbt-accel doctor"
        ) from None
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):  # it prints what it cannot find
            onnxruntime.preload_dlls()


class Places:
    """Arrays on the device that prompts are written to, at the same addresses each time, as CUDA
    graphs need it.
    """

    def __init__(self) -> None:
        self.known: list[Any] = []
        self.idle: dict[
            tuple[int, ...], list[int]
        ] = {}  # shape → numbers of arrays that nobody reads, a heap

    def take(self, shape: tuple[int, ...], make: Callable[[], Any]) -> Place:
        """The idle array of this shape that was made first, or a new one; idle again when the
        result is collected.
        """
        numbers = self.idle.setdefault(shape, [])
        if not numbers:
            self.known.append(make())
            heapq.heappush(numbers, len(self.known) - 1)
        number = heapq.heappop(numbers)
        place = Place(self.known[number])
        weakref.finalize(place, heapq.heappush, numbers, number).atexit = False
        return place


class Place:
    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass
class Call:
    """A call with fixed addresses of its inputs and outputs, as a CUDA graph needs it."""

    binding: Any
    outputs: list[Any]
    options: Any


class OrtCudaEngine(OrtEngine):
    """Arrays are OrtValues on the device; prompts are copied, or projected, once per generation for
    all buckets.

    CUDA graphs are for bbt, whose one stage has fixed shapes and addresses. In bbtv2 a layer's
    state may be cached while the layer runs again, so its outputs cannot have a fixed address.
    Every session has a stream of its own, so the host waits for each call before the next one, of
    another session, reads its outputs.
    """

    provider: ClassVar[str] = "CUDAExecutionProvider"
    memory_patterns: ClassVar[bool] = True
    memory: ClassVar[str] = "cuda"
    # fp32 matmuls stay in fp32: TF32, the default on GPUs that have it, keeps 10 bits.
    provider_options: ClassVar[dict[str, str]] = {
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    bucket_step = 8
    call_overhead = GPU_CALL
    tokens_per_call = GPU_TOKENS
    on_device = True

    def load(self) -> None:
        self.index = index_of(self.device)
        self.capturing = self.bundle.info.method == "bbt"
        if self.capturing and release(onnxruntime.__version__) < release(ORT_GRAPHS_SINCE):
            self.capturing = False
            note(
                f"no CUDA graphs: onnxruntime-gpu before {ORT_GRAPHS_SINCE} frees memory "
                "that they read; update it"
            )
        if self.bundle.info.method == "bbtv2":
            self.tokens_per_call = (
                2**14
            )  # there are many stages, and each session keeps the memory of its largest call
        self.seen: WeakKeyDictionary[Any, dict[object, Shapes | Call]] = WeakKeyDictionary()
        """Rows → their calls: captured, or the shapes of the outputs of one that came once. Rows
        that are bound for one call, as in `predict`, are worth no graph, and later rows may get
        their addresses."""
        self.places = Places()
        self.called = self.launched = self.captured = 0
        self.held = 0  # graphs in the session
        super().load()
        self.sessions |= {stage: self.open(stage) for stage in (PROJECT, STATISTICS)}

    def check_provider(self) -> None:
        find_cuda()  # a provider that is a plugin is there once its libraries are loaded
        super().check_provider()

    def session(self, stage: str, options: Any, providers: Sequence[Any] = ()) -> Any:
        """With CUDA graphs, or without them if part of the graph cannot run on the device."""
        if self.captures(stage):
            try:
                return super().session(stage, options, self.providers({"enable_cuda_graph": "1"}))
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                if "graph capture" not in str(
                    error
                ):  # a damaged file, a driver that is too old, too little memory
                    raise
                self.capturing = False
                note(f"no CUDA graphs: {first_line(error)}")
        return super().session(stage, options, self.providers({}))

    def captures(self, stage: str) -> bool:
        return self.capturing and stage == "model"

    def providers(self, more: dict[str, str]) -> list[Any]:
        return [(self.provider, {"device_id": str(self.index)} | self.provider_options | more)]

    def call(self, stage: str, given: Arrays, names: list[str]) -> list[Any]:
        self.called += stage == "model"
        if self.captures(stage):
            try:
                if self.held >= MAX_GRAPHS and self.live() <= MAX_GRAPHS // 2:
                    self.reopen(stage)
                return self.replay(self.sessions[stage], given, names)
            except Exception as error:
                note(f"no CUDA graphs from here on, a call failed as one: {first_line(error)}")
            self.stop_capturing(
                stage
            )  # not above, where the error's traceback still holds the session
        return self.once(self.sessions[stage], given, names)

    def stop_capturing(self, stage: str) -> None:
        """Open the session again without CUDA graphs: one whose capture has failed runs nothing
        more.

        Its memory is freed first: the likely cause is that there was too little.
        """
        self.capturing = False
        self.reopen(stage)

    def live(self) -> int:
        """Captured calls of rows that are still bound."""
        return sum(
            isinstance(call, Call) for calls in self.seen.values() for call in calls.values()
        )

    def reopen(self, stage: str) -> None:
        """Free every graph, which ONNX Runtime does with the session alone."""
        self.held = 0
        self.seen.clear()
        self.sessions.pop(stage, None)
        self.sessions[stage] = self.open(stage)

    def once(self, session: Any, given: Arrays, names: list[str], place: Any = None) -> list[Any]:
        """A call whose outputs are new arrays on the device, or whose only output is `place`."""
        inputs = {name: self.on_gpu(value) for name, value in given.items()}
        binding = self.bind_arrays(session, inputs, dict.fromkeys(names, place))
        session.run_with_iobinding(binding, options_for(-1))
        return list(binding.get_outputs())

    def bind_arrays(self, session: Any, inputs: Arrays, outputs: Arrays) -> Any:
        """Arrays on the device as a session takes them; an output that is None becomes a new
        one.
        """
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            if value is None:
                binding.bind_output(name, self.memory, self.index)
            else:
                binding.bind_ortvalue_output(name, value)
        return binding

    def bind_addresses(self, session: Any, inputs: Arrays, outputs: Arrays) -> Any:
        """The same, but the binding holds no input: a graph is launched only with inputs at the
        same addresses.
        """
        binding = self.bind_arrays(session, {}, outputs)
        for name, value in inputs.items():
            dtype, shape = DTYPES[value.data_type()], value.shape()
            binding.bind_input(name, self.memory, self.index, dtype, shape, value.data_ptr())
        return binding

    def replay(self, session: Any, given: Arrays, names: list[str]) -> list[Any]:
        """A call that is captured the second time that it comes with the same arrays."""
        inputs = {name: self.on_gpu(value) for name, value in given.items()}
        key = (*names, *((value.data_ptr(), *value.shape()) for value in inputs.values()))
        calls = self.seen.setdefault(given["input_ids"], {})
        call = calls.get(key)
        if call is None or (not isinstance(call, Call) and self.held >= MAX_GRAPHS):
            found = self.once(session, given, names)
            calls[key] = [tuple(value.shape()) for value in found]
            return found
        if isinstance(call, Call):
            self.launched += 1
        else:
            outputs = [self.new_array(shape) for shape in call]
            binding = self.bind_addresses(session, inputs, dict(zip(names, outputs, strict=True)))
            self.captured, self.held = self.captured + 1, self.held + 1
            call = calls[key] = Call(binding, outputs, options_for(self.captured))
        session.run_with_iobinding(call.binding, call.options)
        return call.outputs

    def new_array(self, shape: tuple[int, ...]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, np.float32, self.memory, self.index
        )

    def on_gpu(self, value: Any) -> Any:
        """A numpy array as an OrtValue on the device; what is there already unchanged."""
        if isinstance(value, np.ndarray):
            return onnxruntime.OrtValue.ortvalue_from_numpy(value, self.memory, self.index)
        return value.value if isinstance(value, Place) else value

    def upload_prompts(self, prompts: LayerPrompts) -> Any:
        """Prompts on the device, for CUDA graphs at an address that they have had before."""
        if not self.capturing:
            return super().upload_prompts(prompts)
        shared = self.upload_projection(prompts.projection) if isinstance(prompts, Latent) else {}
        with failing("ONNX Runtime", "to make prompts on the GPU"):
            place = self.places.take(
                tuple(prompts.shape), lambda: self.new_array(tuple(prompts.shape))
            )
            if isinstance(prompts, Latent):
                self.once(
                    self.sessions[PROJECT], {"z": prompts.z, **shared}, ["prompts"], place.value
                )
            else:
                place.value.update_inplace(np.ascontiguousarray(prompts))
        return place

    def to_device(self, array: Float32 | Int64) -> Any:
        with failing("ONNX Runtime", "to upload an array to the GPU"):
            return self.on_gpu(np.ascontiguousarray(array))

    def to_host(self, array: Any) -> Float32:
        with failing("ONNX Runtime", "to download an array from the GPU"):
            return np.array(array.numpy(), np.float32)

    def versions(self) -> dict[str, str]:
        return super().versions() | {"cuda graphs": "on" if self.capturing else "off"}

    def counts(self) -> dict[str, int]:
        """Of the stage `model`, which alone is captured."""
        if self.bundle.info.method != "bbt":
            return {}
        return {"calls": self.called, "captured": self.captured, "launched": self.launched}

    def close(self) -> None:
        self.places = Places()
        self.seen.clear()
        super().close()


def options_for(graph: int) -> Any:
    """Run options that capture or launch the CUDA graph with this number; -1 is none."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
