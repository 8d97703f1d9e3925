"""config.json of a package: the backbone's, as that of a classifier whose graph is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bbt_accel.packaging.packaged_run import PackagedRun

OTHER_HEADS = ("task_specific_params", "auto_map", "classifier_dropout", "_name_or_path", "quantization_config")
DTYPES = {"int8": "q8", "fp16": "fp16"}
"""Precision → what transformers.js calls the file of this precision; model.onnx is fp32 to it, whatever is inside."""


def classifier_config(made: PackagedRun, labels: list[str], dtype: str) -> dict[str, Any]:
    """The backbone's own fields stay, by which loaders choose their classes.

    dtype: transformers.js's name of the model's file.
    """
    config = json.loads((Path(made.bundle.path) / "config.json").read_text(encoding="utf-8"))
    head = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", (config.get("architectures") or ["Model"])[0])
    config = {name: value for name, value in config.items() if name not in OTHER_HEADS}
    return config | {
        "architectures": [f"{head}ForSequenceClassification"],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "transformers.js_config": {"dtype": dtype},
    }


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
