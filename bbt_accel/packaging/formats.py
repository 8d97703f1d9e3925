"""The formats of packages: what each writes, and how its model is opened for the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bbt_accel.engine_specs import Precision
from bbt_accel.packaging.classifier import Classifier
from bbt_accel.packaging.compare import LoadedModel
from bbt_accel.packaging.configuration import DTYPES, classifier_config, write_json
from bbt_accel.packaging.onnx_model import open_onnx, write_onnx
from bbt_accel.packaging.openvino_model import open_openvino, write_openvino
from bbt_accel.packaging.tokenizer import configuration


@dataclass(frozen=True)
class Format:
    """engine: whose bundles it takes (their targets), and that `predict` runs for the comparison.

    write: the files of a package; returns the name of the model's. open: that file, in a precision, with so many threads.
    usage: how a loader takes the folder, for the card.
    """

    engine: str
    targets: tuple[str, ...]
    write: Callable[[Classifier, list[str], Path], str]
    open: Callable[[Path, Precision, int | None], LoadedModel]
    usage: str


def write_texts(made: Classifier, labels: list[str], folder: Path, dtype: str = "fp32") -> None:
    """config.json, tokenizer.json and tokenizer_config.json."""
    write_json(folder / "config.json", classifier_config(made, labels, dtype))
    write_json(folder / "tokenizer.json", made.layout.tokenizer)
    write_json(folder / "tokenizer_config.json", configuration(made.layout.tokenizer, made.layout.max_length))


def write_onnx_package(made: Classifier, labels: list[str], folder: Path) -> str:
    dtype = DTYPES.get(made.info.precision, "fp32")
    name = {"q8": "onnx/model_quantized.onnx", "fp16": "onnx/model_fp16.onnx"}.get(dtype, "onnx/model.onnx")
    write_texts(made, labels, folder, dtype)
    write_onnx(made, folder / name)
    return name


def write_openvino_package(made: Classifier, labels: list[str], folder: Path) -> str:
    write_texts(made, labels, folder)
    write_openvino(made, folder / "openvino_model.xml")
    return "openvino_model.xml"


ONNX_USAGE = """With optimum-onnx (`{file}`; texts longer than the model reads are cut off):
```python
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

model = ORTModelForSequenceClassification.from_pretrained(".", subfolder="onnx", file_name="{name}")
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained("."))
classify({example})
```
With transformers.js:
```js
import {{ pipeline }} from "@huggingface/transformers";
const classify = await pipeline("text-classification", ".", {{ dtype: "{dtype}" }});
await classify("a text");
```
With ONNX Runtime alone: inputs `input_ids` and `attention_mask`, int64 (N, S), of `tokenizer.json`; output `logits`
(N, C), whose softmax are the probabilities. The template is in the graph, and the texts of users hold no special
token."""

OPENVINO_USAGE = """With optimum-intel; the hint keeps OpenVINO from computing in a lower precision than was compared:
```python
from optimum.intel import OVModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

model = OVModelForSequenceClassification.from_pretrained(".", ov_config={{"INFERENCE_PRECISION_HINT": "{hint}"}})
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained("."))
classify({example})
```
Inputs are `input_ids` and `attention_mask`, int64 (N, S), of `tokenizer.json`; the output is `logits` (N, C), whose
softmax are the probabilities."""

FORMATS = {
    "onnx": Format("ort", ("onnx", "ort"), write_onnx_package, open_onnx, ONNX_USAGE),
    "openvino": Format("openvino", ("onnx", "openvino"), write_openvino_package, open_openvino, OPENVINO_USAGE),
}
