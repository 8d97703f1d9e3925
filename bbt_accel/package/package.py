"""`package`: a run as a self-contained model that other tools load, compared with `predict` before
it gets its name.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from bbt_accel import __version__
from bbt_accel.core.batch import Float64
from bbt_accel.core.bundle import INFO as BUNDLE_INFO
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.objective import Objective
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import DataError, PackageError, check_known
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.io.files import new_folder, sha256
from bbt_accel.io.machine import installed
from bbt_accel.io.progress import Tell, silent
from bbt_accel.package import manifest
from bbt_accel.package.card import model_card
from bbt_accel.package.comparison import available_rows, compare, edge_rows
from bbt_accel.package.formats import FORMATS, Format
from bbt_accel.package.manifest import Comparison, Kind, PackageInfo, PackageScore, Source
from bbt_accel.package.packaged_run import PackagedRun
from bbt_accel.package.web_page import VENDOR
from bbt_accel.predict.inference import class_scores, scores_before, searched_split
from bbt_accel.search.calibration import calibrate_on
from bbt_accel.search.run import CARD, Baselines, Run, RunInfo
from bbt_accel.search.run import INFO as RUN_INFO
from bbt_accel.tasks.data import Row, labels
from bbt_accel.tasks.encoding import Encoder

WEIGHTS = (".onnx", ".onnx_data", ".data", ".xml", ".bin", ".safetensors")
"""Files of a model, whose bytes depend on the versions of libraries; these are compared by what
they compute.
"""
LIBRARIES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "openvino",
    "tokenizers",
)


@dataclass(frozen=True)
class Options:
    """What `package` was asked for.

    int8: also where the bundle is in fp32. bundle: another than the run's, or than the one that
    this was optimized from where the format does not take the run's. max_rows: of each split, to
    compare.
    """

    format: Kind = "onnx"
    int8: bool = False
    bundle: Path | None = None
    max_rows: int | None = None
    threads: int | None = None


def package_run(
    run_path: str | Path, output: str | Path, options: Options, on_progress: Tell = silent
) -> PackageInfo:
    """Write a new folder that holds backbone, prompt, template, readout and labels of a run, for
    other tools.

    Raises PackageError for a run that the format cannot hold, and for one whose package differs
    from `predict`; what `Run.read`, `Run.open_bundle` and `optimize_bundle` raise.
    """
    check_known("--format", options.format, FORMATS)
    run, output, form = Run.read(run_path), Path(output), FORMATS[options.format]
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(output))
        if form.libraries is not None:  # before anything that takes long
            form.libraries(folder)
        source, bundle = stack.enter_context(packaged_bundle(run, form, options, on_progress))
        made = classifier_of(run, bundle)
        on_progress("composing the graph", 0, 2)
        model = form.write(made, run.info.class_names, folder)
        on_progress("comparing with predict", 1, 2)
        comparison, score = compared(run, made, form, folder, model, options)
        info = PackageInfo(
            kind=options.format,
            model=model,
            quantized=bundle is not source,
            max_rows=options.max_rows,
            score=score,
            run=Source(name=run.path.absolute().name, digest=sha256(run.path / RUN_INFO)),
            bundle=Source(name=source.path.absolute().name, digest=source.digest),
            calibrated_on=calibrated_on(bundle),
            comparison=comparison,
            versions=versions(),
            command=command(run_path, output, options),
            **of_run(run, made),
        )
        (folder / CARD).write_text(model_card(info, run.info, form.usage, folder), encoding="utf-8")
        return manifest.write_info(folder, info)


def check_package(
    path: str | Path,
    threads: int | None = None,
    on_progress: Tell = silent,
    run: str | Path | None = None,
    bundle: str | Path | None = None,
) -> PackageInfo:
    """Verify the sha256 of every file of a package, and compare it with `predict` again.

    run, bundle: those that it was made from, where they are not near it. Returns its info with the
    new comparison. Raises PackageError for a changed or an added file, a run or bundle that is gone
    or has changed, a difference, and for anything but the model that packaging the run again writes
    otherwise.
    """
    folder = Path(path)
    info = manifest.read_info(folder)
    form, source_run = FORMATS[info.kind], find_run(info, folder, run)
    place = find_bundle(info, folder, source_run, bundle)
    options = Options(info.kind, info.quantized, place, info.max_rows, threads)
    with packaged_bundle(source_run, form, options, on_progress) as (_, packaged):
        made = classifier_of(source_run, packaged)
        if calibrated_on(packaged) != info.calibrated_on:
            here = f"here that would be on {calibrated_on(packaged)}"
            raise PackageError(
                f"{folder} was calibrated on {info.calibrated_on}, {here}; package the run again"
            )
        for name, value in of_run(source_run, made).items():
            if getattr(info, name) != value:
                raise PackageError(
                    f"{folder / manifest.INFO} has another {name} than its run; package the run "
                    "again"
                )
        on_progress("composing the graph", 0, 2)
        check_beside(folder, info, form, made, source_run.info)
        on_progress("comparing with predict", 1, 2)
        comparison, score = compared(source_run, made, form, folder, info.model, options)
    if score is not None and info.score is not None and not score.near(info.score):
        stated = f"{info.score.metric} {info.score.score:.4f}, here it has {score.score:.4f}"
        raise PackageError(f"{folder} states a test {stated}; package the run again")
    return info.model_copy(update={"comparison": comparison, "score": score or info.score})


def check_beside(
    folder: Path, info: PackageInfo, form: Format, made: PackagedRun, run: RunInfo
) -> None:
    """Raises PackageError where what lies beside the model, which loaders read too, is not what
    this run gives.

    Libraries of a page come from elsewhere, by a pinned hash; they are compared with nothing here.
    """
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as place:
        again = Path(place)
        model = form.write(made, run.class_names, again)
        (again / CARD).write_text(model_card(info, run, form.usage, again), encoding="utf-8")
        wanted = {name: sha256(again / name) for name in manifest.files_of(again)}
    if model != info.model:
        raise PackageError(
            f"{folder} names the model {info.model!r:.80}, not {model}; package the run again"
        )
    found = info.sha256
    if form.libraries is not None:
        found = {
            name: digest
            for name, digest in found.items()
            if name in wanted or not name.startswith(f"{VENDOR}/")
        }
    for name in sorted(wanted.keys() | found.keys()):
        weights = PurePath(name).suffix in WEIGHTS and name in found and name in wanted
        if not weights and found.get(name) != wanted.get(name):
            raise PackageError(
                f"{folder / name} is not what packaging its run writes; package the run again"
            )


def of_run(run: Run, made: PackagedRun) -> dict[str, Any]:
    """The facts of a package that its run and bundle determine."""
    info = made.info
    return {
        "precision": info.precision,
        "architecture": info.architecture,
        "template_group": info.template_group,
        "task": run.task.name,
        "labels": run.info.class_names,
        "columns": run.task.text,
        "readout": run.readout.name,
        "max_tokens": made.room,
    }


def find_run(info: PackageInfo, folder: Path, given: str | Path | None) -> Run:
    """The run of a package: the given one, or that of its name and digest near it. Raises
    PackageError.
    """
    near = info.run.near(folder, RUN_INFO) if given is None else None
    if given is None and near is None:
        named = f"the run {info.run.name!r} (sha256 {info.run.digest:.12})"
        problem = f"{folder} was made from {named}, which is not near it"
        raise PackageError(f"{problem} or has changed; pass it with --run")
    run = Run.read(near or given or "")
    if sha256(run.path / RUN_INFO) != info.run.digest:
        raise PackageError(
            f"{run.path} is not the run that {folder} was made from; package it again"
        )
    return run


def find_bundle(info: PackageInfo, folder: Path, run: Run, given: str | Path | None) -> Path:
    """The bundle of a package: the given one, that of its digest near it, the run's, or which this
    was optimized from.

    Raises PackageError, and BundleError where the run has none.
    """
    near = info.bundle.near(folder, BUNDLE_INFO) if given is None else None
    if near is not None:
        return near
    bundle = run.open_bundle(given)
    for found in (bundle, None if given else exported_beside(bundle)):
        if found is not None and found.digest == info.bundle.digest:
            return found.path
    raise PackageError(
        f"{bundle.path} is not the bundle that {folder} was made from; pass that with --bundle"
    )


def classifier_of(run: Run, bundle: Bundle) -> PackagedRun:
    return PackagedRun(
        bundle, Encoder(bundle, run.task, run.info.demonstrations), run.prompt, run.readout
    )


@contextmanager
def packaged_bundle(
    run: Run, form: Format, options: Options, on_progress: Tell
) -> Iterator[tuple[Bundle, Bundle]]:
    """The bundle that a package is made from, and that which it holds: the same, or the first in
    int8.

    Raises PackageError for a bundle that the format does not take.
    """
    bundle = run.open_bundle(options.bundle)
    if options.bundle is None:
        bundle = suitable(bundle, form, options.int8) or bundle
    convert, wanted = taken(bundle, form, options.int8)
    if bundle.info.target not in wanted:
        why = f"{bundle.path} is optimized for {bundle.info.target} in {bundle.info.precision}"
        takes = "one as exported" if wanted == ("onnx",) else f"one of {', '.join(wanted)}"
        raise PackageError(f"{why}; pass {takes} of the same backbone with --bundle")
    if not convert:
        yield bundle, bundle
        return
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as place:
        yield (
            bundle,
            optimize_bundle(
                bundle.path,
                Path(place) / "int8",
                precision="int8",
                target=form.engine,
                on_progress=on_progress,
                calibration=calibrate_on(str(run.path) if has_rows(run) else None),
                threads=options.threads,
            ),
        )


def suitable(bundle: Bundle, form: Format, int8: bool) -> Bundle | None:
    """What a format takes: this bundle, or the one that it was optimized from, if that lies in the
    same folder.
    """
    return bundle if bundle.info.target in taken(bundle, form, int8)[1] else exported_beside(bundle)


def taken(bundle: Bundle, form: Format, int8: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether int8 has to be made of a bundle, and the targets of bundles that can be packaged
    then.
    """
    convert = int8 and bundle.info.precision != "int8"
    return convert, ("onnx",) if convert else form.targets


