"""The exported folder: graphs, weights, tokenizer and bundle.json."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bbt_accel.errors import BbtError, BundleError

FORMAT = 1
PLANS = "plans"
"""Folder of TensorRT plans: a cache that machines add to, so no part of a bundle's sha256."""
PROJECT, TALLY = "project", "tally"
"""The graphs from z to prompts and from label logits to a tally, for engines on a GPU; no stages of the backbone."""
Method = Literal["bbt", "bbtv2"]
PromptMode = Literal["add", "cat"]


class SpecialTokens(BaseModel):
    """Vocabulary ids that the encoding needs; None where the backbone's tokenizer has no such token."""

    model_config = ConfigDict(extra="forbid")
    begin: int | None
    end: int | None
    pad: int
    mask: int | None
    mask_text: str | None
    """How the mask token is written in a text: `<mask>`, `[MASK]`, `<extra_id_0>` for T5."""
    decoder_start: int | None


class BundleInfo(BaseModel):
    """bundle.json."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    backbone: str
    revision: str | None
    family: Literal["roberta", "bert", "bart", "t5", "gpt2"]
    method: Method
    prompt_mode: PromptMode
    n_prompt_tokens: int
    hidden_size: int
    n_layers: int
    """Blocks that take a prompt: encoder blocks for BART and T5."""
    vocab_size: int
    max_length: int
    """Tokens that a row may have, special tokens and (in add mode) initial prompt tokens included."""
    word_embedding_std: float
    special: SpecialTokens
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    target: Literal["onnx", "ort", "openvino", "trt"]
    without: list[str] = []
    """Savings that the graphs do without, by the names in `bbt_accel.savings`."""
    opset: int
    stages: list[str]
    """Graph files in the order in which they run: one for bbt; embedding, blocks and readout for bbtv2."""
    versions: dict[str, str]
    max_error: float | None = None
    """Largest absolute difference of label logits from eager PyTorch, measured after the export."""
    source: str | None = None
    """sha256 of the bundle.json that this one was optimized from."""
    optimization: dict[str, object] | None = None
    """What the optimizer did and measured: fused operators, size, logit error, agreement."""
    sha256: dict[str, str] = {}

    @property
    def prompt_shape(self) -> tuple[int, ...]:
        """Shape of one candidate's prompt: (n, H) for bbt, (L, n, H) for bbtv2."""
        one = (self.n_prompt_tokens, self.hidden_size)
        return one if self.method == "bbt" else (self.n_layers, *one)


class Bundle:
    """A bundle folder that has been read and checked."""

    def __init__(self, path: Path, info: BundleInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def read(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read `path`/bundle.json and check format and sha256 of every file.

        Raises BundleError when the folder is no bundle, is of another format, or a file is missing or changed.
        """
        path = Path(path)
        manifest = path / "bundle.json"
        if not manifest.is_file():
            raise BundleError(f"{path} is not a bundle (it has no bundle.json); make one with bbt-accel export")
        try:
            info = BundleInfo.model_validate_json(manifest.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise BundleError(f"{manifest} cannot be read ({first_problem(error)}); export the bundle again") from None
        if info.format != FORMAT:
            raise BundleError(f"{path} has bundle format {info.format}, this version reads {FORMAT}; export it again")
        bundle = cls(path, info)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        for name, wanted in self.info.sha256.items():
            file = self.path / name
            if not file.is_file():
                raise BundleError(f"{self.path} lacks {name}; export it again")
            if sha256(file) != wanted:
                raise BundleError(f"{file} has changed since the bundle was written (sha256); export it again")

    def require(self, method: Method) -> None:
        """Raises BundleError if the bundle was exported for the other method."""
        if self.info.method != method:
            raise BundleError(
                f"{self.path} was exported for {self.info.method}, not {method}; export one with --method {method}"
            )

    @property
    def digest(self) -> str:
        """sha256 of bundle.json, which names the sha256 of every other file."""
        return sha256(self.path / "bundle.json")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


def write_info(folder: Path, info: BundleInfo) -> BundleInfo:
    """Hash every file of `folder`, but for plans, into `info` and write bundle.json."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "bundle.json")
    files = [p for p in files if p.relative_to(folder).parts[0] != PLANS]
    info = info.model_copy(update={"sha256": {str(p.relative_to(folder)): sha256(p) for p in files}})
    (folder / "bundle.json").write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return info


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    Nothing half-written ever appears under the final name, and nothing is left behind after an error or an interrupt.
    """
    path = path.absolute()
    if path.exists() and not overwrite:
        raise BbtError(f"{path} exists already; choose another -o or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise BbtError(f"cannot write to {path.parent} ({error.strerror}); choose another -o") from None
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except OSError as error:
        raise BbtError(
            f"cannot write {path} ({error.strerror or error}); free some space or choose another -o"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def first_problem(error: Exception) -> str:
    """The first complaint of a validation error, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return str(error).splitlines()[0]
