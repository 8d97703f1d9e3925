"""config.json of a package: the backbone's, as that of a classifier whose graph is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bbt_accel.core.engine_specs import Precision
from bbt_accel.package.packaged_run import PackagedRun

OTHER_HEADS = (
    "task_specific_params",
    "auto_map",
    "classifier_dropout",
    "_name_or_path",
    "quantization_config",
)
DTYPES = {"int8": "q8", "fp16": "fp16"}
"""Precision → what transformers.js calls the file of this precision; model.onnx is fp32 to it,
whatever is inside.
"""


def javascript_options(precision: Precision, external: bool) -> dict[str, object]:
    """How transformers.js finds a model: by the name of its dtype; external: with weights in a file
    FILE_data.
    """
    found: dict[str, object] = {"dtype": DTYPES.get(precision, "fp32")}
    return found | ({"use_external_data_format": True} if external else {})


def classifier_config(
    made: PackagedRun, labels: list[str], javascript: dict[str, object]
) -> dict[str, Any]:
    """The backbone's own fields stay, by which loaders choose their classes. javascript:
    `javascript_options`.
    """
    config = json.loads((Path(made.bundle.path) / "config.json").read_text(encoding="utf-8"))
    head = re.sub(
        r"(For[A-Z]\w*|LMHeadModel|Model)$", "", (config.get("architectures") or ["Model"])[0]
    )
    config = {name: value for name, value in config.items() if name not in OTHER_HEADS}
    return config | {
        "architectures": [f"{head}ForSequenceClassification"],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "transformers.js_config": javascript,
    }


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
