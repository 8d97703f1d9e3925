"""The command line: one short function per command. Whatever is slow to import is imported inside
the commands.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from bbt_accel import __version__
from bbt_accel.benchmarks.options import (
    BenchOptions,
    CompareOptions,
    bench_options,
    compare_options,
    read_options,
)
from bbt_accel.benchmarks.sweep.grid import Sweep
from bbt_accel.cli import options as shared
from bbt_accel.cli import printing
from bbt_accel.cli.model_options import Fields, with_options
from bbt_accel.core.doctor import diagnose
from bbt_accel.core.engine_specs import Precision, engine_spec
from bbt_accel.core.option_types import BACKBONE
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io.command import INTERRUPTED, exit_on_error
from bbt_accel.io.progress import progress_bar

Options = dict[str, Any]
PREPARE, SEARCH, USE, MEASURE = "Prepare a backbone", "Search", "Use a tuned prompt", "Measure"

app = typer.Typer(
    name="bbt-accel",
    help="Tune soft prompts for frozen language models with forward passes alone, on fast inference engines.",
    epilog="Example: bbt-accel export demo -o bundle && bbt-accel tune --bundle bundle --task demo -o run",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def command(panel: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(epilog=f"Example: bbt-accel {example}", rich_help_panel=panel)(
            with_options(function)
        )
        return function

    return register


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bbt-accel {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks and the libraries' warnings, in any position."
    ),
) -> None:
    """Options of the program. `main` removes --debug from the line, wherever it is."""


@command(PREPARE, "export roberta-large -o bundles/roberta-large")
def export(
    backbone: Annotated[str, typer.Argument(help=BACKBONE)],
    output: shared.Output,
    options: Annotated[Options, Fields(shared.ExportOptions)],
    as_json: shared.AsJson = False,
) -> None:
    """Export a backbone to a bundle: ONNX graphs, weights and tokenizer, validated against
    PyTorch.
    """
    from bbt_accel.exporters.trace.export import export_bundle

    with progress_bar(f"exporting {backbone}") as tell:
        bundle = export_bundle(backbone, output, on_progress=tell, **options)
    printing.print_bundle(bundle, as_json)


@command(
    PREPARE, "optimize bundles/roberta-large -o bundles/roberta-large-int8 --int8 --calibrate sst2"
)
def optimize(
    bundle: shared.BundlePath,
    output: shared.Output,
    options: Annotated[Options, Fields(shared.OptimizeOptions)],
    as_json: shared.AsJson = False,
) -> None:
    """Optimize a bundle for an engine: fused operators, lower precision, TensorRT plans."""
    from bbt_accel.exporters.convert.optimize import optimize_bundle
    from bbt_accel.search.calibration import calibrate_on

    precisions = [name for name in get_args(Precision) if options.pop(name, False)] or ["fp32"]
    if len(precisions) > 1:
        raise UsageError("choose one of --fp16, --bf16, --int8 and --int4")
    with progress_bar(f"optimizing {bundle}") as tell:
        calibration = calibrate_on(options.pop("calibrate", None), options.pop("data", None))
        optimized = optimize_bundle(
            bundle,
            output,
            precision=precisions[0],
            calibration=calibration,
            on_progress=tell,
            **options,
        )
    printing.print_bundle(optimized, as_json)


@command(PREPARE, "triton bundles/roberta-large -o models")
def triton(
    bundle: shared.BundlePath,
    repository: Annotated[
        Path, typer.Option("-o", "--output", help="Model repository, new or with other models.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: the bundle's folder).")
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Write a bundle as models of Triton Inference Server."""
    from bbt_accel.core.bundle import Bundle
    from bbt_accel.exporters.convert.triton import write_repository

    with progress_bar(f"writing {repository}"):
        models = write_repository(Bundle.read(bundle), repository, name)
    printing.print_triton(repository, models, as_json)


