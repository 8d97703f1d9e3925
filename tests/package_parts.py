"""Runs of tiny backbones to package, and packages as a loader reads them: with tokenizers and a
runtime alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bbt_accel import tune
from bbt_accel.core.bundle import Bundle
from bbt_accel.search.run import Run

COLUMNS = {False: ["text"], True: ["first", "second"]}
TEMPLATES = {
    False: {
        "masked": "{text} It was {mask} .",
        "span": "text: {prompt} {text} It was {mask}",
        "causal": "{text} It was",
    },
    True: {
        "masked": "{first} ? {mask} , {second}",
        "span": "text: {prompt} {first} and {second} ? {mask}",
        "causal": "{first} and {second} ? It was",
    },
}
WORDS = {"masked": ["bad", "great"], "span": ["negative", "positive"], "causal": ["bad", "great"]}
SEVERAL = {group: [[words[0], "it"], [words[1]]] for group, words in WORDS.items()}
TEXTS = [
    "it was great",
    "a bad one",
    "7 apples, in total",
    "it",
    "was it great? it was",
    "b a d",
    "4 of 5",
    "so so",
]


def task_file(
    folder: Path,
    pair: bool = False,
    several: bool = False,
    columns: list[str] | None = None,
    templates: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A task with a text or a pair of texts, or other columns and templates, and its rows beside
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns, templates = columns or COLUMNS[pair], templates or TEMPLATES[pair]
    words = {group: (SEVERAL if several else WORDS)[group] for group in templates}
    task: dict[str, Any] = {"name": "mood", "text": columns, "n_classes": 2, **changes}
    lines = [f"{name} = {json.dumps(value)}" for name, value in task.items()]
    for name, value in {"templates": templates, "label_words": words}.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(own)}" for key, own in value.items())]
    (folder / "task.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, count in (("train", 16), ("test", 6)):
        rows = []
        for i in range(count):
            again = f" {i}" if i >= len(TEXTS) else ""  # held-out rows are of different texts
            texts = [TEXTS[(i + k) % len(TEXTS)] + again for k in range(len(columns))]
            rows.append(dict(zip(columns, texts, strict=True)) | {"label": i % 2})
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder / "task.toml"


def tuned(
    bundle: Bundle,
    folder: Path,
    readout: str = "verbalizer",
    demonstrations: int = 0,
    hold_out: bool = False,
    **task: Any,
) -> Run:
    """A run of a few calls, with a prompt that is not zero."""
    file = task_file(folder / "data", **task)
    settings: dict[str, object] = {
        "budget": 12,
        "popsize": 4,
        "intrinsic_dim": 6,
        "sigma": 3.0,
        "alpha": 3.0,
    }
    settings |= {"readout": readout, "k_shot": 3 if hold_out else 4}
    settings |= {"demonstrations": demonstrations, "hold_out": hold_out}
    return tune(
        bundle, str(file), data=folder / "data", engine="ort", threads=1, output=folder / "run",
        settings=settings,
        progress=False,
    )  # fmt: skip


class Foreign:
    """A package's folder, read as a loader reads it that knows nothing of bbt-accel."""

    def __init__(self, folder: Path, model: str = "onnx/model.onnx") -> None:
        import onnxruntime

        self.read_texts(folder)
        self.session = onnxruntime.InferenceSession(
            str(folder / model), providers=["CPUExecutionProvider"]
        )

    def read_texts(self, folder: Path) -> None:
        """All but the model."""
        self.configuration = json.loads(
            (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        )
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pad = self.configuration["pad_token"]
        self.tokenizer.enable_padding(pad_id=self.tokenizer.token_to_id(pad), pad_token=pad)

    def feeds(self, texts: list[Any]) -> dict[str, Any]:
        """What the tokenizer makes of texts, or pairs."""
        found = self.tokenizer.encode_batch(texts)
        ids, mask = (
            np.array([getattr(e, name) for e in found]) for name in ("ids", "attention_mask")
        )
        return {"input_ids": ids, "attention_mask": mask}

    @staticmethod
    def shares(logits: Any) -> Any:
        """The softmax."""
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def probabilities(self, texts: list[Any], truncate: bool = False) -> Any:
        """(N, C) of texts, or pairs."""
        self.tokenizer.no_truncation()
        if truncate:
            self.tokenizer.enable_truncation(self.configuration["model_max_length"])
        return self.shares(self.session.run(["logits"], self.feeds(texts))[0])
