"""Readouts: from what a forward pass returns to class scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from bbt_accel.batch import Float32, Float64, Int64
from bbt_accel.bundle import STATES
from bbt_accel.errors import RunError, first_line
from bbt_accel.files import sha256, write_atomically
from bbt_accel.logits import class_logits
from bbt_accel.prototypes import prototype_scores
from bbt_accel.settings import ReadoutName

REGRESSIONS = ("words", "state", "mean", "states")  # logistic regressions on features
LINEAR = ("found", *REGRESSIONS, "ensemble")  # features times a weight, plus a bias
OF_WORDS = ("found", "words")  # whose features are the logits of further words
STATES_OF = {
    "prototype": STATES[:1],
    "state": STATES[:1],
    "mean": STATES[1:],
    "states": STATES,
    "ensemble": STATES,
}
"""The hidden states that a readout reads, if any."""
Outputs = Mapping[str, Float32]
"""What `BoundBatch.outputs` returns, of one prompt: label_logits (N, M) and states."""


@dataclass(frozen=True)
class Readout:
    """Class scores of rows as a function of what a forward pass returns for them.

    name: one of `READOUTS`. classes: int64 (M,), the class of each label word, in the order of their logits; a class
        with several words has the mean of theirs. token_ids: int64 (F,), further words whose logits are features.
    arrays: float64, what was fitted.
    """

    name: ReadoutName
    classes: Int64
    token_ids: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    arrays: dict[str, Float64] = field(default_factory=dict)

    def biased(self, bias: Float64) -> Readout:
        """The same with a bias (C,) added to its scores; not for the verbalizer, which has no numbers."""
        name = "radius" if self.name == "prototype" else "bias"
        return replace(self, arrays=self.arrays | {name: self.arrays[name] + bias})

    def class_logits(self, outputs: Outputs) -> Float64:
        """The verbalizer: float64 (…, N, C)."""
        return class_logits(outputs["label_logits"], self.classes)

    def scores(self, outputs: Outputs) -> Float64:
        """Class scores, float64 (…, N, C), whose softmax gives the probabilities."""
        if self.name == "verbalizer":
            return self.class_logits(outputs)
        if self.name == "calibrated":
            return self.class_logits(outputs) + self.arrays["bias"]
        if self.name == "prototype":
            return prototype_scores(self.arrays, outputs["readout_state"], self.class_logits(outputs))
        x = np.concatenate(features(self.name, outputs, self.classes), axis=-1)
        return x @ self.arrays["weight"] + self.arrays["bias"]

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
                return cls(tensors.metadata()["name"], arrays.pop("classes"), arrays.pop("token_ids"), arrays)
        except Exception as error:  # safetensors raises its own, besides OSError and KeyError
            raise RunError(f"cannot read {file} ({first_line(error)}); tune again") from None


def reads_states(name: ReadoutName) -> bool:
    """Whether a readout needs hidden states besides label logits."""
    return name in STATES_OF


def features(name: str, outputs: Outputs, classes: Int64) -> list[Float64]:
    """The blocks of features that a linear readout takes, each float64 (…, N, F)."""
    if name in OF_WORDS:
        return [np.asarray(outputs["label_logits"][..., len(classes) :], np.float64)]
    states = [np.asarray(outputs[state], np.float64) for state in STATES_OF[name]]
    return [class_logits(outputs["label_logits"], classes), *states] if name == "ensemble" else states
