"""Packages in optimum-onnx: python optimum_onnx.py REQUEST.json REPLY.json"""

import sys
from importlib.metadata import version

from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForSequenceClassification
from texts import classify_all


def load(case):
    folder, _, name = case["model"].rpartition("/")
    options = SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact without VNNI as well
    return ORTModelForSequenceClassification.from_pretrained(
        case["folder"], subfolder=folder, file_name=name, session_options=options
    )


if __name__ == "__main__":
    names = ("optimum-onnx", "transformers", "onnxruntime")
    classify_all(load, {name: version(name) for name in names}, *sys.argv[1:])
