"""bbt_accel.json: what a package is, where it comes from, and how it was compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from bbt_accel.bundle import Architecture, Manifest, TemplateGroup
from bbt_accel.engine_specs import Precision
from bbt_accel.errors import PackageError
from bbt_accel.files import sha256

INFO = "bbt_accel.json"
Kind = Literal["onnx", "openvino", "peft", "triton", "web"]


class Comparison(BaseModel, extra="forbid"):
    """A package against `predict`, by token ids, scores and labels of rows."""

    rows: int = Field(description="Rows of the data, and texts at the edges of what a text can be.")
    digest: str = Field(description="sha256 of them.")
    largest_error: float = Field(description="Of scores, relative to the largest where that exceeds 1.")
    labels_differ: int = Field(description="Rows with another label, of two scores closer than the tolerance.")
    cut_differently: int = Field(description="Over-long rows whose last tokens differ; their scores are not compared.")


class PackageScore(BaseModel, extra="forbid"):
    """On the task's test rows."""

    metric: str
    score: float
    without_prompt: float
    calibrated: float
    rows: int


class Source(BaseModel, extra="forbid"):
    """A run or a bundle that a package was made from."""

    path: str = Field(description="From the package's folder, which may be published: it tells no other path.")
    digest: str = Field(description="sha256 of its run.json or bundle.json.")

    @classmethod
    def of(cls, path: Path, package: Path, digest: str) -> Source:
        try:
            relative = os.path.relpath(path.absolute(), package.absolute())
        except ValueError:  # another drive of Windows
            relative = str(path.absolute())
        return cls(path=relative, digest=digest)


class PackageInfo(Manifest):
    """bbt_accel.json."""

    format: int = 1
    kind: Kind
    model: str = Field(description="The model's file.")
    precision: Precision
    quantized: bool = Field(description="Whether int8 was made for the package, from the bundle in fp32.")
    run: Source
    bundle: Source
    task: str
    architecture: Architecture
    template_group: TemplateGroup
    labels: list[str]
    columns: list[str] = Field(description="Text columns; of two, the second is the pair's.")
    readout: str
    max_tokens: int = Field(description="Of all texts of a row together.")
    max_rows: int | None = Field(default=None, description="Rows of each split that are compared at most.")
    calibrated_on: str | None = Field(default=None, description="Of int8: the rows that fixed its ranges.")
    score: PackageScore | None = None
    comparison: Comparison
    versions: dict[str, str]
    command: str
    sha256: dict[str, str] = Field(default={}, description="Of every other file.")


def write_info(folder: Path, info: PackageInfo) -> PackageInfo:
    """Hash every file of the folder into `info`, and write it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != INFO)
    info = info.model_copy(update={"sha256": {p.relative_to(folder).as_posix(): sha256(p) for p in files}})
    (folder / INFO).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return info


def read_info(folder: Path) -> PackageInfo:
    """Read bbt_accel.json and check every file's sha256. Raises PackageError."""
    make, again = "make one with bbt-accel package", "package the run again"
    info = PackageInfo.read(folder / INFO, "package", PackageError, make, again)
    for name, wanted in info.sha256.items():
        file = folder / name
        if not file.is_file():
            raise PackageError(f"{folder} lacks {name}; {again}")
        if sha256(file) != wanted:
            raise PackageError(f"{file} has changed since the package was written (sha256); {again}")
    return info
