"""Readouts: from what a forward pass returns to class scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from bbt_accel.core.batch import Float32, Float64, Int64
from bbt_accel.core.bundle import STATES
from bbt_accel.core.logits import class_logits
from bbt_accel.core.settings import ReadoutName
from bbt_accel.errors import RunError, first_line
from bbt_accel.io.files import sha256, write_atomically
from bbt_accel.search.prototypes import prototype_scores

READS: dict[ReadoutName, tuple[str, ...]] = {
    "verbalizer": ("class_logits",),
    "calibrated": ("class_logits",),
    "found": ("word_logits",),
    "prototype": ("readout_state", "class_logits"),
    "words": ("word_logits",),
    "state": ("readout_state",),
    "mean": ("mean_state",),
    "states": ("readout_state", "mean_state"),
    "ensemble": ("class_logits", "readout_state", "mean_state"),
}
"""What each readout reads of a forward pass, in the order of its weights: states of the bundle's
`STATES`, the logits of further words, or those of the classes, the mean over their label words."""
Outputs = Mapping[str, Float32]
"""What `BoundBatch.outputs` returns, of one prompt: label_logits (N, M) and states."""


@dataclass(frozen=True)
class Readout:
    """Class scores of rows as a function of what a forward pass returns for them.

    name: one of `READOUTS`. classes: int64 (M,), the class of each label word, in the order of
        their logits; a class with several words has the mean of theirs. token_ids: int64 (F,),
        further words whose logits are features.
    arrays: float64, what was fitted.
    """

    name: ReadoutName
    classes: Int64
    token_ids: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    arrays: dict[str, Float64] = field(default_factory=dict)

    def biased(self, bias: Float64) -> Readout:
        """The same with a bias (C,) added to its scores; not for the verbalizer, which has no
        numbers.
        """
        name = "radius" if self.name == "prototype" else "bias"
        return replace(self, arrays=self.arrays | {name: self.arrays[name] + bias})

    def scores(self, outputs: Outputs) -> Float64:
        """Class scores, float64 (…, N, C), whose softmax gives the probabilities.

        What it reads, side by side; times its weight and plus its bias where it has them.
        Prototypes are apart.
        """
        blocks = features(self.name, outputs, self.classes)
        if self.name == "prototype":
            return prototype_scores(self.arrays, *blocks)
        x = np.concatenate(blocks, axis=-1) if len(blocks) > 1 else blocks[0]
        x = x @ self.arrays["weight"] if "weight" in self.arrays else x
        return x + self.arrays["bias"] if "bias" in self.arrays else x

    def save(self, file: Path) -> str:
        """Write it as safetensors; returns the file's sha256."""
        tensors = {**self.arrays, "classes": self.classes, "token_ids": self.token_ids}
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        write_atomically(file, save(tensors, {"name": self.name}))
        return sha256(file)

    @classmethod
    def load(cls, file: Path) -> Readout:
        """Raises RunError for a file that is not a readout."""
        try:
            with safe_open(file, "numpy") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                return cls(
                    tensors.metadata()["name"],
                    arrays.pop("classes"),
                    arrays.pop("token_ids"),
                    arrays,
                )
        except Exception as error:  # safetensors raises its own, besides OSError and KeyError
            raise RunError(f"cannot read {file} ({first_line(error)}); tune again") from None


def reads_words(name: ReadoutName) -> bool:
    """Whether a readout needs the logits of further words."""
    return "word_logits" in READS[name]


def reads_states(name: ReadoutName) -> bool:
    """Whether a readout needs hidden states besides label logits."""
    return not {*STATES}.isdisjoint(READS[name])


def features(name: ReadoutName, outputs: Outputs, classes: Int64) -> list[Float64]:
    """The blocks that a readout reads, each float64 (…, N, F)."""
    return [np.asarray(_block(block, outputs, classes), np.float64) for block in READS[name]]


def _block(block: str, outputs: Outputs, classes: Int64) -> npt.ArrayLike:
    if block == "word_logits":
        return outputs["label_logits"][..., len(classes) :]
    return (
        class_logits(outputs["label_logits"], classes)
        if block == "class_logits"
        else outputs[block]
    )
