"""The command line: one short function a command. What is heavy is imported inside the commands."""

from __future__ import annotations

import errno
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bbt_accel.errors import BbtError, UsageError

INTERRUPTED = 130
EXTRAS = {
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "torch", "transformers"), "export"),
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "ray": "ray",
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("cuda", "tensorrt", "tensorrt_rtx"), "trt"),
    "tensorboard": "tensorboard",
}
"""What a command may lack, and the extra that brings it."""
Engine = Literal["torch", "ort", "openvino", "trt"]
AnyEngine = Literal["torch", "ort", "openvino", "trt", "remote"]
Device = Literal["cpu", "cuda"]

app = typer.Typer(
    name="bbt-accel",
    help="Tune soft prompts of frozen language models by forward passes alone, on fast inference engines.",
    epilog="Example: bbt-accel export demo -o bundle && bbt-accel tune --bundle bundle --task demo -o run",
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[Path | None, typer.Option(help="Folder with {train,validation,test}.{jsonl,csv,parquet}.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The new folder.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run that tune has written.")]
TaskName = Annotated[str, typer.Option(help="A built-in task (sst2, yelpp, agnews, ...) or a .toml file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; those of the machine unless given.")]
Without = Annotated[str, typer.Option(metavar="NAMES", help="Savings to switch off, with commas between.")]
OtherBundle = Annotated[Path | None, typer.Option(help="Another bundle of the backbone; that of the run unless given.")]
KShot = Annotated[int | None, typer.Option(help="Rows a class, for train and for dev. (default: 16)")]
IntrinsicDim = Annotated[int | None, typer.Option(help="Dimension of the search. (default: 500)")]
Popsize = Annotated[int | None, typer.Option(help="Candidates a generation. (default: 20)")]
Budget = Annotated[int | None, typer.Option(help="Candidates in all. (default: the task's, or 8000)")]
Sigma = Annotated[float | None, typer.Option(help="Step size at the start. (default: the task's, or 1)")]
Alpha = Annotated[float | None, typer.Option(help="Scale of the projection. (default: the task's, or 1)")]
Bound = Annotated[float | None, typer.Option(help="Keep z in a box of this half width. (default: none)")]
LossName = Annotated[
    Literal["ce", "hinge", "perf"] | None, typer.Option(help="What is minimised. (default: the task's, or ce)")
]
EvalEvery = Annotated[int | None, typer.Option(help="Candidates between dev scores. (default: 100)")]
RandomProj = Annotated[
    Literal["normal", "uniform"] | None, typer.Option(help="Entries of the projection. (default: normal)")
]
Ray = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster, or local.")]
Url = Annotated[str | None, typer.Option(help="The server of --engine remote, e.g. http://127.0.0.1:8000.")]
RunEngine = Annotated[AnyEngine | None, typer.Option(help="The engine; that of the run unless given.")]
RunDevice = Annotated[Device | None, typer.Option(help="The device; that of the run unless given.")]


def _version(wanted: bool) -> None:
    if wanted:
        import bbt_accel

        print(f"bbt-accel {bbt_accel.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")] = False,
) -> None:
    """Options of all commands. `main` takes --debug out before, so that it may stand anywhere."""


@app.command(epilog="Example: bbt-accel export roberta-large -o bundles/roberta-large")
def export(
    backbone: Annotated[str, typer.Argument(help="A hub id, a local folder, demo (shipped); or a bundle, for Triton.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The new folder; none for a bundle.")] = None,
    method: Annotated[Literal["bbt", "bbtv2"], typer.Option(help="bbtv2 has a prompt in every layer.")] = "bbt",
    prompt_mode: Annotated[Literal["add", "cat"], typer.Option(help="Add to, or put before, the input.")] = "add",
    n_prompt_tokens: Annotated[int, typer.Option(min=1, help="Soft prompt vectors.")] = 50,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    triton_repository: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write models for Triton Inference Server there, too.")
    ] = None,
    without: Without = "",
    as_json: AsJson = False,
) -> None:
    """Export a backbone to a bundle: ONNX graphs, weights, tokenizer. A bundle itself goes to a Triton repository."""
    from bbt_accel.display import busy
    from bbt_accel.reports import report_bundle

    if output is not None:
        from bbt_accel.exporters.export import export_bundle

        with busy(f"exporting {backbone}") as tell:
            bundle = export_bundle(
                backbone,
                output,
                method=method,
                prompt_mode=prompt_mode,
                n_prompt_tokens=n_prompt_tokens,
                revision=revision,
                without=_names(without),
                progress=tell,
            )
    else:
        from bbt_accel.exporters.triton import exported_bundle

        bundle = exported_bundle(backbone, triton_repository)
    models: list[str] = []
    if triton_repository is not None:
        from bbt_accel.exporters.triton import write_repository

        with busy(f"writing {triton_repository}"):
            models = write_repository(bundle, triton_repository)
    report_bundle(bundle, as_json, models)


