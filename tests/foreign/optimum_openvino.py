"""Packages in optimum-intel: python optimum_openvino.py REQUEST.json REPLY.json"""

import sys
from importlib.metadata import version

from optimum.intel import OVModelForSequenceClassification
from texts import classify_all


def load(case):
    return OVModelForSequenceClassification.from_pretrained(
        case["folder"], ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )


if __name__ == "__main__":
    names = ("optimum-intel", "transformers", "openvino")
    classify_all(load, {name: version(name) for name in names}, *sys.argv[1:])
