"""Black-Box Tuning of frozen language models on ONNX Runtime, OpenVINO, TensorRT or PyTorch.

Everything public is importable from here and loaded on first use: `import bbt_accel` loads neither
torch nor a runtime.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the one list of what is public: `_homes` reads it
    from bbt_accel.core.batch import Batch as Batch
    from bbt_accel.core.bundle import Bundle as Bundle
    from bbt_accel.core.logits import class_logits as class_logits
    from bbt_accel.core.objective import Objective as Objective
    from bbt_accel.core.population import Population as Population
    from bbt_accel.core.projection import Projection as Projection
    from bbt_accel.engines.base import BoundBatch as BoundBatch
    from bbt_accel.engines.base import Engine as Engine
    from bbt_accel.engines.registry import load_engine as load_engine
    from bbt_accel.errors import BbtError as BbtError
    from bbt_accel.errors import BundleError as BundleError
    from bbt_accel.errors import DataError as DataError
    from bbt_accel.errors import EngineError as EngineError
    from bbt_accel.errors import ExportError as ExportError
    from bbt_accel.errors import HubError as HubError
    from bbt_accel.errors import MissingDependency as MissingDependency
    from bbt_accel.errors import NonFiniteLoss as NonFiniteLoss
    from bbt_accel.errors import PackageError as PackageError
    from bbt_accel.errors import RunError as RunError
    from bbt_accel.errors import TaskError as TaskError
    from bbt_accel.errors import UsageError as UsageError
    from bbt_accel.exporters.convert.optimize import optimize_bundle as optimize_bundle
    from bbt_accel.exporters.trace.export import export_bundle as export_bundle
    from bbt_accel.predict.classifier import PromptClassifier as PromptClassifier
    from bbt_accel.predict.inference import evaluate as evaluate
    from bbt_accel.predict.inference import predict_texts as predict_texts
    from bbt_accel.search.callbacks import Callback as Callback
    from bbt_accel.search.history import Generation as Generation
    from bbt_accel.search.run import Run as Run
    from bbt_accel.search.run import RunInfo as RunInfo
    from bbt_accel.search.tune import tune as tune
    from bbt_accel.tasks.data import Row as Row
    from bbt_accel.tasks.data import load_rows as load_rows
    from bbt_accel.tasks.encoding import Encoder as Encoder
    from bbt_accel.tasks.splits import few_shot as few_shot
    from bbt_accel.tasks.task import Task as Task
    from bbt_accel.tasks.task import load_task as load_task

__version__ = "0.2.0"

# Libraries that report their use to their makers. They read this when they are imported, in every
# process.
os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # else ONNX Runtime also writes a device id and a database
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO takes it as not installed


def _homes() -> dict[str, str]:
    """Public name → its module, from the imports above."""
    nodes = ast.walk(ast.parse(inspect.getsource(sys.modules[__name__])))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.name: node.module or "" for node in imports for name in node.names if name.asname}


_HOMES = _homes()
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bbt_accel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