def has_rows(run: Run) -> bool:
    """Whether the rows of its search are here."""
    try:
        searched_split(run, run.data_path)
    except DataError:
        return False
    return True


def calibrated_on(bundle: Bundle) -> str | None:
    """What an int8 bundle was calibrated on."""
    found = (
        (bundle.info.optimization or {}).get("calibrated_on")
        if bundle.info.precision == "int8"
        else None
    )
    return None if found is None else str(found)


def exported_beside(bundle: Bundle) -> Bundle | None:
    """The bundle that this one was optimized from, if it lies in the same folder."""
    for info in sorted(bundle.path.absolute().parent.glob(f"*/{BUNDLE_INFO}")):
        if bundle.info.source == sha256(info):
            return Bundle.read(info.parent)
    return None


def compared(
    run: Run, made: PackagedRun, form: Format, folder: Path, model: str, options: Options
) -> tuple[Comparison, PackageScore | None]:
    """The package against `predict` on all available rows; and its score on the test rows, if there
    are any.
    """
    train, test = available_rows(run, options.max_rows)
    rows = [*edge_rows(made.encoder), *train, *test]
    found = form.run(made, folder, model, rows, options.threads)
    with load_engine(made.bundle, form.engine, threads=options.threads) as engine:
        wanted = class_scores(engine, made.encoder, rows, run)
        comparison = compare(made, found, rows, wanted)
        return comparison, score_of(
            run, engine, made.encoder, test, found.scores[len(rows) - len(test) :]
        )


