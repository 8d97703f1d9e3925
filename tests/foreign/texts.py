"""What the loaders in Python share: transformers' pipeline over the texts of each case."""

import json
import warnings
from pathlib import Path

from transformers import PreTrainedTokenizerFast, logging, pipeline


def classify_all(load, versions, request, reply):
    """Write probabilities (N, C) of every case: one text at a time, as one padded batch, and with
    truncation.

    load: from a case to a model of transformers' kind.
    """
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = {}
    for name, case in json.loads(Path(request).read_text(encoding="utf-8")).items():
        model = load(case)
        classify = pipeline(
            "text-classification",
            model=model,
            tokenizer=PreTrainedTokenizerFast.from_pretrained(case["folder"]),
            top_k=None,
        )
        labels = [model.config.id2label[i] for i in range(len(model.config.id2label))]
        texts = [
            text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
            for text in case["texts"]
        ]

        def probabilities(given, classify=classify, labels=labels, **options):
            shares = [
                {entry["label"]: entry["score"] for entry in row}
                for row in classify(given, **options)
            ]
            return [[row[label] for label in labels] for row in shares]

        found[name] = {
            "one": [probabilities([text])[0] for text in texts],
            "batch": probabilities(texts, batch_size=len(texts)),
            "truncated": probabilities(texts, batch_size=3, truncation=True),
        }
    Path(reply).write_text(json.dumps({"versions": versions, "found": found}), encoding="utf-8")
