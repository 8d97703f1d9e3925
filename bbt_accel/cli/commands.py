"""The commands. Whatever is slow to import is imported when a command is executed."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from bbt_accel import __version__
from bbt_accel.benchmarks.options import (
    BenchOptions,
    CompareOptions,
    bench_options,
    compare_options,
)
from bbt_accel.benchmarks.sweep.grid import Sweep as SweepGrid
from bbt_accel.benchmarks.sweep.grid import preset_names
from bbt_accel.cli import options, printing
from bbt_accel.cli.base import COMMANDS, HEADER, Command, Settable, app, command
from bbt_accel.cli.doctor import diagnose
from bbt_accel.cli.options import LIST, apart, option_of
from bbt_accel.core.bundle import Method, PromptMode
from bbt_accel.core.engine_specs import Precision, engine_spec
from bbt_accel.core.optimizations import OPTIMIZATIONS
from bbt_accel.core.option_types import (
    BACKBONE,
    FIT_BUDGET,
    FIT_PROMPT_TOKENS,
    MAX_RMSE,
    METHOD,
    PROMPT_MODE,
    PROMPT_TOKENS,
    KShot,
    PromptTokens,
    Seed,
    Threads,
)
from bbt_accel.core.settings import DEFAULTS, Loss, Preset, ReadoutChoice, Settings
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io.command import INTERRUPTED, exit_on_error, print_table
from bbt_accel.io.progress import progress_bar
from bbt_accel.io.reporting import Schema
from bbt_accel.package.manifest import Kind
from bbt_accel.predict.bundle_cache import PrecisionChoice
from bbt_accel.serve.limits import Limits

PREPARE, TUNE, USE, MEASURE = "Prepare a backbone", "Search", "Use a tuned prompt", "Measure"
option, flag = partial(typer.Option, None), partial(typer.Option, False)
setting = partial(option_of, Settings, rich_help_panel="Search settings")


@command(PREPARE, "export roberta-large -o bundles/roberta-large")
class Export(Command):
    """Export a backbone to a bundle: ONNX graphs, weights and tokenizer, validated against
    PyTorch.
    """

    backbone: str = typer.Argument(..., help=BACKBONE)
    output: options.Output
    method: Method | None = option("--method", help=f"{METHOD} (default: bbt)")
    prompt_mode: PromptMode | None = option("--prompt-mode", help=PROMPT_MODE)
    n_prompt_tokens: int | None = option(
        "--n-prompt-tokens",
        min=1,
        max=2**16,
        help=f"Soft prompt vectors, n (default: {PROMPT_TOKENS}).",
    )
    prompt_init: str | None = option(
        "--prompt-init",
        help="Text that the prompt starts from, or a task file with \\[prompt] init; its "
        "length sets --n-prompt-tokens.",
    )
    revision: str | None = option("--revision", help="Commit, tag or branch on the hub.")

    def execute(self) -> None:
        from bbt_accel.exporters.trace.export import export_bundle

        names = ("method", "prompt_mode", "n_prompt_tokens", "prompt_init", "revision")
        with progress_bar(f"exporting {self.backbone}") as tell:
            bundle = export_bundle(
                self.backbone, self.output, on_progress=tell, **self.given(*names)
            )
        printing.print_bundle(bundle, self.as_json)


class OptimizeSettings(Schema):
    """Settings of optimize without an option."""

    max_rmse: float = Field(
        default=MAX_RMSE,
        ge=0,
        description="int8: relative RMSE of the label logits above which matmuls fall back to fp32",
    )
    threads: Threads | None = None


@command(
    PREPARE, "optimize bundles/roberta-large -o bundles/roberta-large-int8 --int8 --calibrate sst2"
)
class Optimize(Settable):
    """Optimize a bundle for an engine: fused operators, lower precision, TensorRT plans."""

    model = OptimizeSettings
    bundle: options.BundlePath
    output: options.Output
    fp16: bool = flag("--fp16", help="Half precision, for GPUs.")
    bf16: bool = flag("--bf16", help="bfloat16, for GPUs, and CPUs with AVX512_BF16 or AMX.")
    int8: bool = flag("--int8", help="8-bit integers, for CPUs.")
    int4: bool = flag("--int4", help="4-bit weights alone, to save memory.")
    target: options.Target = None
    calibrate: str | None = option(
        "--calibrate",
        metavar="TASK",
        help="Task, or run, whose few-shot rows calibrate int8 ranges and TensorRT shape "
        "profiles (default: shipped texts).",
    )
    data: options.Data = None
    compute_capability: str | None = option(
        "--compute-capability",
        metavar="8.9,...",
        help="Build TensorRT plans ahead of time for these GPUs, comma-separated (default: "
        "this machine's GPU).",
    )

    def execute(self) -> None:
        from bbt_accel.exporters.convert.optimize import optimize_bundle
        from bbt_accel.search.calibration import calibrate_on

        precisions = [name for name in get_args(Precision) if getattr(self, name, False)]
        if len(precisions) > 1:
            raise UsageError("choose one of --fp16, --bf16, --int8 and --int4")
        settings = self.settings()
        with progress_bar(f"optimizing {self.bundle}") as tell:
            bundle = optimize_bundle(
                self.bundle,
                self.output,
                precision=precisions[0] if precisions else "fp32",
                calibration=calibrate_on(self.calibrate, self.data),
                on_progress=tell,
                **self.given("target", "compute_capability"),
                **settings,
            )
        printing.print_bundle(bundle, self.as_json)


class FitSettings(Schema):
    """Settings of fit without an option."""

    method: Method = Field(default="bbt", description=METHOD)
    n_prompt_tokens: PromptTokens = FIT_PROMPT_TOKENS
    readout: ReadoutChoice = Field(default="auto", description="How classes are read, as in tune.")
    k_shot: KShot | None = None
    """Examples per class to search with, and again in the dev set (unless given 16, but at most a
    third of a class).
    """
    balanced: bool = False
    """Treat all classes as equally frequent, rather than as in FILE."""
    seed: Seed = DEFAULTS.seed
    threads: Threads | None = None


@command(TUNE, "fit reviews.csv --text review --label sentiment -o run")
class Fit(Settable):
    """Build a classifier from one file of labelled texts, and score it on the rows that the search
    does not use.
    """

    model = FitSettings
    file: Path = typer.Argument(
        ..., help="Labelled texts: CSV, TSV, JSON, JSON lines, Parquet or Excel."
    )
    text: Sequence[str] = typer.Option(..., "--text", **LIST, help="Column of texts, or several.")
    label: str = typer.Option(..., "--label", help="Column of labels, of any kind.")
    output: options.Output
    backbone: options.Backbone = "demo"
    template: str | None = option(
        "--template", help='How a row is written, e.g. "{review} It was {mask} .".'
    )
    label_words: Sequence[str] | None = option(
        "--label-words",
        **LIST,
        help="A word for each label, sorted by label (default: the labels).",
    )
    engine: options.Engine = None
    precision: PrecisionChoice | None = option(
        "--precision", help="auto (the default): what doctor recommends."
    )
    budget: int | None = option(
        "--budget", min=1, help=f"Calls of the search (default: {FIT_BUDGET})."
    )
    overwrite: options.Overwrite = False

    def execute(self) -> None:
        from bbt_accel.predict.fit import fit_file

        names = ("text", "label", "backbone", "template", "label_words", "engine")
        found = fit_file(
            self.file,
            self.output,
            announce=(lambda _: None) if self.as_json else printing.print_plan,
            progress=not self.as_json,
            **self.given(*names, "precision", "budget", "overwrite"),
            **self.settings(),
        )
        printing.print_fitted(found, self.as_json)
        if found.run.info.status == "interrupted":
            raise KeyboardInterrupt


class TuneSettings(Settings, frozen=True):
    """All settings of a search, and how the backbone is run, where that has no option."""

    threads: Threads | None = None
    without: list[str] = Field(
        default=[], description=f"Optimizations to switch off: {', '.join(OPTIMIZATIONS)}."
    )
    track: list[str] = Field(
        default=[], description="Experiment trackers: tensorboard, mlflow, wandb, trackio."
    )


@command(TUNE, "tune --bundle bundles/roberta-large --task sst2 --data data/sst2 -o runs/sst2")
class Tune(Settable):
    """Fit a readout for a task, and search for a soft prompt with CMA-ES."""

    model = TuneSettings
    bundle: Path = typer.Option(..., "--bundle", help="Bundle written by export or optimize.")
    task: options.Task
    data: options.Data = None
    output: Path | None = option(
        "-o", "--output", help="Run folder to create (default: runs/TASK-METHOD-ENGINE-SEED)."
    )
    preset: Preset | None = option(
        "--preset", help="paper: the original program's search, with the verbalizer as readout."
    )
    resume: options.Resume = False
    overwrite: options.Overwrite = False
    k_shot: int | None = setting("--k-shot")
    intrinsic_dim: int | None = setting("--intrinsic-dim")
    popsize: int | None = setting("--popsize")
    budget: int | None = setting("--budget")
    sigma: float | None = setting("--sigma")
    alpha: float | None = setting("--alpha")
    bound: float | None = setting("--bound")
    loss: Loss | None = setting("--loss")
    eval_every: int | None = setting("--eval-every")
    seed: int | None = setting("--seed")
    readout: ReadoutChoice | None = setting("--readout")
    engine: options.Engine = None
    device: options.Device = None
    url: options.Url = None
    workers: int | None = option("--workers", min=1, help="Processes that share each population.")
    ray: options.Ray = None

    def execute(self) -> None:
        from bbt_accel.search.tune import tune

        settings, others = apart(self.settings())
        run = tune(
            settings=settings,
            progress=not self.as_json,
            **self.given("bundle", "task", "data", "output", "preset", "resume", "overwrite"),
            **self.given("engine", "device", "url", "workers", "ray"),
            **others,
        )
        printing.print_run(run, self.as_json)
        if run.info.status == "interrupted":
            raise KeyboardInterrupt


class SweepSettings(Settings, frozen=True):
    """Settings of every search of a sweep, and of the sweep where they have no option."""

    cross_evaluate: bool = Field(
        default=False,
        description="Also score every prompt in each bundle that takes it, and compare them.",
    )
    threads: Threads | None = None


@command(TUNE, "sweep --tasks sst2,agnews --bundles bundles/a,bundles/b --seeds 42,43 -o sweep")
class Sweep(Settable):
    """Tune on several tasks, bundles, engines and seeds, and tabulate the test scores."""

    model = SweepSettings
    output: options.Output
    tasks: Sequence[str] | None = option_of(SweepGrid, "--tasks")
    bundles: Sequence[str] | None = option_of(SweepGrid, "--bundles")
    engines: options.Engines = None
    seeds: Sequence[str] | None = option_of(SweepGrid, "--seeds")
    device: options.Device = None
    data: options.DataFolders = None
    config: Path | None = option("--config", help="TOML file of the sweep; options override it.")
    preset: str | None = option(
        "--preset",
        autocompletion=preset_names,
        help=f"Shipped sweep: {', '.join(preset_names())}.",
    )
    resume: options.Resume = False
    jobs: options.Jobs = None
    ray: options.Ray = None

    @classmethod
    def without_option(cls) -> list[str]:
        return [key for key in super().without_option() if key != "seed"]  # --seeds

    def execute(self) -> None:
        from bbt_accel.benchmarks.sweep.runner import run_sweep

        settings, others = apart(self.settings())
        grid = self.given("tasks", "bundles", "engines", "seeds", "device")
        if self.data is not None:
            grid["data"] = str(self.data)
        grid["cross_evaluate"] = others.pop("cross_evaluate", None)
        report = run_sweep(
            self.output,
            given={**grid, "settings": settings},
            progress=not self.as_json,
            **self.given("config", "preset", "resume", "jobs", "ray"),
            **others,
        )
        printing.print_sweep(report, self.output, self.as_json)
        if report.interrupted:
            raise KeyboardInterrupt
        if failed := report.count("failed"):
            problem = f"{failed} of {len(report.trials)} trials failed"
            raise BbtError(f"{problem}; retry them with --resume")
        if report.cross_evaluation is not None and report.cross_evaluation.failures:
            raise BbtError("the cross-evaluation is incomplete; retry it with --resume")


@dataclass(kw_only=True)
class OnEngine(Command):
    """A command that runs a backbone as its run did, or elsewhere."""

    engine: options.Engine = None
    device: options.Device = None
    bundle: options.OtherBundle = None

    def place(self) -> dict[str, Any]:
        return self.given("engine", "device", "bundle")


@command(USE, "evaluate runs/sst2 --data data/sst2")
class Evaluate(OnEngine):
    """Score a tuned prompt on the test rows, and the backbone without a prompt."""

    run: options.RunPath
    data: options.Data = None
    threads: options.Threads = None
    url: options.Url = None

    def execute(self) -> None:
        from bbt_accel.predict.inference import evaluate

        score = evaluate(self.run, **self.given("data", "threads", "url"), **self.place())
        printing.print_score(score, self.as_json)


@command(USE, 'predict runs/sst2 "a gripping film"')
class Predict(OnEngine):
    """Label texts from the command line, a file or standard input."""

    run: options.RunPath
    texts: list[str] | None = typer.Argument(
        None, metavar="TEXT", help="Texts; the two of a sentence pair separated by a tab."
    )
    file: Path | None = option(
        "--file",
        help="File of texts or JSON objects, one per line, or a table (.csv, .parquet); - for "
        "standard input.",
    )
    threads: options.Threads = None
    url: options.Url = None

    def execute(self) -> None:
        from bbt_accel.predict.inference import predict_texts
        from bbt_accel.predict.texts import read_texts
        from bbt_accel.search.run import Run

        rows = read_texts(self.texts or [], self.file, Run.read(self.run).task.text)
        found = predict_texts(self.run, rows, **self.given("threads", "url"), **self.place())
        printing.print_predictions(rows, found, self.as_json)


@command(USE, "package runs/sst2 -o packages/sst2")
class Package(Command):
    """Package a run as a self-contained model that other tools load, compared with predict."""

    path: Path = typer.Argument(
        ..., metavar="RUN|PACKAGE", help="Run folder; with --check a package."
    )
    output: Path | None = option("-o", "--output", help="Folder to create.")
    check: bool = flag("--check", help="Verify a package, and compare it again.")
    format: Kind | None = option("--format", help="What the package is for (default: onnx).")
    int8: bool | None = option("--int8", help="8-bit integers, also for a run in fp32.")
    bundle: options.OtherBundle = None
    run: Path | None = option("--run", help="With --check: the run, if it is not near the package.")
    max_rows: int | None = option(
        "--max-rows", min=1, help="Rows of each split to compare (default: all)."
    )
    threads: options.Threads = None

    def execute(self) -> None:
        from bbt_accel.package.package import Options, check_package, package_run

        if self.check == (self.output is not None):
            raise UsageError("give -o DIR to package a run, or --check to verify a package")
        if self.run is not None and not self.check:
            raise UsageError("--run is for --check; a run to package is the argument")
        fixed = self.given("format", "int8", "max_rows")
        if self.check and fixed:
            name = next(iter(fixed)).replace("_", "-")
            raise UsageError(f"--{name} cannot be used with --check; the package fixes it")
        with progress_bar(f"{'checking' if self.check else 'packaging'} {self.path}") as tell:
            if self.output is None:
                info = check_package(self.path, self.threads, tell, self.run, self.bundle)
            else:
                wanted = Options(**fixed, **self.given("bundle", "threads"))
                info = package_run(self.path, self.output, wanted, tell)
        printing.print_package(self.output or self.path, info.model_dump(mode="json"), self.as_json)


@command(USE, "push runs/sst2 OWNER/NAME")
class Push(Command):
    """Upload a run with its bundle, or a package, to the Hugging Face hub, with its model card."""

    path: Path = typer.Argument(
        ..., metavar="RUN|PACKAGE", help="Run folder, package, or saved classifier."
    )
    repository: str = typer.Argument(
        ..., metavar="OWNER/NAME", help="Repository of the hub, new or existing."
    )
    private: bool = flag("--private", help="Create the repository as a private one.")
    without_bundle: bool = flag(
        "--without-bundle", help="Upload a run alone; others then need a bundle for it."
    )
    yes: bool = flag("--yes", help="Skip the confirmation.")

    def execute(self) -> None:
        from bbt_accel.package.push import is_package, push

        if not self.yes and not (sys.stdin is not None and sys.stdin.isatty()):
            raise UsageError(f"push uploads {self.path} to {self.repository}; confirm with --yes")
        question = f"Upload {self.path} to {self.repository}, replacing its contents?"
        try:
            confirmed = self.yes or typer.confirm(question)
        except typer.Abort:  # Ctrl-C at the question
            raise KeyboardInterrupt from None
        if not confirmed:
            raise typer.Exit(1)
        options = {"with_bundle": not self.without_bundle, "private": self.private}
        commit = push(self.path, self.repository, **options)
        kind = "package" if is_package(self.path) else "run"
        printing.print_pushed(self.repository, commit, kind, self.as_json)


@pydantic_dataclass(frozen=True)
class ServeSettings(Limits):
    """The limits of a server, and how the backbone is run."""

    threads: Threads | None = None


@command(USE, "serve runs/sst2 --port 8000")
class Serve(OnEngine, Settable):
    """Serve a bundle, or a run's prompt, over HTTP with the Open Inference Protocol."""

    model = ServeSettings
    path: Path = typer.Argument(
        ..., metavar="BUNDLE|RUN", help="Bundle, or run folder written by tune."
    )
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on.")
    port: int = typer.Option(
        8000, "--port", min=0, max=65535, help="Port to listen on; 0 for any free one."
    )

    def execute(self) -> None:
        from bbt_accel.serve.server import serve

        if self.engine is not None and engine_spec(self.engine).remote:
            problem = f"a server cannot use --engine {self.engine}"
            raise UsageError(f"{problem}; choose the engine that runs the backbone here")
        ready = partial(printing.print_serving, as_json=self.as_json)
        limits = self.settings()
        threads = limits.pop("threads", None)
        serve(
            self.path,
            limits=Limits(**limits),
            ready=ready,
            threads=threads,
            **self.given("host", "port"),
            **self.place(),
        )


