"""bbt_accel.json: what a package is, where it comes from, and how it was compared."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from bbt_accel.core.bundle import Architecture, TemplateGroup
from bbt_accel.core.engine_specs import Precision
from bbt_accel.errors import PackageError
from bbt_accel.io.files import has_digest, sha256
from bbt_accel.io.manifests import SealedManifest, check_files

INFO, ADAPTER_CONFIG = "bbt_accel.json", "adapter_config.json"
Kind = Literal["onnx", "openvino", "peft", "triton", "web"]


class Comparison(BaseModel, extra="forbid"):
    """A package against `predict`, by token ids, scores and labels of rows."""

    rows: int = Field(description="Rows of the data, and texts at the edges of what a text can be.")
    digest: str = Field(description="sha256 of them.")
    largest_error: float = Field(
        description="Of scores, relative to the largest where that exceeds 1."
    )
    labels_differ: int = Field(
        description="Rows with another label, of two scores closer than the tolerance."
    )


class PackageScore(BaseModel, extra="forbid"):
    """On the task's test rows."""

    metric: str = Field(description="The task's.")
    score: float = Field(description="Of the package.")
    without_prompt: float = Field(description="Of the label words, without a prompt.")
    batch_calibrated: float = Field(
        description="Of the same with each class's mean log-probability removed."
    )
    rows: int = Field(description="Number of test rows.")

    def near(self, other: PackageScore) -> bool:
        """Whether the scores are the same, but for some rows that another processor rounds to
        another class.
        """
        most = max(0.02, 2.5 / self.rows)  # one row changes F1 by up to twice its share
        own = (self.score, self.without_prompt, self.batch_calibrated)
        pairs = zip(own, (other.score, other.without_prompt, other.batch_calibrated), strict=True)
        return self.rows == other.rows and all(abs(one - stated) <= most for one, stated in pairs)


class Source(BaseModel, extra="forbid"):
    """A run or a bundle that a package was made from."""

    name: str = Field(
        pattern="^[^/]+$",
        description="Of its folder: a package may be published, so it tells no path.",
    )
    digest: str = Field(description="sha256 of its run.json or bundle.json.")

    def near(self, package: Path, file: str) -> Path | None:
        """The folder of this name and digest beside a package or one folder away from there; None
        if there is none.

        file: that which has the digest.
        """
        around = package.absolute().parents[:2]
        pattern = f"*/{glob.escape(self.name)}"
        places = (
            place for base in around for place in (base / self.name, *sorted(base.glob(pattern)))
        )
        return next((place for place in places if has_digest(place / file, self.digest)), None)


class PackageInfo(SealedManifest):
    """bbt_accel.json."""

    format: int = Field(default=3, description="Version of this file.")
    kind: Kind = Field(description="What it is for, --format.")
    model: str = Field(description="The model's file.")
    precision: Precision = Field(description="Of the model.")
    quantized: bool = Field(
        description="Whether int8 was made for the package, from the bundle in fp32."
    )
    run: Source = Field(description="The run that it was made from.")
    bundle: Source = Field(description="The bundle that it was made from.")
    task: str = Field(description="Name of the task.")
    architecture: Architecture = Field(description="As in bundle.json.")
    template_group: TemplateGroup = Field(description="As in bundle.json.")
    labels: list[str] = Field(
        description="Names of the classes, in the order of the model's output."
    )
    columns: list[str] = Field(description="Text columns; of two, the second is the pair's.")
    readout: str = Field(description="Name of the readout that is part of the model.")
    max_tokens: int = Field(description="Most tokens of all texts of a row together.")
    max_rows: int | None = Field(
        default=None, description="Rows of each split that are compared at most."
    )
    calibrated_on: str | None = Field(
        default=None, description="Of int8: the rows that fixed its ranges."
    )
    score: PackageScore | None = Field(
        default=None, description="On the task's test rows, where there are any."
    )
    comparison: Comparison = Field(description="With `predict`.")
    versions: dict[str, str] = Field(description="Of the libraries that wrote it.")
    command: str = Field(description="The command that repeats it.")
    sha256: dict[str, str] = Field(default={}, description="Of every other file.")


def write_info(folder: Path, info: PackageInfo) -> PackageInfo:
    """Hash every file of the folder into `info`, and write it."""
    info = info.model_copy(
        update={"sha256": {name: sha256(folder / name) for name in files_of(folder)}}
    )
    info.seal(folder / INFO)
    return info


def files_of(folder: Path) -> list[str]:
    """The files of a package, besides bbt_accel.json and those that hubs hide in a folder
    (.gitattributes, .cache).
    """
    files = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if not p.is_dir())
    return [p.as_posix() for p in files if p.as_posix() != INFO and not p.parts[0].startswith(".")]


def read_info(folder: Path) -> PackageInfo:
    """Read bbt_accel.json; check its own sha256 and every file's, and that there are no others.
    Raises PackageError.
    """
    make, again = "make one with bbt-accel package", "package the run again"
    info = PackageInfo.read(folder / INFO, "package", PackageError, make, again)
    info.check_seal(folder / INFO, PackageError, again)
    if added := [name for name in files_of(folder) if name not in info.sha256]:
        raise PackageError(
            f"{folder / added[0]} was added since the package was written; remove it, or {again}"
        )
    check_files(folder, info.sha256, "package", PackageError, again)
    return info
