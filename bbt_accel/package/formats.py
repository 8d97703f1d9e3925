"""The formats of packages: what each writes, and how its model is opened for the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bbt_accel.core.engine_specs import Precision
from bbt_accel.core.inference_protocol import DIGEST, bundle_facts
from bbt_accel.package.adapter import run_peft, write_peft
from bbt_accel.package.comparison import LoadedModel, PackageOutput, run_package
from bbt_accel.package.compose import has_data_file
from bbt_accel.package.configuration import classifier_config, javascript_options, write_json
from bbt_accel.package.manifest import Kind
from bbt_accel.package.onnx_model import open_onnx, write_onnx
from bbt_accel.package.openvino_model import open_openvino, write_openvino
from bbt_accel.package.packaged_run import PackagedRun
from bbt_accel.package.tokenizer import configuration
from bbt_accel.package.triton import model_config
from bbt_accel.package.web_page import add_libraries, write_page
from bbt_accel.tasks.data import Row

TRITON_ROWS = 64
"""Rows that Triton may put into one call of a classifier; it refuses requests of more."""
LABELS = "labels.txt"


@dataclass(frozen=True)
class Format:
    """engine: whose bundles it takes (their targets), and that `predict` runs for the comparison.

    write: the files of a package; returns the name of the model's. libraries: adds those that come
    from the network.
    run: the package as its loaders run it: the model of a folder on rows, with a number of threads
    or all cores.
    usage: how a loader takes the folder, for the card.
    """

    engine: str
    targets: tuple[str, ...]
    write: Callable[[PackagedRun, list[str], Path], str]
    run: Callable[[PackagedRun, Path, str, Sequence[Row], int | None], PackageOutput]
    usage: str
    libraries: Callable[[Path], None] | None = None


def run_with(
    open_model: Callable[[Path, Precision, int | None], LoadedModel], texts: str = "."
) -> Any:
    """`Format.run` of a format whose model takes the ids of a tokenizer, that of the folder
    `texts`.
    """

    def run(
        made: PackagedRun, folder: Path, model: str, rows: Sequence[Row], threads: int | None
    ) -> PackageOutput:
        return run_package(
            open_model(folder / model, made.info.precision, threads), folder / texts, made, rows
        )

    return run


def write_texts(
    made: PackagedRun,
    labels: list[str],
    folder: Path,
    precision: Precision = "fp32",
    external: bool = False,
) -> None:
    """config.json, tokenizer.json and tokenizer_config.json. precision, external: as in
    `javascript_options`.
    """
    write_json(
        folder / "config.json",
        classifier_config(made, labels, javascript_options(precision, external)),
    )
    write_json(folder / "tokenizer.json", made.layout.tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        configuration(made.layout.tokenizer, made.layout.max_length),
    )


def write_graph(made: PackagedRun, labels: list[str], folder: Path) -> str:
    suffix = {"int8": "_quantized", "fp16": "_fp16"}.get(
        made.info.precision, ""
    )  # as transformers.js looks for it
    name = f"onnx/model{suffix}.onnx"
    write_onnx(made, folder / name)
    write_texts(made, labels, folder, made.info.precision, has_data_file(folder / name))
    return name


def write_ir(made: PackagedRun, labels: list[str], folder: Path) -> str:
    write_texts(made, labels, folder)
    write_openvino(made, folder / "openvino_model.xml")
    return "openvino_model.xml"


def write_web(made: PackagedRun, labels: list[str], folder: Path) -> str:
    """The page, and the classifier in model/."""
    (folder / "model").mkdir()
    model = write_graph(made, labels, folder / "model")
    write_page(folder, folder / "model" / model)
    return f"model/{model}"


def write_triton(made: PackagedRun, labels: list[str], folder: Path) -> str:
    """A model repository with one model of the task's name; the tokenizer, for clients, beside
    it.
    """
    write_texts(made, labels, folder)
    name = made.encoder.task.name
    file = folder / name / "1" / "model.onnx"
    write_onnx(made, file)
    graph = onnx.load(file, load_external_data=False).graph
    if (
        len(list(file.parent.iterdir())) > 1
    ):  # Triton takes a model of more than one file as a folder of that name
        files = file.parent.rename(folder / "files")
        file.parent.mkdir()
        file = files.rename(file) / "model.onnx"
    # Without the digest: an int8 bundle that is made for a package is not kept.
    facts = {key: value for key, value in bundle_facts(made.bundle).items() if key != DIGEST}
    config = model_config(graph, name, TRITON_ROWS, LABELS, facts)
    (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
    names = (" ".join(label.split()) for label in labels)
    (folder / name / LABELS).write_text("\n".join(names) + "\n", encoding="utf-8")
    return file.relative_to(folder).as_posix()


ONNX_USAGE = """With optimum-onnx (`{file}`; texts longer than the model reads are truncated):
```python
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import PreTrainedTokenizerFast, pipeline

model = ORTModelForSequenceClassification.from_pretrained(
    ".", subfolder="onnx", file_name="{name}"
)
tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
classify({example})
```
With transformers.js:
```js
{javascript}
```
With ONNX Runtime alone: inputs `input_ids` and `attention_mask`, int64 (N, S), of `tokenizer.json`;
output `logits` (N, C); their softmax gives the probabilities. The template is in the graph, and the
texts of users hold no special token."""

OPENVINO_USAGE = """With optimum-intel; the hint keeps OpenVINO from computing in a lower precision
than was compared:
```python
from optimum.intel import OVModelForSequenceClassification
from transformers import PreTrainedTokenizerFast, pipeline

model = OVModelForSequenceClassification.from_pretrained(
    ".", ov_config={{"INFERENCE_PRECISION_HINT": "{hint}"}}
)
tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
classify({example})
```
Inputs are `input_ids` and `attention_mask`, int64 (N, S), of `tokenizer.json`; the output is
`logits` (N, C); their softmax gives the probabilities."""

PEFT_USAGE = """With PEFT, on the same checkpoint:
```python
import json

import torch
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

model = PeftModel.from_pretrained({auto}.from_pretrained({backbone}), ".").eval()
tokenizer = AutoTokenizer.from_pretrained({backbone})
reading = json.load(open("readout.json", encoding="utf-8"))

{inputs}
with torch.inference_mode():
    words = model(**inputs).logits[0, -1, reading["label_token_ids"]]
of_class = torch.tensor(reading["classes"])
scores = torch.stack([words[of_class == c].mean() for c in range(len(reading["labels"]))])
scores += torch.tensor(reading["bias"] or 0.0)
print(dict(zip(reading["labels"], scores.softmax(0).tolist())))
```
The input is the template with the stripped text, one at a time. A decoder's begin token and context
are the first of the adapter's vectors, so its text is tokenized without special tokens.
`readout.json` holds the template, the vocabulary ids of the label words, the class of each, of
which the mean logit is the class's score, and the bias of the classes, if they have one."""