@command(SEARCH, "fit reviews.csv --text review --label sentiment -o run")
def fit(
    file: Annotated[
        Path,
        typer.Argument(help="CSV, TSV, JSON, JSON lines, Parquet or Excel file of labelled texts."),
    ],
    options: Annotated[Options, Fields(shared.FitOptions)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder to create.")],
    as_json: shared.AsJson = False,
) -> None:
    """Build a classifier from one file of labelled texts, and score it on the rows that the search
    does not use.
    """
    from bbt_accel.predict.fit import fit_file

    announce = (lambda _: None) if as_json else printing.print_plan
    found = fit_file(file, output, **options, announce=announce, progress=not as_json)
    printing.print_fitted(found, as_json)
    if found.run.info.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@command(SEARCH, "tune --bundle bundles/roberta-large --task sst2 --data data/sst2 -o runs/sst2")
def tune(
    options: Annotated[Options, Fields(shared.TuneOptions)],
    settings: shared.SearchSettings,
    execution: Annotated[Options, Fields(shared.TuneExecution, shared.EXECUTION)],
    as_json: shared.AsJson = False,
) -> None:
    """Fit a readout for a task, and search for a soft prompt with CMA-ES."""
    from bbt_accel.search.tune import tune as tune_prompt

    run = tune_prompt(**options, **execution, settings=settings, progress=not as_json)
    printing.print_run(run, as_json)
    if run.info.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@command(SEARCH, "sweep --tasks sst2,agnews --bundles bundles/a,bundles/b --seeds 42,43 -o sweep")
def sweep(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the sweep.")],
    grid: Annotated[
        Options, Fields(Sweep, exclude=("method", "needs", "settings"), required=False)
    ],
    options: Annotated[Options, Fields(shared.SweepOptions)],
    settings: shared.SweepSettings,
    execution: Annotated[Options, Fields(shared.SweepExecution, shared.EXECUTION)],
    as_json: shared.AsJson = False,
) -> None:
    """Tune on several tasks, bundles, engines and seeds, and tabulate the test scores."""
    from bbt_accel.benchmarks.sweep.runner import run_sweep

    report = run_sweep(
        output, given={**grid, "settings": settings}, progress=not as_json, **options, **execution
    )
    printing.print_sweep(report, output, as_json)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if failed := report.count("failed"):
        raise BbtError(f"{failed} of {len(report.trials)} trials failed; retry them with --resume")
    if report.cross_evaluation is not None and report.cross_evaluation.failures:
        raise BbtError("the cross-evaluation is incomplete; retry it with --resume")


@command(USE, "evaluate runs/sst2 --data data/sst2")
def evaluate(
    run: shared.RunPath,
    options: Annotated[Options, Fields(shared.EvaluateOptions)],
    execution: Annotated[Options, Fields(shared.RunExecution, shared.EXECUTION)],
    as_json: shared.AsJson = False,
) -> None:
    """Score a tuned prompt on the test rows, and the backbone without a prompt."""
    from bbt_accel.predict.inference import evaluate as evaluate_run

    printing.print_score(evaluate_run(run, **options, **execution), as_json)


@command(USE, 'predict runs/sst2 "a gripping film"')
def predict(
    run: shared.RunPath,
    execution: Annotated[Options, Fields(shared.RunExecution, shared.EXECUTION)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Texts; the two of a sentence pair separated by a tab."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="File of texts or JSON objects, one per line, or a table (.csv, .parquet); - for standard input."
        ),
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Label texts from the command line, a file or standard input."""
    from bbt_accel.predict.inference import predict as predict_run
    from bbt_accel.predict.texts import read_texts
    from bbt_accel.search.run import Run

    rows = read_texts(texts or [], file, Run.read(run).task.text)
    printing.print_predictions(rows, predict_run(run, rows, **execution), as_json)


@command(USE, "package runs/sst2 -o packages/sst2")
def package(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|PACKAGE", help="Run folder; with --check a package.")
    ],
    options: Annotated[Options, Fields(shared.PackageOptions)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to create.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify a package, and compare it again.")
    ] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Package a run as a self-contained model that other tools load, compared with predict."""
    from bbt_accel.package.package import Options as PackageOptions
    from bbt_accel.package.package import check_package, package_run

    if check == (output is not None):
        raise UsageError("give -o DIR to package a run, or --check to verify a package")
    run = options.pop("run", None)
    if run is not None and not check:
        raise UsageError("--run is for --check; a run to package is the argument")
    if check and (own := [name for name in options if name not in ("threads", "bundle")]):
        raise UsageError(
            f"--{own[0].replace('_', '-')} cannot be used with --check; the package fixes it"
        )
    with progress_bar(f"{'checking' if check else 'packaging'} {path}") as tell:
        if output is None:
            info = check_package(path, options.get("threads"), tell, run, options.get("bundle"))
        else:
            info = package_run(path, output, PackageOptions(**options), tell)
    printing.print_package(output or path, info.model_dump(mode="json"), as_json)


@command(USE, "push runs/sst2 OWNER/NAME")
def push(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN|PACKAGE", help="Run folder, package, or saved classifier."),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub, new or existing.")
    ],
    options: Annotated[Options, Fields(shared.PushOptions)],
    as_json: shared.AsJson = False,
) -> None:
    """Upload a run with its bundle, or a package, to the Hugging Face hub, with its model card."""
    from bbt_accel.package import push as sharing

    yes, interactive = options.pop("yes", False), sys.stdin is not None and sys.stdin.isatty()
    if not yes and not interactive:
        raise UsageError(f"push uploads {path} to {repository}; confirm with --yes")
    try:
        confirmed = yes or typer.confirm(f"Upload {path} to {repository}, replacing its contents?")
    except typer.Abort:  # Ctrl-C at the question
        raise KeyboardInterrupt from None
    if not confirmed:
        raise typer.Exit(1)
    commit = sharing.push(
        path, repository, with_bundle=not options.pop("without_bundle", False), **options
    )
    printing.print_pushed(
        repository, commit, "package" if sharing.is_package(path) else "run", as_json
    )