@command(
    MEASURE,
    "bench --backbone roberta-large --task sst2 --engines ort,openvino --precisions fp32,int8 "
    "-o report",
)
class Bench(Settable):
    """Compare engines and precisions with eager PyTorch: speed, accuracy and memory."""

    model = BenchOptions
    backbone: options.Backbone
    task: options.Task
    output: options.Output
    data: options.Data = None
    engines: options.Engines = None
    precisions: Sequence[str] | None = option_of(BenchOptions, "--precisions")
    device: options.Device = None
    tune: bool | None = option_of(BenchOptions, "--tune")
    ablate: bool | None = option_of(BenchOptions, "--ablate")

    def execute(self) -> None:
        from bbt_accel.benchmarks.bench import run_bench

        run_bench(bench_options(**self.settings()), self.output, progress=not self.as_json)
        printing.print_bench(self.output, self.as_json)


@command(MEASURE, "compare agnews sst2 --data data -o comparison")
class Compare(Settable):
    """Compare accuracy per forward pass: readouts, searches, and training by gradients."""

    model = CompareOptions
    tasks: list[str] = typer.Argument(
        ..., metavar="TASK...", help="Built-in tasks, or paths of .toml files."
    )
    output: options.Output
    backbone: options.Backbone = "demo"
    data: options.DataFolders = None
    contenders: Sequence[str] | None = option_of(CompareOptions, "--contenders")
    budgets: Sequence[str] | None = option_of(CompareOptions, "--budgets")
    seeds: Sequence[str] | None = option_of(CompareOptions, "--seeds")
    resume: options.Resume = False
    jobs: options.Jobs = None
    ray: options.Ray = None

    def execute(self) -> None:
        from bbt_accel.benchmarks.compare import run_compare

        report = run_compare(
            self.tasks,
            self.output,
            compare_options(**self.settings()),
            progress=not self.as_json,
            **self.given("resume", "ray"),
        )
        printing.print_bench(self.output, self.as_json)
        if report.failures:
            problem = f"trials that failed: {len(report.failures)}"
            raise BbtError(f"{problem}; repeat the command with --resume")


