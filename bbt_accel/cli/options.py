"""The options of the commands: each is a field of a model, and an argument of the function that the
command calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import Field

from bbt_accel.benchmarks.sweep.grid import preset_names
from bbt_accel.cli.model_options import Fields
from bbt_accel.core.bundle import Method, PromptMode
from bbt_accel.core.engine_specs import (
    DEFAULT_ENGINE,
    ENGINES,
    check_device,
    engine_names,
    engine_spec,
    targets,
)
from bbt_accel.core.optimizations import OPTIMIZATIONS, in_graph
from bbt_accel.core.option_types import (
    BACKBONE,
    FIT_BUDGET,
    FIT_PROMPT_TOKENS,
    JOBS,
    MAX_RMSE,
    METHOD,
    PROMPT_MODE,
    PROMPT_TOKENS,
    Budget,
    Count,
    KShot,
    PromptTokens,
    Seed,
    Threads,
)
from bbt_accel.core.settings import DEFAULTS, Preset, ReadoutChoice, Settings
from bbt_accel.io.reporting import Schema
from bbt_accel.package.manifest import Kind
from bbt_accel.predict.bundle_cache import PrecisionChoice
from bbt_accel.serve.limits import Limits
from bbt_accel.tasks.task import task_names

EXECUTION, SEARCH = "Execution", "Search settings"  # panels of --help


def _check_engine(context: typer.Context, name: str | None) -> str | None:
    if name not in (None, "auto") and not context.resilient_parsing:
        engine_spec(name)
    return name


def _check_device(context: typer.Context, device: str | None) -> str | None:
    return device if device is None or context.resilient_parsing else check_device(device)


_ENGINES = ", ".join(spec.name for spec in ENGINES if not spec.internal)
_TARGETS = ", ".join(spec.name for spec in ENGINES if spec.optimized)
_RUNS = f"Engine that runs the backbone: {_ENGINES}, or a plug-in's"
_WHERE = "Device of the engine: cpu, cuda or cuda:N; trt always uses a GPU"
_WITHOUT = "Optimizations to switch off, comma-separated: "
_ENGINE = typer.Option(callback=_check_engine, autocompletion=engine_names)
_DEVICE = typer.Option(callback=_check_device, metavar="cpu|cuda|cuda:N")
_TARGET = typer.Option(autocompletion=lambda: list(targets()))
_PRESET = typer.Option(autocompletion=preset_names)
_TASK = typer.Option(metavar="TASK", autocompletion=task_names)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle written by export.")]
RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Run folder of fit or tune, saved classifier, or hf://OWNER/NAME."
    ),
]
TASK_PRESETS = (
    "budget",
    "sigma",
    "alpha",
    "loss",
    "demonstrations",
)  # which built-in tasks, or their context, set
SearchSettings = Annotated[dict[str, Any], Fields(Settings, SEARCH, task_presets=TASK_PRESETS)]
SweepSettings = Annotated[
    dict[str, Any], Fields(Settings, SEARCH, exclude=("seed",), task_presets=TASK_PRESETS)
]

Data = Annotated[
    Path | None,
    Field(
        description="File of rows, or folder with train.* and test.* (or validation.*) in jsonl, csv, parquet, ... "
        "(default: the task's dataset)."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS"),
    Field(description="Ray cluster (HOST:PORT or auto) to run on; local starts one."),
]


AllCores = Annotated[Threads | None, Field(description="CPU threads (default: all cores).")]


class ExportOptions(Schema):
    method: Method = Field(default="bbt", description=METHOD)
    prompt_mode: PromptMode = Field(default="add", description=PROMPT_MODE)
    n_prompt_tokens: PromptTokens = PROMPT_TOKENS
    prompt_init: str | None = None
    """Text that the prompt starts from, or a task file with [prompt] init; its length sets
    --n-prompt-tokens.
    """
    revision: str | None = Field(default=None, description="Commit, tag or branch on the hub.")
    without: list[str] = Field(
        default=[], description=_WITHOUT + ", ".join(in_graph(OPTIMIZATIONS))
    )


class OptimizeOptions(Schema):
    fp16: bool = Field(default=False, description="Half precision, for GPUs.")
    bf16: bool = Field(
        default=False, description="bfloat16, for GPUs, and CPUs with AVX512_BF16 or AMX."
    )
    int8: bool = Field(default=False, description="8-bit integers, for CPUs.")
    int4: bool = Field(default=False, description="4-bit weights alone, to save memory.")
    target: Annotated[
        str, _TARGET, Field(description=f"Engine to optimize for: {_TARGETS}, or a plug-in's.")
    ] = DEFAULT_ENGINE
    calibrate: Annotated[str | None, _TASK] = None
    """Task, or run, whose few-shot rows calibrate int8 ranges and TensorRT shape profiles (default:
    shipped texts).
    """
    data: Data = None
    max_rmse: float = MAX_RMSE
    """int8: relative RMSE of the label logits above which matmuls fall back to fp32."""
    compute_capability: Annotated[str | None, typer.Option(metavar="8.9,...")] = None
    """Build TensorRT plans ahead of time for these GPUs, comma-separated (default: this machine's
    GPU).
    """
    threads: AllCores = None


class FitOptions(Schema):
    text: list[str] = Field(description="Column of texts, or several, comma-separated.")
    label: str = Field(description="Column of labels, of any kind.")
    backbone: str = Field(default="demo", description=BACKBONE)
    template: str | None = None
    """How a row is written for the backbone, e.g. "{review} It was {mask} ."."""
    label_words: list[str] = Field(
        default=[],
        description="A word for each label, the labels sorted (default: from the labels).",
    )
    engine: Annotated[str, _ENGINE] = "auto"
    """Engine that runs the backbone; auto for what doctor recommends."""
    precision: PrecisionChoice = "auto"
    """Precision of the backbone; auto for what doctor recommends."""
    method: Method = Field(default="bbt", description=METHOD)
    n_prompt_tokens: PromptTokens = FIT_PROMPT_TOKENS
    readout: ReadoutChoice = Field(default="auto", description="How classes are read, as in tune.")
    budget: Budget = FIT_BUDGET
    k_shot: KShot | None = None
    """Examples per class to search with, and again in the dev set (default: 16, but at most a third
    of a class).
    """
    balanced: bool = Field(
        default=False, description="Treat all classes as equally frequent (default: as in FILE)."
    )
    seed: Seed = DEFAULTS.seed
    threads: AllCores = None
    overwrite: bool = Field(default=False, description="Replace an existing run.")


class TuneOptions(Schema):
    bundle: Path = Field(description="Bundle written by export or optimize.")
    task: Annotated[str, _TASK]
    """Built-in task (sst2, yelpp, agnews, ...) or path of a .toml file."""
    data: Data = None
    output: Annotated[Path | None, typer.Option("-o", "--output")] = None
    """Run folder to create (default: runs/TASK-METHOD-ENGINE-SEED)."""
    preset: Preset | None = None
    """paper: the original program's search, with the verbalizer as readout."""
    resume: bool = Field(
        default=False, description="Continue an interrupted run, or one with a smaller budget."
    )
    overwrite: bool = Field(default=False, description="Replace an existing run.")
    track: list[str] = Field(
        default=[], description="Experiment trackers: tensorboard, mlflow, wandb, trackio."
    )