def score_of(
    run: Run, engine: Engine, encoder: Encoder, test: list[Row], scores: Float64
) -> PackageScore | None:
    """The task's metric on the test rows: of the package, and of the same backbone before the
    search.
    """
    if not test:
        return None
    metric, targets = run.task.metric, labels(test)
    _, (score,) = Objective("ce", metric).score(scores[None], targets)
    before = Baselines.of(scores_before(engine, encoder, test), targets, metric)
    kept = before.model_dump(include={"without_prompt", "batch_calibrated"})
    return PackageScore(metric=metric, score=score, rows=len(test), **kept)


def versions() -> dict[str, str]:
    return {"bbt-accel": __version__} | {
        name: found for name in LIBRARIES if (found := installed(name))
    }


def command(run: str | Path, output: Path, options: Options) -> str:
    """How to make the same package again. It may be published: of paths from elsewhere it has the
    names alone.
    """

    def named(path: str | Path) -> str:
        elsewhere = Path(path).is_absolute() or ".." in Path(path).parts
        return Path(path).absolute().name if elsewhere else str(path)

    words = ["bbt-accel", "package", named(run), "-o", named(output)]
    words += ["--format", options.format] if options.format != "onnx" else []
    words += ["--int8"] if options.int8 else []
    words += ["--max-rows", str(options.max_rows)] if options.max_rows is not None else []
    words += ["--bundle", named(options.bundle)] if options.bundle is not None else []
    return shlex.join(words)
