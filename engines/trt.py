"""TensorRT on an NVIDIA GPU."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bbt_accel.core.batch import Batch, Float32, Int64
from bbt_accel.core.bundle import PROJECT
from bbt_accel.core.engine_specs import index_of
from bbt_accel.engines.captured import RESERVE, CapturedCalls
from bbt_accel.engines.cuda import Cuda, DeviceArray
from bbt_accel.engines.plan_building import each_plan
from bbt_accel.engines.plans import STEP, keys, profile_of
from bbt_accel.engines.staged import GPU_CALL, Arrays, StagedBoundBatch, StagedEngine
from bbt_accel.engines.trt_api import Api, find_api, new_logger, reason, start
from bbt_accel.errors import EngineError, PlanError
from bbt_accel.io.files import write_atomically
from bbt_accel.io.manifests import PLANS
from bbt_accel.io.progress import note, progress_bar

log = logging.getLogger(__name__)
DTYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
}
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Plan:
    """A stage's TensorRT engine, with the execution context for calls outside CUDA graphs."""

    engine: Any
    context: Any
    inputs: list[str]
    outputs: dict[str, type[np.generic]]  # name → dtype
    shapes: dict[Shapes, list[tuple[int, ...]]] = field(
        default_factory=dict
    )  # of the inputs → of the outputs


