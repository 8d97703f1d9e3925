"""What `make demo` shows: how far each step goes on the shipped task, and that two engines agree.

Exports the shipped backbone, then scores on 240 test rows: the label words alone, calibrated, with
a fitted readout, and with a search for a prompt on top, in PyTorch and in ONNX Runtime; then
packages the result. Nothing is downloaded but the libraries of the page, by npm where it is
installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

from bbt_accel import export_bundle, tune
from bbt_accel.cli.printing import print_predictions
from bbt_accel.errors import MissingDependency, PackageError
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.io.command import exit_on_error, print_table
from bbt_accel.io.progress import progress_bar
from bbt_accel.io.reporting import percent
from bbt_accel.package.package import Options, package_run
from bbt_accel.predict.inference import evaluate, predict_texts
from bbt_accel.search.run import Run

BUDGET = 300
TEXTS = (
    "The striker scored twice in the final",
    "Shares fell after the bank cut its forecast",
    "The new phone has a faster chip",
    "Doctors recommend a flu shot this winter",
)


def search(bundle: Path, engine: str, output: Path, budget: int) -> Run:
    """A run of the demo task with the default readout; one call fits it, the rest of the budget
    searches.
    """
    words = f"--bundle {bundle} --task demo --engine {engine} --budget {budget} -o {output}"
    print(f"bbt-accel tune {words}", flush=True)
    return tune(bundle, "demo", engine=engine, output=output, settings={"budget": budget})


def tell(folder: Path, budget: int) -> None:
    started = perf_counter()
    exported, optimized = folder / "bundle", folder / "bundle-ort"
    print(f"bbt-accel export demo -o {exported} --n-prompt-tokens 20", flush=True)
    with progress_bar("exporting demo") as step:
        export_bundle("demo", exported, n_prompt_tokens=20, on_progress=step)
    print(f"bbt-accel optimize {exported} -o {optimized}", flush=True)
    with progress_bar("optimizing") as step:
        optimize_bundle(exported, optimized, on_progress=step)
    fitted = search(optimized, "ort", folder / "fitted", 1)
    runs = [
        search(place, e, folder / e, budget)
        for e, place in (("torch", exported), ("ort", optimized))
    ]
    scores = {run.path: evaluate(run.path) for run in (fitted, *runs)}
    plain = scores[fitted.path]
    lines = [
        ("a class drawn at random", percent(plain["chance"], 1), "–", "–"),
        ("label words, without a prompt", percent(plain["without_prompt"], 1), "0", "–"),
        ("the same, calibrated without labels", percent(plain["batch_calibrated"], 1), "0", "–"),
        (
            f"readout {fitted.info.readout.name}, fitted on 128 rows",
            percent(plain["score"], 1),
            "1",
            "–",
        ),
    ]
    for run in runs:
        engine = "PyTorch" if run.info.engine.name == "torch" else "ONNX Runtime"
        name = f"a search on top, in {engine}"
        calls, rate = run.info.calls, run.info.calls / run.info.seconds
        lines.append((name, percent(scores[run.path]["score"], 1), str(calls), f"{rate:.1f}"))
    print()
    header = ["on the demo task", "accuracy", "calls", "calls/s"]
    print_table(f"{plain['rows']} test rows, {perf_counter() - started:.0f} seconds", lines, header)
    print_predictions(
        [{"text": text} for text in TEXTS],
        predict_texts(runs[-1].path, [{"text": t} for t in TEXTS]),
        False,
    )
    last = folder / "ort"
    print(f"{last} holds {', '.join(sorted(file.name for file in last.iterdir()))}")

    packaged(last, folder)


def packaged(run: Path, folder: Path) -> None:
    """A page that classifies in the browser; where npm cannot be asked for its libraries, a package
    in ONNX.
    """
    print(f"bbt-accel package {run} -o {folder / 'page'} --format web", flush=True)
    try:
        with progress_bar("packaging") as step:
            package_run(run, folder / "page", Options("web"), step)
    except (MissingDependency, PackageError) as error:
        print(f"no page: {error}\nbbt-accel package {run} -o {folder / 'package'}", flush=True)
        with progress_bar("packaging") as step:
            package_run(run, folder / "package", Options(), step)
        return
    print(
        f"to see it: python3 -m http.server -d {folder / 'page'}, then open http://localhost:8000"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo-run"), help="folder to create"
    )
    parser.add_argument("--budget", type=int, default=BUDGET, help="calls of each search")
    given = parser.parse_args()
    with exit_on_error():
        given.output.mkdir()
        tell(given.output, given.budget)


if __name__ == "__main__":
    main()
