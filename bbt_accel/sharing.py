"""What `push` uploads: a run with its bundle, a saved classifier, or a package, without paths of this machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bbt_accel.hub import push_folder
from bbt_accel.packaging import manifest
from bbt_accel.run import CARD, INFO, Run

ESTIMATOR = "classifier.json"
"""The file that makes a folder a saved PromptClassifier, with the folders `run` and `bundle`."""


def push(path: str | Path, repo: str, *, private: bool = False, with_bundle: bool = True) -> str:
    """Upload a run, a package, or what `PromptClassifier.save` wrote to a repository of the hub.

    repo: OWNER/NAME, created if necessary. with_bundle: upload a run's bundle too, so that hf://OWNER/NAME works by
    itself. Returns the commit's address. Raises RunError, BundleError, PackageError for a package whose files have
    changed, and HubError where the hub refuses.
    """
    path = Path(path)
    if is_package(path):
        manifest.read_info(path)  # which verifies its files
        return push_folder(path, repo, private)
    saved = (path / ESTIMATOR).is_file()
    run = Run.read(path / "run" if saved else path)
    bundle = run.open_bundle().path if with_bundle and not saved else None
    with portable(path, bundle) as copy:
        return push_folder(copy, repo, private)


def is_package(path: Path) -> bool:
    return (path / manifest.INFO).is_file()


@contextmanager
def portable(path: Path, bundle: Path | None = None) -> Iterator[Path]:
    """A copy of a run, with a bundle inside, or of a saved classifier, as others may have it."""
    with tempfile.TemporaryDirectory(prefix="bbt-accel-") as place:
        copy = Path(place) / "copy"
        shutil.copytree(path, copy)
        if bundle is not None:
            shutil.copytree(bundle, copy / "bundle")
        run = copy if (copy / INFO).is_file() else copy / "run"
        info: dict[str, Any] = json.loads((run / INFO).read_text(encoding="utf-8"))
        relative = "bundle" if run == copy else "../bundle"
        info["bundle"] |= {"path": relative, "relative": relative}
        info["data"]["path"] = None
        (run / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        if run != copy:
            shutil.copyfile(run / CARD, copy / CARD)
        yield copy