@command(MEASURE, "doctor")
class Doctor(Command):
    """Show what this machine can run, what is fastest on it, and what to install for the rest."""

    def execute(self) -> None:
        printing.print_diagnosis(diagnose(), self.as_json)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bbt-accel {__version__}")
        raise typer.Exit


ANYWHERE = ("--debug", "--json", "--help-settings")
"""Options of the program that may also stand behind the command."""


@app.callback()
def program(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print JSON instead of a table; in any position."
    ),
    help_settings: bool = typer.Option(
        False, "--help-settings", help="List a command's settings for --set; in any position."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks and the libraries' warnings; in any position."
    ),
) -> None:
    """Options of the program."""
    if help_settings:
        made = COMMANDS[context.invoked_subcommand or ""]
        if not issubclass(made, Settable):
            raise UsageError(f"{context.invoked_subcommand} has no settings; see --help")
        print_table("Settings, each by --set KEY=VALUE", made.table(), HEADER)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit with 0 (done), 1 (failed), 2 (wrong usage) or 130
    (interrupted).

    An error is one line on standard error, after its traceback with --debug.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    words[:end] = sorted(words[:end], key=lambda word: word not in ANYWHERE)
    debug = "--debug" in words[:end]
    if isinstance(sys.stdout, TextIOWrapper):  # a character that the terminal lacks is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    # The libraries' warnings address developers.
    logging.disable(logging.NOTSET if debug else logging.WARNING)
    try:
        with warnings.catch_warnings(action=None if debug else "ignore"), exit_on_error(debug):
            code = app(args=words or ["--help"], prog_name="bbt-accel", standalone_mode=False) or 0
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            sys.exit(code)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
