"""What `push` uploads: a run with its bundle, a saved classifier, or a package, without paths of
this machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from bbt_accel.core.backbone_names import backbone_name, hub_id
from bbt_accel.core.bundle import INFO as BUNDLE_INFO
from bbt_accel.core.bundle import Bundle
from bbt_accel.errors import PackageError, RunError, UsageError, translated
from bbt_accel.io.hub import push_folder
from bbt_accel.package import manifest
from bbt_accel.search.run import (
    CARD,
    CURVE,
    ESTIMATOR,
    HISTORY,
    INFO,
    PROMPT,
    READOUT,
    TASK,
    Run,
    RunInfo,
    is_saved_classifier,
    write_info,
)

FILES = (INFO, PROMPT, READOUT, HISTORY, CURVE, TASK, CARD)
"""Of a run, those that are uploaded: TensorBoard's have this machine's name."""


def push(path: str | Path, repo: str, *, private: bool = False, with_bundle: bool = True) -> str:
    """Upload a run, a package, or what `PromptClassifier.save` wrote to a repository of the hub.

    repo: OWNER/NAME, created if necessary. with_bundle: upload a run's bundle too, so that
    hf://OWNER/NAME works by itself. What the repository held is replaced; its earlier commits keep
    it. Returns the commit's address. Raises UsageError for a saved classifier without its bundle,
    RunError, BundleError, PackageError for a package whose files have changed or that names a path
    of this machine, and HubError where the hub refuses.
    """
    path = Path(path)
    if is_package(path):
        info = manifest.read_info(path)  # which verifies its files
        check_base_model(path / manifest.ADAPTER_CONFIG)
        return push_folder(path, repo, private, [manifest.INFO, *info.sha256])
    if is_saved_classifier(path) and not with_bundle:
        raise UsageError(
            f"{path} is a saved classifier, which needs its bundle; push {path / 'run'} without it"
        )
    bundle = Run.read(path).open_bundle() if with_bundle else None
    with portable(path, bundle) as copy:
        return push_folder(copy, repo, private)


def is_package(path: Path) -> bool:
    return (path / manifest.INFO).is_file()


@contextmanager
def portable(path: Path, bundle: Bundle | None = None) -> Iterator[Path]:
    """A copy of a run, with a bundle inside, or of a saved classifier, as others may have it."""
    run, saved = Run.read(path), is_saved_classifier(path)
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as place:
        copy = Path(place) / "copy"
        inside = copy / "run" if saved else copy
        inside.mkdir(parents=True)
        for name in FILES:
            if (run.path / name).is_file():
                shutil.copyfile(own_file(run.path / name), inside / name)
        digest = None if bundle is None else copy_bundle(bundle, copy / "bundle")
        write_info(inside, without_paths(run.info, "../bundle" if saved else "bundle", digest))
        if saved:
            shutil.copyfile(inside / CARD, copy / CARD)
            with translated(
                RunError, f"{path / ESTIMATOR} cannot be read; save the classifier again"
            ):
                facts = json.loads((path / ESTIMATOR).read_text(encoding="utf-8"))
                facts["parameters"]["backbone"] = public_parameter(
                    facts["parameters"]["backbone"], run.info
                )
            (copy / ESTIMATOR).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        yield copy


def own_file(file: Path) -> Path:
    """The file, which may be a link within its folder or within the hub's cache. Raises RunError
    for another link.

    A link in a run of somebody else's could name any file of this machine.
    """
    folder = file.parent.resolve()
    cached = next((place.parent for place in folder.parents if place.name == "snapshots"), folder)
    if not file.resolve().is_relative_to(cached):
        raise RunError(
            f"{file} is a link to {file.resolve()}; replace it by a copy if that is to be uploaded"
        )
    return file


def copy_bundle(bundle: Bundle, folder: Path) -> str:
    """Copy the files that a bundle names; returns its sha256, another where it had a path."""
    for name in bundle.info.sha256:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    info = bundle.info.model_copy(update={"backbone": backbone_name(bundle.info.backbone)})
    if info == bundle.info:
        shutil.copyfile(bundle.path / BUNDLE_INFO, folder / BUNDLE_INFO)
    else:
        info.seal(folder / BUNDLE_INFO)
    return Bundle(folder, info).digest


def without_paths(info: RunInfo, bundle: str, digest: str | None) -> RunInfo:
    """bundle: its path from the run. digest: that of the copied bundle, if there is one."""
    versions = {name: version for name, version in info.engine.versions.items() if name != "url"}
    record = {"path": bundle, "relative": bundle, "backbone": backbone_name(info.bundle.backbone)}
    record |= {} if digest is None else {"digest": digest}
    changes = {
        "bundle": info.bundle.model_copy(update=record),
        "engine": info.engine.model_copy(update={"url": None, "versions": versions}),
        "data": info.data.model_copy(update={"path": None}),
    }
    return info.model_copy(update=changes)


def public_parameter(backbone: str, info: RunInfo) -> str:
    """An estimator's backbone, of a local one its name as a path: the bare name could be another
    model's hub id.
    """
    public = backbone == info.bundle.backbone and not PurePath(backbone).is_absolute()
    return backbone if public else f"./{PurePath(backbone).name}"


def check_base_model(file: Path) -> None:
    """Raises PackageError for an adapter, by its adapter_config.json, of a checkpoint that only
    this machine has.
    """
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        if hub_id(base, config["revision"]) is None:
            raise PackageError(
                f"the adapter is for {base}, which is no hub id; export its backbone by hub id "
                "to push it"
            )
