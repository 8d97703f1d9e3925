"""The exported folder: graphs, weights, tokenizer and bundle.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from bbt_accel.core.engine_specs import Precision
from bbt_accel.core.option_types import METHOD, PROMPT_MODE, PromptTokens
from bbt_accel.errors import BundleError, translated
from bbt_accel.io.files import sha256
from bbt_accel.io.manifests import PLANS, SealedManifest, check_files

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

INFO = "bundle.json"
"""Folder of TensorRT plans: a cache that machines add to, so it is not part of a bundle's
sha256.
"""
PROJECT, STATISTICS = "project", "statistics"
"""Graphs from z to prompts and from label logits to batch statistics, for engines on a GPU; not
backbone stages.
"""
STATES = ("readout_state", "mean_state")
"""What the last stage returns besides `label_logits`: see `BoundBatch.outputs`."""
PROMPT_FACTS = ("backbone", "revision", "method", "prompt_mode", "prompt_init")
"""What bundles have in common, with the prompt's shape, that take the same prompts."""
OPENVINO_WEIGHTS = "weights.bin"
"""The constants of all stages of an OpenVINO bundle, each once."""
INITIAL_PROMPT = "initial_prompt.safetensors"
"""Holds `prompt`, the embeddings of the text that a cat-mode prompt starts from."""
Method = Literal["bbt", "bbtv2"]
PromptMode = Literal["add", "cat"]
Architecture = Literal["encoder", "encoder-decoder", "decoder"]
TemplateGroup = Literal["masked", "span", "causal"]
"""How a row is written and where its logits are read: at the mask token of a masked LM; at the
sentinel in the decoder of a span-corruption model (position 1, behind the start token); at the last
real token of a causal LM."""


TokenId = Annotated[int, Field(ge=0, lt=2**26)]
StageName = Annotated[str, Field(pattern=r"^\w+$")]  # names files, which must lie in the bundle


class SpecialTokens(BaseModel, extra="forbid"):
    """Vocabulary ids that the encoding uses; None where rows of this family have no such token."""

    begin: TokenId | None = Field(description="Begins every row.")
    end: TokenId | None = Field(description="Ends every row.")
    pad: TokenId = Field(description="Pads rows on the right.")
    mask: TokenId | None = Field(
        description="Where the label word is read; for the group `span` its sentinel."
    )
    mask_text: str | None = Field(
        description="The mask token's, e.g. `<mask>`; the sentinel's for the group `span`."
    )
    decoder_start: TokenId | None = Field(description="Begins the decoder's input.")