class TrtEngine(StagedEngine):
    """A bundle's TensorRT plans; a plan that does not fit this machine is rebuilt, and the reason
    printed.

    All contexts share one scratch buffer, because calls follow each other on one stream. A call
    that comes a second time with the same shapes and addresses is captured as a CUDA graph, and
    launched as such from then on.
    """

    bucket_step = STEP
    call_overhead = GPU_CALL
    on_device = True

    def load(self) -> None:
        super().load()
        self.limit(profile_of(self.bundle))
        self.api: Api = find_api()
        self.cuda = Cuda(index_of(self.device))
        self.calls = CapturedCalls(self.cuda)
        self.cuda.forget = self.calls.clear
        self.logger = new_logger(self.api)
        self.plans: dict[str, Plan] = {}
        self.capturing, self.warned, self.called = True, False, 0
        try:
            self.load_plans()
        except BaseException:
            self.close()
            raise

    def load_plans(self) -> None:
        gpu = self.cuda.gpu
        wanted = keys(self.bundle, self.api, gpu.name, (gpu.capability,), gpu.driver)
        self.kernels = (
            self.bundle.path / PLANS / next(iter(wanted.values())).folder / "kernels.cache"
        )
        self.cuda.open()
        self.runtime = start(self.api, "Runtime", self.logger)
        self.cache: Any = None
        engines = {}
        with progress_bar("TensorRT") as tell:
            for stage, plan in each_plan(self.bundle, wanted, self.api, note, tell):
                engines[stage] = self.deserialize(stage, plan)
        self.scratch = self.cuda.empty(
            (max(int(e.device_memory_size_v2) for e in engines.values()),), np.uint8
        )
        self.plans = {stage: self.prepare(engine) for stage, engine in engines.items()}

    def deserialize(self, stage: str, plan: bytes) -> Any:
        """TensorRT gives None for a plan that it cannot load, and raises nothing."""
        self.logger.errors.clear()
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            why, folder = reason(self.logger.errors), self.bundle.path / PLANS
            raise PlanError(
                f"TensorRT cannot load the plan of {stage} ({why}); remove {folder} to rebuild it"
            )
        return engine

    def prepare(self, engine: Any) -> Plan:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [
            name
            for name in names
            if engine.get_tensor_mode(name) == self.api.module.TensorIOMode.INPUT
        ]
        types = {
            name: str(engine.get_tensor_dtype(name)).rpartition(".")[2]
            for name in names
            if name not in inputs
        }
        outputs = {name: DTYPES[dtype] for name, dtype in types.items()}
        return Plan(engine, self.new_context(engine), inputs, outputs)

    def new_context(self, engine: Any) -> Any:
        trt = self.api.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.logger.errors.clear()
        if self.api.caches_kernels:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self.kernel_cache(config))
            # Kernels for the current shapes are compiled at the first call, not in the background
            # of a CUDA graph.
            if self.api.has("DynamicShapesKernelSpecializationStrategy", "EAGER"):
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
        context = engine.create_execution_context(config if self.api.caches_kernels else strategy)
        if context is None:
            raise EngineError(
                f"TensorRT cannot make an execution context ({reason(self.logger.errors)})"
            )
        context.set_device_memory(self.scratch.address, self.scratch.nbytes)
        context.nvtx_verbosity = (
            trt.ProfilingVerbosity.NONE
        )  # a plan is built with details for its inspector
        return context

    def kernel_cache(self, config: Any) -> Any:
        """TensorRT for RTX compiles kernels at their first run; all stages share one cache of them
        on disk.
        """
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            with suppress(OSError):
                if not self.cache.deserialize(self.kernels.read_bytes()):
                    log.info(
                        "%s is from another machine or version; kernels are recompiled",
                        self.kernels,
                    )
        return self.cache

    def bind(self, batch: Batch) -> StagedBoundBatch:
        longest = int(batch.attention_mask.sum(axis=1).max())
        if (
            self.longest < longest <= self.bundle.info.max_length
        ):  # no profile would take longer ones
            raise EngineError(
                f"a row of {longest} tokens is longer than the {self.longest} of the profile of "
                f"{self.bundle.path}; optimize again, with --calibrate and the task of these rows"
            )
        return super().bind(batch)

    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        self.cuda.enter()
        plan, self.called = self.plans[stage], self.called + 1
        given: list[DeviceArray] = [inputs[name] for name in plan.inputs]
        shapes = tuple(array.shape for array in given)
        if shapes not in plan.shapes:
            plan.shapes[shapes] = self.output_shapes(stage, plan, shapes)
        found = list(map(self.cuda.empty, plan.shapes[shapes], plan.outputs.values()))
        call = (stage, shapes, *(array.address for array in (*given, *found)))
        if not self.capturing or not (
            self.calls.launch(call) or self.record(call, stage, plan, given, found)
        ):
            self.enqueue(stage, plan, plan.context, given, found)
        return dict(zip(plan.outputs, found, strict=True))

    def record(
        self,
        call: object,
        stage: str,
        plan: Plan,
        given: list[DeviceArray],
        found: list[DeviceArray],
    ) -> bool:
        """Run a call and capture it if it is worth that, from a context of its own: a captured one
        must not be changed.

        False where that was not done; with a warning the first time that the call cannot be
        captured, or there is no memory for it.
        """
        if not self.calls.worth_capturing(call):
            if self.calls.short:
                self.warn(f"less than {RESERVE // 2**20} MiB of the GPU's memory is free")
            return False
        context = None
        try:
            context = self.new_context(plan.engine)
            # A context allocates at its first call, which a capture would not allow.
            self.enqueue(stage, plan, context, given, found)
            if not getattr(context, "is_stream_capturable", lambda stream: True)(
                int(self.cuda.stream)
            ):
                raise EngineError(f"{stage} cannot be captured")
            self.cuda.synchronize()
            self.calls.add(call, self.cuda.capture(lambda: self.execute(stage, context)), context)
        except EngineError as error:
            self.calls.failures[call] += 1
            self.warn(str(error))
            self.cuda.synchronize()  # before the context is freed, whose kernels may still run
            return False
        return True

    def warn(self, why: str) -> None:
        """Say once why not every call becomes a CUDA graph."""
        if not self.warned:
            note(f"not every call becomes a CUDA graph: {why}")
        self.warned = True

    def output_shapes(self, stage: str, plan: Plan, shapes: Shapes) -> list[tuple[int, ...]]:
        for name, shape in zip(plan.inputs, shapes, strict=True):
            if not plan.context.set_input_shape(name, shape):
                low, _, high = plan.engine.get_tensor_profile_shape(name, 0)
                hint = (
                    "with --calibrate and the task of these rows"
                    if stage != PROJECT
                    else "or lower --intrinsic-dim"
                )
                profile = f"the shape profile of {stage}, {tuple(low)} to {tuple(high)}"
                raise EngineError(
                    f"{name} of shape {shape} is outside {profile}; optimize again, {hint}"
                )
        return [tuple(plan.context.get_tensor_shape(name)) for name in plan.outputs]

    def enqueue(
        self,
        stage: str,
        plan: Plan,
        context: Any,
        given: list[DeviceArray],
        found: list[DeviceArray],
    ) -> None:
        """Run a context, after setting the shapes of its inputs and the addresses of inputs and
        outputs.
        """
        for name, array in zip(plan.inputs, given, strict=True):
            context.set_input_shape(name, array.shape)
        for name, array in zip((*plan.inputs, *plan.outputs), (*given, *found), strict=True):
            context.set_tensor_address(name, array.address)
        self.execute(stage, context)

    def execute(self, stage: str, context: Any) -> None:
        self.logger.errors.clear()
        if not context.execute_async_v3(int(self.cuda.stream)):
            raise EngineError(f"TensorRT failed in {stage} ({reason(self.logger.errors)})")

    def to_device(self, array: Float32 | Int64) -> DeviceArray:
        return self.cuda.upload(array)

    def overwrite(self, array: DeviceArray | None, prompts: Float32) -> DeviceArray:
        return self.cuda.upload(prompts, array)

    def to_host(self, array: DeviceArray) -> Float32:
        return np.asarray(self.cuda.download(array), np.float32)

    def versions(self) -> dict[str, str]:
        gpu = self.cuda.gpu
        return {
            self.api.name: self.api.version.partition(" ")[2],
            "device": f"{gpu.name}, compute capability {gpu.capability}",
            "driver": gpu.driver,
            "cuda graphs": "off" if self.warned and not self.calls.captured else "on",
        }

    def counts(self) -> dict[str, int]:
        return {
            "calls": self.called,
            "captured": self.calls.captured,
            "launched": self.calls.launched,
        }

    def close(self) -> None:
        if (
            self.plans
            and self.cache is not None
            and (kernels := self.cache.serialize()) is not None
        ):
            with suppress(OSError):
                self.kernels.parent.mkdir(
                    parents=True, exist_ok=True
                )  # plans built ahead have another folder
                write_atomically(self.kernels, bytes(kernels))
        super().close()
        with suppress(EngineError):  # as in `Cuda.close`
            self.cuda.enter()
            if self.plans:
                self.cuda.synchronize()  # before contexts are dropped, whose kernels may still run
        with suppress(EngineError):
            self.calls.clear()
        self.plans = {}
        vars(self).pop("runtime", None)
        self.cuda.close()
