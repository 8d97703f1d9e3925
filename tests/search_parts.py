"""What the tests of the search share: a bundle without graphs, a task with its rows, and batches
made by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle, BundleInfo, SpecialTokens, write_info
from bbt_accel.core.objective import Objective
from bbt_accel.core.settings import Settings
from bbt_accel.search.evaluator import Job
from bbt_accel.search.run import EngineRecord

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    "bad",
    "great",
    "it",
    "was",
    ".",
    *(f"w{i}" for i in range(90)),
]
TASK = """
name = "toy"
metric = "accuracy"
text = ["text"]
n_classes = 2
[templates]
masked = "{text} . it was {mask} ."
[label_words]
masked = ["bad", "great"]
[presets.bbt]
intrinsic_dim = 6
popsize = 4
budget = 80
[presets.bbtv2]
sigma = 0.5
alpha = 0.5
intrinsic_dim = 6
popsize = 4
budget = 80
"""
SETTINGS: dict[str, object] = {"readout": "verbalizer", "k_shot": 3, "eval_every": 10, "seed": 7}


def search_bundle(folder: Path, method: str = "bbt", precision: str = "fp32") -> Bundle:
    """4 prompt tokens, hidden size 3, 3 layers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    info = BundleInfo(
        backbone="toy",
        revision=None,
        family="roberta",
        architecture="encoder",
        template_group="masked",
        method=method,  # type: ignore[arg-type]
        prompt_mode="add",
        n_prompt_tokens=4,
        hidden_size=3,
        n_layers=3,
        vocab_size=len(WORDS),
        max_length=40,
        word_embedding_std=1.0,
        special=SpecialTokens(
            begin=0, end=2, pad=1, mask=4, mask_text="<mask>", decoder_start=None
        ),
        precision=precision,  # type: ignore[arg-type]
        target="onnx",
        opset=20,
        stages=[],
        versions={},
    )
    write_info(folder, info)
    return Bundle.read(folder)


def task_file(folder: Path) -> Path:
    """The toy task; beside it train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 30), ("test", 70)):
        rows = [{"text": f"w{i % 90} w{(i * 7) % 90}", "label": i % 2} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "task.toml"
    file.write_text(TASK)
    return file


def job(bundle: Bundle, settings: Settings, train: Batch, dev: Batch, engine: str = "dummy") -> Job:
    """What a search of these rows needs; the words whose logits are features are tokens 20 to
    39.
    """
    record = EngineRecord(name=engine, device="cpu", threads=1, without=[])
    whole = {
        name: np.concatenate([value, getattr(dev, name)]) for name, value in train.arrays().items()
    }
    rows = Batch(
        **{**whole, "label_token_ids": np.concatenate([train.label_token_ids, np.arange(20, 40)])}
    )
    classes = np.arange(len(train.label_token_ids))
    return Job(
        bundle, record, settings, Objective(settings.loss, "accuracy"), train, dev, rows, classes
    )


def batch(rows: int = 8, classes: int = 2, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(5, 90, (rows, 6))
    ones = np.ones_like(ids)
    return Batch(ids, ones, ones[:, 0], np.arange(rows) % classes, np.arange(5, 5 + classes))