@app.command(epilog="Example: bbt-accel optimize bundles/roberta-large -o bundles/roberta-large-int8 --int8")
def optimize(
    bundle: Annotated[Path, typer.Argument(help="A bundle that export has written.")],
    output: Output,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision, for GPUs.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers, for CPUs.")] = False,
    target: Annotated[Literal["ort", "openvino", "trt"], typer.Option(help="The engine to optimize for.")] = "ort",
    calibrate: Annotated[
        str | None, typer.Option(metavar="TASK", help="Task whose few-shot rows set int8 ranges and TensorRT profiles.")
    ] = None,
    data: Data = None,
    max_noise: Annotated[
        float, typer.Option(metavar="SHARE", help="int8: keep products in fp32 until the logits' error is no larger.")
    ] = 0.05,
    compute_capability: Annotated[
        str | None, typer.Option(metavar="8.9", help="Build TensorRT plans for another machine's GPU, without one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Optimize a bundle for an engine: fused operators, lower precision, a TensorRT plan."""
    from bbt_accel.display import busy
    from bbt_accel.exporters.optimize import optimize_bundle
    from bbt_accel.reports import report_bundle

    precision = _precision(fp16, bf16, int8)
    with busy(f"optimizing {bundle}") as tell:
        optimized = optimize_bundle(
            bundle,
            output,
            precision=precision,
            target=target,
            calibrate=calibrate,
            data=data,
            max_noise=max_noise,
            compute_capability=compute_capability,
            progress=tell,
        )
    report_bundle(optimized, as_json)


@app.command(epilog="Example: bbt-accel tune --bundle bundles/roberta-large --task sst2 --engine ort -o runs/sst2")
def tune(
    bundle: Annotated[Path, typer.Option(help="A bundle that export or optimize has written.")],
    task: TaskName,
    data: Data = None,
    engine: Annotated[AnyEngine, typer.Option(help="What runs the backbone.")] = "ort",
    url: Url = None,
    device: Annotated[Device, typer.Option(help="Where it runs.")] = "cpu",
    threads: Threads = None,
    k_shot: KShot = None,
    intrinsic_dim: IntrinsicDim = None,
    popsize: Popsize = None,
    budget: Budget = None,
    sigma: Sigma = None,
    alpha: Alpha = None,
    bound: Bound = None,
    loss: LossName = None,
    eval_every: EvalEvery = None,
    seed: Annotated[int | None, typer.Option(help="Of rows, projection and search. (default: 42)")] = None,
    random_proj: RandomProj = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The run's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of that name.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    without: Without = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that share each population.")] = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Search a soft prompt for a task by CMA-ES."""
    from bbt_accel.reports import report_run
    from bbt_accel.tuning import tune as tune_prompt

    settings = _given(
        k_shot=k_shot,
        intrinsic_dim=intrinsic_dim,
        popsize=popsize,
        budget=budget,
        sigma=sigma,
        alpha=alpha,
        bound=bound,
        loss=loss,
        eval_every=eval_every,
        seed=seed,
        random_proj=random_proj,
    )
    run = tune_prompt(
        bundle,
        task,
        data=data,
        engine=engine,
        device=device,
        threads=threads,
        without=_names(without),
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
    report_run(run, as_json)
    if run.info.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Example: bbt-accel sweep --bundle bundle --task demo --seed 42 --seed 43 -o sweep")
def sweep(
    output: Annotated[Path, typer.Option("-o", "--output", help="The sweep's folder.")],
    config: Annotated[Path | None, typer.Option(help="A .toml file that says what to run.")] = None,
    preset: Annotated[Literal["paper", "paper-v2"] | None, typer.Option(help="One that is shipped, instead.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; may stand more than once, as the next three.")] = None,
    bundle: Annotated[list[Path] | None, typer.Option(help="A bundle.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="An engine. (default: ort)")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of rows, projection and search. (default: 42)")] = None,
    device: Annotated[Device | None, typer.Option(help="Where all run. (default: cpu)")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with a folder of rows for each task.")] = None,
    k_shot: KShot = None,
    intrinsic_dim: IntrinsicDim = None,
    popsize: Popsize = None,
    budget: Budget = None,
    sigma: Sigma = None,
    alpha: Alpha = None,
    bound: Bound = None,
    loss: LossName = None,
    eval_every: EvalEvery = None,
    random_proj: RandomProj = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time. (default: 1; --ray: one a node or GPU)")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads a trial. (default: its share)")] = None,
    ray: Ray = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on: what is done is not run again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tune on many tasks, bundles, engines and seeds; one table of test scores."""
    from bbt_accel.reports import report_sweep
    from bbt_accel.sweeps import run_sweep

    settings = _given(
        k_shot=k_shot,
        intrinsic_dim=intrinsic_dim,
        popsize=popsize,
        budget=budget,
        sigma=sigma,
        alpha=alpha,
        bound=bound,
        loss=loss,
        eval_every=eval_every,
        random_proj=random_proj,
    )
    report = run_sweep(
        output,
        config=config,
        preset=preset,
        given={
            "tasks": task,
            "bundles": [str(path) for path in bundle or []],
            "engines": engine,
            "seeds": seed,
            "device": device,
            "data": None if data is None else str(data),
            "settings": settings,
        },
        jobs=jobs,
        threads=threads,
        ray=ray,
        resume=resume,
        progress=not as_json,
    )
    report_sweep(report, output, as_json)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if failed := report.count("failed"):
        raise BbtError(f"{failed} of {len(report.trials)} trials failed; --resume tries them again")


@app.command(epilog="Example: bbt-accel evaluate runs/sst2 --data data/sst2")
def evaluate(
    run: RunPath,
    data: Data = None,
    bundle: OtherBundle = None,
    engine: RunEngine = None,
    url: Url = None,
    device: RunDevice = None,
    threads: Threads = None,
    split: Annotated[Literal["test", "dev"], typer.Option(help="Rows to score on.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Score a tuned prompt, and the backbone without it, on the test rows."""
    from bbt_accel.inference import evaluate as evaluate_run
    from bbt_accel.reports import report_score

    score = evaluate_run(
        run, data=data, bundle=bundle, engine=engine, device=device, threads=threads, url=url, split=split
    )
    report_score(score, as_json)


@app.command(epilog='Example: bbt-accel predict runs/sst2 "a gripping film"')
def predict(
    run: RunPath,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; those of a sentence pair with a tab between.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A text (for pairs: JSON) a line; - is standard input.")] = None,
    bundle: OtherBundle = None,
    engine: RunEngine = None,
    url: Url = None,
    device: RunDevice = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Label texts, from the command line, a file or standard input."""
    from bbt_accel.inference import predict as predict_run
    from bbt_accel.reports import report_predictions
    from bbt_accel.run import Run
    from bbt_accel.texts import read_texts

    rows = read_texts(texts or [], file, Run.read(run).task.text)
    predictions = predict_run(run, rows, bundle=bundle, engine=engine, device=device, threads=threads, url=url)
    report_predictions(rows, predictions, as_json)


@app.command(epilog="Example: bbt-accel serve runs/sst2 --port 8000")
def serve(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|RUN", help="A bundle, or a run that tune has written.")],
    engine: Annotated[Engine | None, typer.Option(help="The engine; that of the run, or ort, unless given.")] = None,
    device: RunDevice = None,
    threads: Threads = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    max_request_mib: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MiB.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows times candidates of a request.")] = 16384,
    keep_rows: Annotated[int, typer.Option(min=1, help="Batches of rows to keep for requests that follow.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Serve a bundle, and the prompt of a run, by the Open Inference Protocol over HTTP."""
    from bbt_accel.reports import report_serving
    from bbt_accel.serving import Limits
    from bbt_accel.serving.server import serve as serve_models

    limits = Limits(max_request_mib * 2**20, max_batch, timeout, keep_rows)
    serve_models(
        path,
        engine=engine,
        device=device,
        threads=threads,
        host=host,
        port=port,
        limits=limits,
        ready=lambda url, models: report_serving(url, models, as_json),
    )


@app.command(epilog="Example: bbt-accel bench --backbone roberta-large --task sst2 --engines torch,ort -o reports/sst2")
def bench(
    backbone: Annotated[str, typer.Option(help="A hub id, a local folder, or demo (shipped).")],
    task: TaskName,
    output: Output,
    engines: Annotated[str | None, typer.Option(metavar="NAMES", help="Of torch,ort,openvino,trt.")] = None,
    precisions: Annotated[str | None, typer.Option(metavar="NAMES", help="Of fp32,fp16,bf16,int8.")] = None,
    method: Annotated[Literal["bbt", "bbtv2"] | None, typer.Option(help="(default: bbt)")] = None,
    prompt_mode: Annotated[Literal["add", "cat"] | None, typer.Option(help="(default: add)")] = None,
    n_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Soft prompt vectors. (default: 50)")] = None,
    k_shot: Annotated[int | None, typer.Option(min=1, help="Rows a class in the timed batch. (default: 16)")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the timed batch, instead.")] = None,
    popsize: Annotated[int | None, typer.Option(min=2, help="Candidates a call. (default: 20)")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls a row. (default: 5)")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Most test rows to compare. (default: 512)")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Tune a prompt by each, and compare the scores.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Tuning runs a row. (default: 3)")] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Candidates a run. (default: the task's)")] = None,
    device: Annotated[Device | None, typer.Option(help="Where all engines run. (default: cpu)")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: one a core)")] = None,
    savings: Annotated[bool, typer.Option("--savings", help="Measure what each saving brings.")] = False,
    data: Data = None,
    without: Without = "",
    as_json: AsJson = False,
) -> None:
    """Compare engines and precisions with eager PyTorch: speed, accuracy and memory."""
    from bbt_accel.benchmarks.bench import run_bench
    from bbt_accel.reports import report_bench

    given = _given(
        engines=_names(engines) if engines is not None else None,
        precisions=_names(precisions) if precisions is not None else None,
        method=method,
        prompt_mode=prompt_mode,
        n_prompt_tokens=n_prompt_tokens,
        k_shot=k_shot,
        rows=rows,
        popsize=popsize,
        repeats=repeats,
        test_rows=test_rows,
        seeds=seeds,
        budget=budget,
        device=device,
        threads=threads,
        savings=savings or None,
    )
    run_bench(backbone=backbone, task=task, output=output, tune=tune, data=data, without=_names(without), **given)
    report_bench(output, as_json)


@app.command(epilog="Example: bbt-accel doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine can run, and what to install for the rest."""
    from bbt_accel.display import print_json
    from bbt_accel.doctor import diagnose, show

    diagnosis = diagnose()
    print_json(diagnosis) if as_json else show(diagnosis)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit with 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted).

    An error is one line on standard error; with --debug, anywhere on the line, its traceback too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    with _quiet(debug), one_line(debug):
        code = app(args=words or ["--help"], prog_name="bbt-accel", standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)


@contextmanager
def one_line(debug: bool = False) -> Iterator[None]:
    """An error in the block, or Ctrl-C, ends the process with one line and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(code)


def called(script: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs a script of the benchmarks with these arguments, or with those of this process."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", f"bbt_accel.benchmarks.{script}", *words])


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and the line that says what to do."""
    if isinstance(error, BbtError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):  # a usage error of click, or of the click inside typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "bbt-accel"
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        return getattr(error, "exit_code", 2), f"{message}; see {command} --help"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        module = str(error.name).partition(".")[0]
        return 1, f'{module} is not installed: pip install "bbt-accel[{EXTRAS[module]}]"'
    if isinstance(error, MemoryError):
        return 1, "out of memory; use a smaller backbone, --popsize or --k-shot"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some space" if error.errno == errno.ENOSPC else ""
        return 1, f"{where}{error.strerror or type(error).__name__}{hint}"
    return 1, f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback"


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silence what libraries warn about: it is for those who develop against them."""
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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _given(**options: object) -> dict[str, Any]:
    """The options that were given: defaults are those of the function that takes them, or of the task."""
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
