"""JSON files that describe a folder: read, sealed, and checked against the files that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, ValidationError

from bbt_accel.errors import BbtError, first_problem
from bbt_accel.io.files import sha256

PLANS = "plans"
"""Folder of TensorRT plans in a bundle: a cache, programs for one GPU, which no manifest covers."""


class _Format(BaseModel):
    format: int


class Manifest(BaseModel, extra="forbid"):
    """The JSON file that describes a folder."""

    format: int

    @classmethod
    def read(cls, file: Path, what: str, error: type[BbtError], make: str, again: str) -> Self:
        """Raises `error` when the file is missing, malformed or of another format than this
        version's.

        what: the kind of folder. make, again: how to get one, and how to get it again.
        """
        if not file.is_file():
            raise error(f"{file.parent} is not a {what} (it has no {file.name}); {make}")
        content, current = file.read_bytes(), cls.model_fields["format"].default
        try:
            found = _Format.model_validate_json(content).format
            if found != current:  # whose other fields are not known here
                raise error(
                    f"{file.parent} has {what} format {found}, this version reads {current}; "
                    f"{again}"
                )
            return cls.model_validate_json(content)
        except ValidationError as problem:
            raise error(f"{file} cannot be read ({first_problem(problem)}); {again}") from None


class SealedManifest(Manifest):
    """One that has the sha256 of its other fields."""

    facts: str = Field(default="", description="sha256 of the other fields of this file.")

    def seal(self, file: Path) -> None:
        """Set `facts`, and write the file."""
        self.facts = facts_digest(self.model_dump_json().encode())
        file.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def check_seal(self, file: Path, error: type[BbtError], again: str) -> None:
        """Raises `error` where the file has been changed since it was sealed. again: what to do
        then.
        """
        if facts_digest(file.read_bytes()) != self.facts:
            raise error(f"{file} has been changed by hand (sha256); {again}")


def check_files(
    folder: Path, digests: Mapping[str, str], what: str, error: type[BbtError], again: str
) -> None:
    """Raises `error` for a file that is missing, has changed or is elsewhere. digests: name →
    sha256.

    again: what to do then.
    """
    for name, wanted in digests.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise error(f"{folder} names a file outside of it, {name!r:.80}; {again}")
        if not file.is_file():
            raise error(f"{folder} lacks {name}; {again}")
        if sha256(file) != wanted:
            raise error(f"{file} has changed since the {what} was written (sha256); {again}")


def facts_digest(content: bytes) -> str:
    """sha256 of the content of such a file, however it is formatted, without the field `facts`."""
    facts = {name: value for name, value in json.loads(content).items() if name != "facts"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
