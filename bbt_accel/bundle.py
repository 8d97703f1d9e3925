"""The exported folder: graphs, weights, tokenizer and bundle.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.engine_specs import Precision
from bbt_accel.errors import BundleError
from bbt_accel.files import sha256

FORMAT = 2
PLANS = "plans"
"""Folder of TensorRT plans: a cache that machines add to, so it is not part of a bundle's sha256."""
PROJECT, STATISTICS = "project", "statistics"
"""Graphs from z to prompts and from label logits to batch statistics, for engines on a GPU; not backbone stages."""
Method = Literal["bbt", "bbtv2"]
PromptMode = Literal["add", "cat"]
Architecture = Literal["encoder", "encoder-decoder", "decoder"]
TemplateGroup = Literal["masked", "span", "causal"]
"""How a row is written and where its logits are read: at the mask token of a masked LM; at the sentinel in the decoder
of a span-corruption model (position 1, behind the start token); at the last real token of a causal LM."""


class SpecialTokens(BaseModel):
    """Vocabulary ids that the encoding uses; None where rows of this family have no such token."""

    model_config = ConfigDict(extra="forbid")
    begin: int | None
    end: int | None
    pad: int
    mask: int | None
    mask_text: str | None
    """The mask token's text, e.g. `<mask>` or `[MASK]`; the sentinel's for the template group `span`."""
    decoder_start: int | None


class BundleInfo(BaseModel):
    """bundle.json."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    backbone: str
    revision: str | None
    family: str = Field(description="Name of the family that exported it; for readers, nothing depends on it.")
    architecture: Architecture
    template_group: TemplateGroup
    method: Method
    prompt_mode: PromptMode
    n_prompt_tokens: int
    hidden_size: int
    n_layers: int = Field(description="Blocks that take a prompt: those of the encoder where there is one.")
    vocab_size: int
    max_length: int
    """Tokens of the longest row, special tokens and (in add mode) initial prompt tokens included."""
    word_embedding_std: float
    special: SpecialTokens
    precision: Precision
    target: str = Field(description="`onnx` as exported, else the engine that it was optimized for.")
    without: list[str] = []
    """Optimizations that the graphs leave out, by the names in `bbt_accel.optimizations`."""
    opset: int
    stages: list[str]
    """Graph files in the order in which they run: one for bbt; embedding, blocks and readout for bbtv2."""
    versions: dict[str, str]
    max_error: float | None = None
    """Largest absolute difference of label logits from eager PyTorch, measured after the export."""
    source: str | None = Field(default=None, description="sha256 of the bundle.json that this one was optimized from.")
    optimization: dict[str, object] | None = None
    """What `optimize` did and measured: fused operators, size, logit error, agreement."""
    sha256: dict[str, str] = {}

    @property
    def prompt_shape(self) -> tuple[int, ...]:
        """Shape of one candidate's prompt: (n, H) for bbt, (L, n, H) for bbtv2."""
        one = (self.n_prompt_tokens, self.hidden_size)
        return one if self.method == "bbt" else (self.n_layers, *one)

    @property
    def decodes(self) -> bool:
        """Whether logits are read from a decoder behind an encoder."""
        return self.architecture == "encoder-decoder"

    @property
    def causal(self) -> bool:
        """Whether the prompt sees nothing behind it, so that its states are computed once per candidate."""
        return self.architecture == "decoder"

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest row that the graphs take: the prompt positions and one on each side."""
        return 2 if self.prompt_mode == "cat" else self.n_prompt_tokens + 2


class Bundle:
    """A bundle folder that has been read and checked."""

    def __init__(self, path: Path, info: BundleInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def read(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read `path`/bundle.json and check its format and the sha256 of every file.

        Raises BundleError for a folder that is not a bundle or of another format, and for a missing or changed file.
        """
        path = Path(path)
        manifest = path / "bundle.json"
        if not manifest.is_file():
            raise BundleError(f"{path} is not a bundle (it has no bundle.json); create one with bbt-accel export")
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


def first_problem(error: Exception) -> str:
    """The first problem of a validation error, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return str(error).splitlines()[0]