@command(USE, "serve runs/sst2 --port 8000")
def serve(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE|RUN", help="Bundle, or run folder written by tune.")
    ],
    options: Annotated[Options, Fields(shared.ServeOptions)],
    execution: Annotated[Options, Fields(shared.RunExecution, shared.EXECUTION, exclude=("url",))],
    as_json: shared.AsJson = False,
) -> None:
    """Serve a bundle, or a run's prompt, over HTTP with the Open Inference Protocol."""
    from bbt_accel.serve.limits import Limits
    from bbt_accel.serve.server import serve as serve_models

    if (engine := execution.get("engine")) and engine_spec(engine).remote:
        raise UsageError(
            f"a server cannot use --engine {engine}; choose the engine that runs the backbone here"
        )
    o = read_options(shared.ServeOptions, options)
    limits = Limits(
        request_bytes=o.max_request_mib * 2**20,
        batch=o.max_batch,
        row_tokens=o.max_tokens,
        timeout=o.timeout,
        cached_batches=o.keep_rows,
        keep_alive=o.keep_alive,
    )
    ready = partial(printing.print_serving, as_json=as_json)
    serve_models(path, host=o.host, port=o.port, limits=limits, ready=ready, **execution)


@command(
    MEASURE,
    "bench --backbone roberta-large --task sst2 --engines ort,openvino --precisions fp32,int8 -o report",
)
def bench(
    options: Annotated[Options, Fields(BenchOptions)],
    output: shared.Output,
    as_json: shared.AsJson = False,
) -> None:
    """Compare engines and precisions with eager PyTorch: speed, accuracy and memory."""
    from bbt_accel.benchmarks.bench import run_bench

    run_bench(bench_options(**options), output, progress=not as_json)
    printing.print_bench(output, as_json)


@command(MEASURE, "compare agnews sst2 --data data -o comparison")
def compare(
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help="Built-in tasks, or paths of .toml files."),
    ],
    options: Annotated[Options, Fields(CompareOptions)],
    execution: Annotated[Options, Fields(shared.CompareExecution)],
    output: shared.Output,
    as_json: shared.AsJson = False,
) -> None:
    """Compare accuracy per forward pass: readouts, searches, and training by gradients."""
    from bbt_accel.benchmarks.compare import run_compare

    report = run_compare(
        tasks, output, compare_options(**options), progress=not as_json, **execution
    )
    printing.print_bench(output, as_json)
    if report.failures:
        raise BbtError(
            f"trials that failed: {len(report.failures)}; repeat the command with --resume"
        )


@command(MEASURE, "doctor --json")
def doctor(as_json: shared.AsJson = False) -> None:
    """Show what this machine can run, what is fastest on it, and what to install for the rest."""
    printing.print_diagnosis(diagnose(), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit with 0 (done), 1 (failed), 2 (wrong usage) or 130
    (interrupted).

    An error is one line on standard error, after its traceback with --debug.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a character that the terminal lacks is no failure
    logging.disable(
        logging.NOTSET if debug else logging.WARNING
    )  # the libraries' warnings address developers
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