TRITON_USAGE = f"""Triton Inference Server takes this folder as its model repository:
```
tritonserver --model-repository .
```
The model `{{task}}` runs in the onnxruntime backend: inputs `input_ids` and `attention_mask`, int64
(N, S), of `tokenizer.json`, N up to {TRITON_ROWS}; output `logits` (N, C); their softmax gives the
probabilities. Clients tokenize. A request with the parameter `classification` gets the names of the
labels (`{{task}}/labels.txt`). Triton batches requests of equal S: pad to a few lengths
(`pad_to_multiple_of`) so that it can."""

WEB_USAGE = """Serve the folder with any web server and open it in a browser:
```
python -m http.server
```
The page makes no request to another host, and no text leaves it. `vendor/` holds transformers.js
(Apache-2.0) and onnxruntime-web (MIT) as npm has them, and their licences; `model/` is a package
for transformers.js."""

FORMATS: dict[Kind, Format] = {
    "onnx": Format("ort", ("onnx", "ort"), write_graph, run_with(open_onnx), ONNX_USAGE),
    "openvino": Format(
        "openvino", ("onnx", "openvino"), write_ir, run_with(open_openvino), OPENVINO_USAGE
    ),
    "peft": Format("ort", ("onnx", "ort"), write_peft, run_peft, PEFT_USAGE),
    "triton": Format("ort", ("onnx", "ort"), write_triton, run_with(open_onnx), TRITON_USAGE),
    "web": Format(
        "ort", ("onnx", "ort"), write_web, run_with(open_onnx, "model"), WEB_USAGE, add_libraries
    ),
}
