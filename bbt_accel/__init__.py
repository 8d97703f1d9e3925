"""Black-Box Tuning of frozen language models on ONNX Runtime, OpenVINO, TensorRT or PyTorch.

Everything public is importable from here and loaded on first use: `import bbt_accel` loads neither torch nor a runtime.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbt_accel.batch import Batch as Batch
    from bbt_accel.bundle import Bundle as Bundle
    from bbt_accel.classifier import PromptClassifier as PromptClassifier
    from bbt_accel.data import Row as Row
    from bbt_accel.data import load_rows as load_rows
    from bbt_accel.encoding import Encoder as Encoder
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
    from bbt_accel.exporters.export import export_bundle as export_bundle
    from bbt_accel.exporters.optimize import optimize_bundle as optimize_bundle
    from bbt_accel.history import Generation as Generation
    from bbt_accel.inference import evaluate as evaluate
    from bbt_accel.inference import predict as predict
    from bbt_accel.logits import class_logits as class_logits
    from bbt_accel.objective import Objective as Objective
    from bbt_accel.population import Population as Population
    from bbt_accel.projection import Projection as Projection
    from bbt_accel.run import Run as Run
    from bbt_accel.run import RunInfo as RunInfo
    from bbt_accel.splits import few_shot as few_shot
    from bbt_accel.tasks import Task as Task
    from bbt_accel.tasks import load_task as load_task
    from bbt_accel.tuning import tune as tune
    from bbt_accel.tuning.callbacks import Callback as Callback

__version__ = "0.2.0"

# Libraries that report their use to their makers. They read this when they are imported, in every process.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else ONNX Runtime also writes a device id and a database
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO takes it as not installed

_HOME = {
    "Batch": "batch",
    "BbtError": "errors",
    "BoundBatch": "engines.base",
    "Bundle": "bundle",
    "BundleError": "errors",
    "Callback": "tuning.callbacks",
    "DataError": "errors",
    "Encoder": "encoding",
    "Engine": "engines.base",
    "EngineError": "errors",
    "ExportError": "errors",
    "Generation": "history",
    "HubError": "errors",
    "MissingDependency": "errors",
    "NonFiniteLoss": "errors",
    "Objective": "objective",
    "PackageError": "errors",
    "Population": "population",
    "Projection": "projection",
    "PromptClassifier": "classifier",
    "Row": "data",
    "Run": "run",
    "RunError": "errors",
    "RunInfo": "run",
    "Task": "tasks",
    "TaskError": "errors",
    "UsageError": "errors",
    "class_logits": "logits",
    "evaluate": "inference",
    "export_bundle": "exporters.export",
    "few_shot": "splits",
    "load_engine": "engines.registry",
    "load_rows": "data",
    "load_task": "tasks",
    "optimize_bundle": "exporters.optimize",
    "predict": "inference",
    "tune": "tuning",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'bbt_accel' has no attribute {name!r}")
    return getattr(import_module(f"bbt_accel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
