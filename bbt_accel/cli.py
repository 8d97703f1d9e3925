"""The command line: one short function per command. Whatever is slow to import is imported inside the commands."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bbt_accel import cli_options as shared
from bbt_accel.benchmarks.options import BenchOptions, bench_options
from bbt_accel.command import INTERRUPTED, exit_on_error
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.model_options import Fields, comma_separated, with_options
from bbt_accel.sweeps.grid import Sweep, preset_names

PREPARE, SEARCH, USE, MEASURE = "Prepare a backbone", "Search", "Use a tuned prompt", "Measure"

app = typer.Typer(
    name="bbt-accel",
    help="Tune soft prompts for frozen language models with forward passes alone, on fast inference engines.",
    epilog="Example: bbt-accel export demo -o bundle && bbt-accel tune --bundle bundle --task demo -o run",
    pretty_exceptions_enable=False,
)


def command(panel: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of its name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(epilog=f"Example: bbt-accel {example}", rich_help_panel=panel)(with_options(function))
        return function

    return register


def _version(wanted: bool) -> None:
    if wanted:
        import bbt_accel

        print(f"bbt-accel {bbt_accel.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings; accepted in any position.")
    ] = False,
) -> None:
    """Options of the program. `main` removes --debug from the line, wherever it is."""


@command(PREPARE, "export roberta-large -o bundles/roberta-large")
def export(
    backbone: Annotated[str, typer.Argument(help="Hub id, checkpoint folder, or demo (shipped with bbt-accel).")],
    output: shared.Output,
    method: Annotated[
        Literal["bbt", "bbtv2"], typer.Option(help="bbt: a prompt at the input; bbtv2: a prompt in every layer.")
    ] = "bbt",
    prompt_mode: Annotated[
        Literal["add", "cat"],
        typer.Option(help="add: added to the embeddings of the first tokens; cat: prepended to the input (bbt only)."),
    ] = "add",
    n_prompt_tokens: Annotated[int, typer.Option(min=1, help="Soft prompt vectors.")] = 50,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    without: shared.WithoutInGraph = "",
    as_json: shared.AsJson = False,
) -> None:
    """Export a backbone to a bundle: ONNX graphs, weights and tokenizer, validated against PyTorch."""
    from bbt_accel.exporters.export import export_bundle
    from bbt_accel.printing import print_bundle
    from bbt_accel.progress import progress_bar

    with progress_bar(f"exporting {backbone}") as tell:
        bundle = export_bundle(
            backbone,
            output,
            method=method,
            prompt_mode=prompt_mode,
            n_prompt_tokens=n_prompt_tokens,
            revision=revision,
            without=comma_separated(without),
            progress=tell,
        )
    print_bundle(bundle, as_json)


@command(PREPARE, "optimize bundles/roberta-large -o bundles/roberta-large-int8 --int8 --calibrate sst2")
def optimize(
    bundle: shared.BundlePath,
    output: shared.Output,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision, for GPUs.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16, for GPUs, and CPUs with AVX512_BF16 or AMX.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers, for CPUs.")] = False,
    target: shared.Target = "ort",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Task whose few-shot rows calibrate int8 ranges and TensorRT shape profiles (default: shipped texts).",
        ),
    ] = None,
    data: shared.Data = None,
    max_rmse: Annotated[
        float, typer.Option(help="int8: relative RMSE of the label logits above which matmuls fall back to fp32.")
    ] = 0.05,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            metavar="8.9,...",
            help="Build TensorRT plans ahead of time for these GPUs, comma-separated (default: this machine's GPU).",
        ),
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Optimize a bundle for an engine: fused operators, lower precision, TensorRT plans."""
    from bbt_accel.exporters.optimize import optimize_bundle
    from bbt_accel.printing import print_bundle
    from bbt_accel.progress import progress_bar

    precision = _precision(fp16, bf16, int8)
    with progress_bar(f"optimizing {bundle}") as tell:
        optimized = optimize_bundle(
            bundle,
            output,
            precision=precision,
            target=target,
            calibrate=calibrate,
            data=data,
            max_rmse=max_rmse,
            compute_capability=compute_capability,
            progress=tell,
        )
    print_bundle(optimized, as_json)


