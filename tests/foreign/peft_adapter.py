"""Adapters in PEFT: python peft_adapter.py REQUEST.json REPLY.json"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

NAMES = ("peft", "transformers", "torch")


def probabilities(case):
    """(N, C): the template around each text, as a user of the adapter writes it."""
    reading = json.loads((Path(case["folder"]) / "readout.json").read_text(encoding="utf-8"))
    start = reading["decoder_input_ids"]
    kind = AutoModelForCausalLM if start is None else AutoModelForSeq2SeqLM
    model = PeftModel.from_pretrained(
        kind.from_pretrained(case["checkpoint"]), case["folder"]
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(case["checkpoint"])
    bias = torch.tensor(reading["bias"] or [0.0] * len(reading["labels"]))
    rows = []
    for text in case["texts"]:
        before, _, behind = reading["template"].partition("{mask}")
        ids = tokenizer(before.format(text=text).strip(), add_special_tokens=False).input_ids
        if start is not None:
            ids += [
                start[1],
                *tokenizer(behind, add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
        given = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        }
        if start is not None:
            given["decoder_input_ids"] = torch.tensor([start])
        with torch.inference_mode():
            logits = model(**given).logits[0, -1, reading["label_token_ids"]]
        rows.append((logits + bias).softmax(0).tolist())
    return rows


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reply = {"versions": {name: version(name) for name in NAMES}}
    reply["found"] = {name: {"one": probabilities(case)} for name, case in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(reply), encoding="utf-8")
