"""TensorRT's Python API under whichever name it is installed, distinguished by its features, not
its version.

`tensorrt` (10.12 and later, 11) builds plans for this machine's GPU. `tensorrt_rtx` (TensorRT for
RTX) also builds them ahead of time, for the compute capability of another machine, and compiles
kernels when they first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bbt_accel.errors import MissingDependency, PlanError, UsageError, first_line

MODULES = ("tensorrt", "tensorrt_rtx")
NEEDED = {  # class → its attributes that the builder and the engine use
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("parse_from_file", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "IBuilderConfig": ("add_optimization_profile", "clear_flag"),
    "ICudaEngine": ("create_execution_context", "device_memory_size_v2", "get_tensor_name"),
    "IExecutionContext": (
        "execute_async_v3",
        "set_input_shape",
        "set_tensor_address",
        "set_device_memory",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
}


@dataclass(frozen=True)
class Api:
    """An importable TensorRT and what it can do."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return f"{self.name} {getattr(self.module, '__version__', 'of unknown version')}"

    def has(self, cls: str, *names: str) -> bool:
        return all(hasattr(getattr(self.module, cls, None), name) for name in names)

    @property
    def builds_ahead(self) -> bool:
        """Whether plans can be built for a compute capability, without its GPU."""
        return self.has("IBuilderConfig", "set_compute_capability", "num_compute_capabilities")

    @property
    def caches_kernels(self) -> bool:
        """Whether kernels are compiled when they first run, and can be cached."""
        return self.has("IRuntimeConfig", "create_runtime_cache", "set_runtime_cache")

    def capabilities(self) -> list[str]:
        """Compute capabilities to build ahead for, as NVIDIA writes them: 8.9 and the like; may be
        empty.
        """
        names = vars(self.module.ComputeCapability) if self.builds_ahead else ()
        numbers = sorted(
            int(name[2:]) for name in names if name.startswith("SM") and name[2:].isdigit()
        )
        return [f"{number // 10}.{number % 10}" for number in numbers]

    def check_gpu(self, name: str, capability: str) -> None:
        """Raises PlanError for a GPU without plans: TensorRT for RTX has none for those of data
        centres.
        """
        if self.builds_ahead and capability not in self.capabilities():
            found = f"{name} (compute capability {capability})"
            raise PlanError(f"{self.name} does not support {found}: pip install tensorrt")

    def capability(self, text: str) -> Any:
        """8.9 → ComputeCapability.SM89. Raises UsageError for one that this TensorRT does not
        support.
        """
        if text not in self.capabilities():
            known = ", ".join(self.capabilities()) or "none"
            raise UsageError(
                f"{self.version} cannot build for --compute-capability {text}; choose from {known}"
            )
        return getattr(self.module.ComputeCapability, f"SM{text.replace('.', '')}")


def find_api(ahead: bool = False) -> Api:
    """The installed TensorRT: `tensorrt` before `tensorrt_rtx`; with `ahead` the first that builds
    ahead of time.

    Raises MissingDependency when there is none, PlanError when the installed one is too old or
    broken.
    """
    found = []
    for name in MODULES:
        try:
            found.append(Api(name, import_module(name)))
        except ModuleNotFoundError:
            continue
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # the bindings without their libraries
            raise PlanError(
                f"{name} is installed but cannot be loaded ({first_line(error)}); reinstall it"
            ) from None
    if not found:
        raise MissingDependency('TensorRT is not installed: pip install "bbt-accel[trt]"')
    api = next((api for api in found if api.builds_ahead or not ahead), None)
    if api is None:
        why = "--compute-capability needs TensorRT for RTX, which builds without a GPU"
        raise MissingDependency(f'{why}: pip install "bbt-accel[trt]"')
    missing = [
        f"{cls}.{name}" for cls, names in NEEDED.items() for name in names if not api.has(cls, name)
    ]
    if missing:
        raise PlanError(
            f"{api.version} has no {missing[0]}; bbt-accel needs TensorRT 10.12 or later"
        )
    return api


def new_logger(api: Api) -> Any:
    """A logger for TensorRT that prints nothing: it collects errors in its list `errors`, and what
    is said of a plan's layers in `layers`.
    """

    class Logger(api.module.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            api.module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if "LayerType: " in message:
                self.layers.append(message)
            if severity in (api.module.ILogger.ERROR, api.module.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Logger()


def start(api: Api, name: str, logger: Any) -> Any:
    """TensorRT's `Builder` or `Runtime`. Raises PlanError when it cannot start, as without a
    suitable driver.
    """
    try:
        return getattr(api.module, name)(logger)
    except TypeError:  # from pybind11, for a factory that returns a null pointer
        raise PlanError(f"{api.version} cannot start ({reason(logger.errors)})") from None


def reason(errors: list[str]) -> str:
    """TensorRT's first error, and what it means where that is known."""
    first = errors[0] if errors else "TensorRT gave no reason"
    logged = " ".join(errors).lower()
    if "out of memory" in logged or "outofmemory" in logged or "memory allocation" in logged:
        hint = "use a smaller backbone, or --calibrate a task with shorter rows"
        return f"out of memory: {first:.200}; {hint}"
    if "driver version is insufficient" in logged or "no cuda-capable device" in logged:
        return "there is no NVIDIA GPU, or its driver is too old; see bbt-accel doctor"
    return f"{first:.300}"