@command(PREPARE, "triton bundles/roberta-large -o models")
def triton(
    bundle: shared.BundlePath,
    repository: Annotated[Path, typer.Option("-o", "--output", help="Model repository, new or with other models.")],
    name: Annotated[str | None, typer.Option(help="Name of the model (default: the bundle's folder).")] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Write a bundle as models of Triton Inference Server."""
    from bbt_accel.bundle import Bundle
    from bbt_accel.exporters.triton import write_repository
    from bbt_accel.printing import print_triton
    from bbt_accel.progress import progress_bar

    with progress_bar(f"writing {repository}"):
        models = write_repository(Bundle.read(bundle), repository, name)
    print_triton(repository, models, as_json)


@command(SEARCH, "tune --bundle bundles/roberta-large --task sst2 --data data/sst2 -o runs/sst2")
def tune(
    bundle: Annotated[Path, typer.Option(help="Bundle written by export or optimize.")],
    task: shared.TaskName,
    settings: shared.SearchSettings,
    data: shared.Data = None,
    engine: shared.EngineName = "ort",
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
    url: shared.Url = None,
    without: shared.Without = "",
    workers: Annotated[int | None, shared.execution("Processes that share each population.", min=1)] = None,
    ray: shared.Ray = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Run folder to create (default: runs/TASK-METHOD-ENGINE-SEED)."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Search for a soft prompt for a task with CMA-ES."""
    from bbt_accel.printing import print_run
    from bbt_accel.tuning import tune as tune_prompt

    run = tune_prompt(
        bundle,
        task,
        data=data,
        engine=engine,
        device=device,
        threads=threads,
        without=comma_separated(without),
        workers=workers,
        ray=ray,
        url=url,
        output=output,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        settings=settings,
        progress=not as_json,
    )
    print_run(run, as_json)
    if run.info.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@command(SEARCH, "sweep --tasks sst2,agnews --bundles bundles/a,bundles/b --seeds 42,43 -o sweep")
def sweep(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the sweep.")],
    grid: Annotated[dict[str, Any], Fields(Sweep, exclude=("method", "needs", "settings"), required=False)],
    settings: shared.SweepSettings,
    config: Annotated[Path | None, typer.Option(help="TOML file that defines the sweep; options override it.")] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Shipped sweep: {', '.join(preset_names())}.", autocompletion=preset_names)
    ] = None,
    jobs: Annotated[
        int | None, shared.execution("Trials at a time (default: 1; with --ray: one per node or GPU).", min=1)
    ] = None,
    threads: Annotated[
        int | None, shared.execution("CPU threads per trial (default: its share of the cores).", min=1)
    ] = None,
    ray: shared.Ray = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a sweep; finished trials are kept.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Tune on several tasks, bundles, engines and seeds, and tabulate the test scores."""
    from bbt_accel.printing import print_sweep
    from bbt_accel.sweeps.runner import run_sweep

    report = run_sweep(
        output,
        config=config,
        preset=preset,
        given={**grid, "settings": settings},
        jobs=jobs,
        threads=threads,
        ray=ray,
        resume=resume,
        progress=not as_json,
    )
    print_sweep(report, output, as_json)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if failed := report.count("failed"):
        raise BbtError(f"{failed} of {len(report.trials)} trials failed; retry them with --resume")
    if report.cross_evaluation is not None and report.cross_evaluation.failures:
        raise BbtError("the cross-evaluation is incomplete; retry it with --resume")


@command(USE, "evaluate runs/sst2 --data data/sst2")
def evaluate(
    run: shared.RunPath,
    data: shared.Data = None,
    split: Annotated[Literal["test", "dev"], typer.Option(help="Rows to score.")] = "test",
    bundle: shared.OtherBundle = None,
    engine: shared.RunEngine = None,
    device: shared.RunDevice = None,
    threads: shared.Threads = None,
    url: shared.Url = None,
    as_json: shared.AsJson = False,
) -> None:
    """Score a tuned prompt on the test rows, and the backbone without a prompt."""
    from bbt_accel.inference import evaluate as evaluate_run
    from bbt_accel.printing import print_score

    score = evaluate_run(
        run, data=data, bundle=bundle, engine=engine, device=device, threads=threads, url=url, split=split
    )
    print_score(score, as_json)


@command(USE, 'predict runs/sst2 "a gripping film"')
def predict(
    run: shared.RunPath,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; the two of a sentence pair separated by a tab.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="File with one text per line (sentence pairs as JSON); - for standard input.")
    ] = None,
    bundle: shared.OtherBundle = None,
    engine: shared.RunEngine = None,
    device: shared.RunDevice = None,
    threads: shared.Threads = None,
    url: shared.Url = None,
    as_json: shared.AsJson = False,
) -> None:
    """Label texts from the command line, a file or standard input."""
    from bbt_accel.inference import predict as predict_run
    from bbt_accel.printing import print_predictions
    from bbt_accel.run import Run
    from bbt_accel.texts import read_texts

    rows = read_texts(texts or [], file, Run.read(run).task.text)
    predictions = predict_run(run, rows, bundle=bundle, engine=engine, device=device, threads=threads, url=url)
    print_predictions(rows, predictions, as_json)


@command(USE, "serve runs/sst2 --port 8000")
def serve(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|RUN", help="Bundle, or run folder written by tune.")],
    engine: shared.ServeEngine = None,
    device: shared.RunDevice = None,
    threads: shared.Threads = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    max_request_mib: Annotated[int, typer.Option(min=1, help="Largest request body, in MiB.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows times candidates per request.")] = 16384,
    keep_rows: Annotated[int, typer.Option(min=1, help="Batches of rows cached for later requests.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request times out.")] = 300.0,
    as_json: shared.AsJson = False,
) -> None:
    """Serve a bundle, or a run's prompt, over HTTP with the Open Inference Protocol."""
    from bbt_accel.printing import print_serving
    from bbt_accel.serving import Limits
    from bbt_accel.serving.server import serve as serve_models

    if engine == "remote":
        raise UsageError("a server cannot use --engine remote; choose the engine that runs the backbone here")
    limits = Limits(max_request_mib * 2**20, max_batch, timeout, keep_rows)
    serve_models(
        path,
        engine=engine,
        device=device,
        threads=threads,
        host=host,
        port=port,
        limits=limits,
        ready=lambda url, models: print_serving(url, models, as_json),
    )


@command(MEASURE, "bench --backbone roberta-large --task sst2 --engines torch,ort --precisions fp32,int8 -o report")
def bench(
    options: Annotated[dict[str, Any], Fields(BenchOptions)], output: shared.Output, as_json: shared.AsJson = False
) -> None:
    """Compare engines and precisions with eager PyTorch: speed, accuracy and memory."""
    from bbt_accel.benchmarks.bench import run_bench
    from bbt_accel.printing import print_bench

    run_bench(bench_options(**options), output, progress=not as_json)
    print_bench(output, as_json)


@command(MEASURE, "doctor --json")
def doctor(as_json: shared.AsJson = False) -> None:
    """Show what this machine can run, what is fastest on it, and what to install for the rest."""
    from bbt_accel.doctor import diagnose
    from bbt_accel.printing import print_diagnosis

    print_diagnosis(diagnose(), as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit with 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted).

    An error is one line on standard error, after its traceback with --debug.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    with _quiet(debug), exit_on_error(debug):
        code = app(args=words or ["--help"], prog_name="bbt-accel", standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silence the libraries' warnings, which address developers."""
    if debug:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _precision(fp16: bool, bf16: bool, int8: bool) -> Literal["fp32", "fp16", "bf16", "int8"]:
    if fp16 + bf16 + int8 > 1:
        raise UsageError("choose one of --fp16, --bf16 and --int8")
    return "fp16" if fp16 else "bf16" if bf16 else "int8" if int8 else "fp32"


if __name__ == "__main__":
    main()