class SweepOptions(Schema):
    config: Path | None = Field(
        default=None, description="TOML file that defines the sweep; options override it."
    )
    preset: Annotated[
        str | None, _PRESET, Field(description=f"Shipped sweep: {', '.join(preset_names())}.")
    ] = None
    resume: bool = Field(default=False, description="Continue a sweep; finished trials are kept.")


class EvaluateOptions(Schema):
    data: Data = None
    split: Literal["test", "dev"] = Field(
        default="test", description="Rows to score; readouts are fitted on dev."
    )


class PackageOptions(Schema):
    format: Kind = Field(default="onnx", description="What the package is for.")
    int8: bool = Field(
        default=False, description="8-bit integers, also where the run's bundle is in fp32."
    )
    bundle: Path | None = None
    """Another bundle of the same backbone, e.g. as exported or for another target (default: the
    run's).
    """
    run: Path | None = Field(
        default=None, description="With --check: the run, if it is not near the package."
    )
    max_rows: Count | None = Field(
        default=None, description="Rows of each split to compare (default: all)."
    )
    threads: AllCores = None


class PushOptions(Schema):
    private: bool = Field(default=False, description="Create the repository as a private one.")
    without_bundle: bool = Field(
        default=False, description="Upload a run alone; others then need a bundle for it."
    )
    yes: bool = Field(default=False, description="Skip the confirmation.")


class ServeOptions(Schema):
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 for any free one."
    )
    max_request_mib: int = Field(
        default=Limits.request_bytes // 2**20, ge=1, description="Largest request body, in MiB."
    )
    max_batch: int = Field(
        default=Limits.batch, ge=1, description="Maximum rows times candidates per request."
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Maximum tokens per row (default: what the backbone takes); texts are truncated.",
    )
    keep_rows: int = Field(
        default=Limits.cached_batches,
        ge=1,
        description="Batches of rows cached for later requests.",
    )
    timeout: float = Field(
        default=Limits.timeout,
        ge=0.1,
        allow_inf_nan=False,
        description="Seconds until a request times out.",
    )
    keep_alive: float = Field(
        default=Limits.keep_alive,
        ge=1,
        allow_inf_nan=False,
        description="Seconds between two requests until a connection is closed; a proxy must close its own sooner.",
    )


class Execution(Schema):
    """Where and how the backbone is run."""

    engine: Annotated[str | None, _ENGINE] = Field(
        default=None,
        description=f"{_RUNS} (default: the run's, or ort).",
    )
    device: Annotated[str | None, _DEVICE] = Field(
        default=None, description=f"{_WHERE} (default: the run's, or cpu)."
    )
    threads: AllCores = None
    url: str | None = Field(
        default=None, description="Server for --engine remote, e.g. http://127.0.0.1:8000."
    )


class TuneExecution(Execution):
    engine: Annotated[str, _ENGINE] = Field(default=DEFAULT_ENGINE, description=_RUNS)
    device: Annotated[str, _DEVICE] = Field(default="cpu", description=_WHERE)
    without: list[str] = Field(default=[], description=_WITHOUT + ", ".join(OPTIMIZATIONS))
    workers: Count | None = Field(default=None, description="Processes that share each population.")
    ray: Ray = None


class RunExecution(Execution):
    bundle: Path | None = None
    """Another bundle of the same backbone, e.g. in another precision (default: the run's)."""


class CompareExecution(Schema):
    ray: Ray = None
    resume: bool = Field(
        default=False,
        description="Continue a comparison by the same command; keeps finished trials.",
    )


class SweepExecution(Schema):
    jobs: Count | None = Field(default=None, description=JOBS)
    threads: Threads | None = None
    """CPU threads per trial (default: its share of the cores)."""
    ray: Ray = None