class BundleInfo(SealedManifest):
    """bundle.json."""

    format: int = Field(default=4, description="Version of this file.")
    backbone: str = Field(description="Hub id, demo, or the path of a local checkpoint.")
    revision: str | None = Field(
        description="Of the hub: what was asked for, else the commit; None for a local one."
    )
    license: str | None = Field(
        default=None, description="Of the checkpoint, as its model card names it."
    )
    family: str = Field(
        description="Name of the family that exported it; for readers, nothing depends on it."
    )
    architecture: Architecture = Field(
        description="Where logits are read: an encoder, a decoder, or one behind an encoder."
    )
    template_group: TemplateGroup = Field(
        description="Which of a task's templates and label words apply."
    )
    method: Method = Field(description=METHOD)
    prompt_mode: PromptMode = Field(description=PROMPT_MODE)
    n_prompt_tokens: PromptTokens
    hidden_size: int = Field(ge=1, le=2**20, description="H.")
    n_layers: int = Field(
        ge=1,
        le=2**14,
        description="Blocks that take a prompt: those of the encoder where there is one.",
    )
    vocab_size: int = Field(ge=1, le=2**26, description="Rows of the word embedding.")
    max_length: int = Field(
        ge=1,
        le=2**26,
        description="Tokens of the longest row, with special and (in add mode) prompt tokens.",
    )
    word_embedding_std: float = Field(
        description="σ_e of the word embedding: the scale of a prompt."
    )
    special: SpecialTokens = Field(description="The special tokens that rows need.")
    prompt_init: str | None = Field(
        default=None, description="The text that the prompt starts from."
    )
    prompt_ids: list[TokenId] | None = Field(default=None, description="Its token ids.")
    precision: Precision = Field(
        description="Of the graphs; int8 and int4 keep some of it in fp32."
    )
    target: str = Field(
        description="`onnx` as exported, else the engine that it was optimized for."
    )
    without: list[str] = Field(
        default=[], description="Names of `OPTIMIZATIONS` that the graphs leave out."
    )
    opset: int = Field(description="ONNX opset of the graphs.")
    stages: list[StageName] = Field(
        description="Graphs in the order in which they run: context for a decoder, then model "
        "for bbt; embed, block_00, …, last for bbtv2."
    )
    versions: dict[str, str] = Field(description="Of the libraries that wrote it.")
    max_error: float | None = Field(
        default=None,
        description="Largest error of label logits against eager PyTorch; where optimized, "
        "the source's, plus the largest difference from the source.",
    )
    source: str | None = Field(
        default=None, description="sha256 of the bundle.json that this one was optimized from."
    )
    optimization: dict[str, object] | None = Field(
        default=None, description="What `optimize` did and measured."
    )
    sha256: dict[str, str] = Field(default={}, description="Of every file but this one and plans.")

    @property
    def prompt_shape(self) -> tuple[int, ...]:
        """Shape of one candidate's prompt: (n, H) for bbt, (L, n, H) for bbtv2."""
        one = (self.n_prompt_tokens, self.hidden_size)
        return one if self.method == "bbt" else (self.n_layers, *one)

    @property
    def searched_layers(self) -> int:
        """Layers whose prompts are searched for: 1 for bbt, L for bbtv2."""
        return 1 if self.method == "bbt" else self.n_layers

    @property
    def decodes(self) -> bool:
        """Whether logits are read from a decoder behind an encoder."""
        return self.architecture == "encoder-decoder"

    @property
    def causal(self) -> bool:
        """Whether the prompt sees nothing behind it, so that its states are computed once per
        candidate.
        """
        return self.architecture == "decoder"

    @property
    def prompt_start(self) -> int:
        """Position of the first prompt token in a row, which may follow a shared context: behind
        the begin token.

        Encoders in cat mode have the prompt in front of it.
        """
        in_front = self.special.begin is None or (self.prompt_mode == "cat" and not self.causal)
        return 0 if in_front else 1

    @property
    def prefix_columns(self) -> int:
        """Columns that all of a decoder's rows in a call share: the begin token, and the tokens
        under the prompt.
        """
        return (
            self.prompt_start + (0 if self.prompt_mode == "cat" else self.n_prompt_tokens)
            if self.causal
            else 0
        )

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest row that the graphs take: the prompt's, and one on each side or
        two behind it.
        """
        return (
            self.prefix_columns
            if self.causal
            else 0
            if self.prompt_mode == "cat"
            else self.n_prompt_tokens
        ) + 2


class Bundle:
    """A bundle folder that has been read and checked."""

    def __init__(self, path: Path, info: BundleInfo) -> None:
        self.path, self.info = path, info

    @classmethod
    def read(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read `path`/bundle.json and check its format and the sha256 of every file that it names.

        Raises BundleError for a folder that is not a bundle or of another format, and for a missing
        or changed file.
        """
        file, make = Path(path) / INFO, "create one with bbt-accel export"
        bundle = cls(
            Path(path), BundleInfo.read(file, "bundle", BundleError, make, "export it again")
        )
        bundle.info.check_seal(file, BundleError, "export the bundle again")
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Raises BundleError for a file that is missing or has changed since the bundle was written
        (sha256).
        """
        check_files(self.path, self.info.sha256, "bundle", BundleError, "export it again")

    def require(self, method: Method) -> None:
        """Raises BundleError if the bundle was exported for the other method."""
        if self.info.method != method:
            problem = f"{self.path} was exported for {self.info.method}, not {method}"
            raise BundleError(f"{problem}; export one with --method {method}")

    def initial_prompt(self) -> NDArray[float32] | None:
        """p0, float32 (n, H), of a bundle whose cat-mode prompt starts from a text."""
        from safetensors.numpy import load_file  # numpy is not needed to read bundle.json

        file = self.path / INITIAL_PROMPT
        if INITIAL_PROMPT not in self.info.sha256:  # a file that was added is not read
            return None
        with translated(BundleError, f"{file} cannot be read; export the bundle again"):
            return load_file(file)["prompt"]

    def start_prompt(self) -> NDArray[float32]:
        """The prompt of z = 0: float32 (n, H) or (L, n, H)."""
        import numpy as np

        p0 = self.initial_prompt()
        return np.zeros(self.info.prompt_shape, np.float32) if p0 is None else p0

    @property
    def digest(self) -> str:
        """sha256 of bundle.json, which names the sha256 of every other file."""
        return sha256(self.path / INFO)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


def write_info(folder: Path, info: BundleInfo) -> BundleInfo:
    """Hash every file of `folder`, but for plans, into `info` and write bundle.json."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    hashes = {
        name: sha256(p)
        for name, p in files.items()
        if p.name != INFO and Path(name).parts[0] != PLANS
    }
    info = info.model_copy(update={"sha256": hashes})
    info.seal(folder / INFO)
    return info


def block_stage(layer: int) -> str:
    """Name of the graph of one block, of bbtv2."""
    return f"block_{layer:02d}"


def block_of(stage: str) -> int:
    """The block of a graph with such a name."""
    return int(stage.removeprefix("block_"))


def output_name(state: str) -> str:
    """Name of a block's output that the next block takes as `state`: a graph has no two tensors of
    one name.
    """
    return f"{state}_out"


def state_name(output: str) -> str:
    """Name of the next stage's input that a stage's output is."""
    return output.removesuffix("_out")
