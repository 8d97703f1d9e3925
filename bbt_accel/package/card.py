"""README.md of a package: the model card. Its front matter is what the hub reads."""

from __future__ import annotations

import json
from pathlib import Path

from bbt_accel.core.backbone_names import backbone_name, hub_id
from bbt_accel.core.bundle import TemplateGroup
from bbt_accel.io.reporting import cell
from bbt_accel.package.compose import has_data_file
from bbt_accel.package.configuration import javascript_options
from bbt_accel.package.manifest import PackageInfo
from bbt_accel.search.run import RunInfo

TEMPLATE = """---
{front}
---
# {task} with {backbone}

A classifier that bbt-accel {version} made from a frozen language model, with forward passes alone:
its input gets a soft prompt and a template, and a readout turns what the model returns into the
logits of the classes.

| | |
|---|---|
{facts}

## Use
{usage}

## What was compared
{comparison}
"""
UNKNOWN = "not stated in the checkpoint's files; see where it is from"


def model_card(info: PackageInfo, run: RunInfo, usage: str, folder: Path) -> str:
    """The card of a package, in Markdown. usage: a text with the names of `usage_facts` in
    braces.
    """
    b = run.bundle
    from huggingface_hub import ModelCardData

    licence, name, base = b.license, backbone_name(b.backbone), hub_id(b.backbone, b.revision)
    adapter = (
        {"library_name": "peft", "base_model_relation": "adapter"} if info.kind == "peft" else {}
    )
    front = ModelCardData(
        license=licence,
        base_model=base,
        pipeline_tag="text-classification",
        tags=["bbt-accel", "prompt-tuning"],
        **adapter,
    )
    facts = card_facts(info, run) | {"licence of the backbone": licence or UNKNOWN}
    return TEMPLATE.format(
        front=front.to_yaml(),
        task=run.task.name,
        backbone=name,
        version=info.versions["bbt-accel"],
        usage=usage.format(**usage_facts(info, run, folder)),
        facts="\n".join(f"| {key} | {cell(str(value))} |" for key, value in facts.items()),
        comparison=compared(info),
    )


CALL = """const { logits } = await model(tokenizer(TEXTS, OPTIONS));
softmax(logits.tolist()[0]);"""
PIPELINE = """import { pipeline } from "@huggingface/transformers";
const classify = await pipeline("text-classification", ".");
await classify("a text");"""
MODEL = f"""import {{
  AutoModelForSequenceClassification, AutoTokenizer, softmax
}} from "@huggingface/transformers";
const tokenizer = await AutoTokenizer.from_pretrained(".");
const model = await AutoModelForSequenceClassification.from_pretrained(".");
{CALL}"""
CUSTOM = f"""// It lists no decoders as classifiers, nor all encoder-decoders, but runs any graph
// as "custom".
import {{ AutoModel, AutoTokenizer, PretrainedConfig, softmax }} from "@huggingface/transformers";
const config = new PretrainedConfig({{ model_type: "custom", "transformers.js_config": FOUND }});
const tokenizer = await AutoTokenizer.from_pretrained(".");
const model = await AutoModel.from_pretrained(".", {{ config }});
{CALL}"""
"""How transformers.js takes a package: its pipeline of this task takes no pairs of texts."""
ADAPTER_INPUTS: dict[TemplateGroup, str] = {
    "causal": """text = reading["template"].format(**texts)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")""",
    "masked": """text = reading["template"].replace("{mask}", tokenizer.mask_token).format(**texts)
ids = tokenizer(text).input_ids
# Up to the mask.
read = [model.config.decoder_start_token_id, *ids[: ids.index(tokenizer.mask_token_id)]]
inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([read])}""",
    "span": """parts = reading["template"].split("{mask}")
before, after = (part.format(**texts) for part in parts)
# The decoder's first token, and the one that stands for the label word.
start = reading["decoder_input_ids"]
ids = tokenizer(before.strip(), add_special_tokens=False).input_ids
ids += [start[1], *tokenizer(after, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([start])}""",
}
"""How the inputs of an adapter are made, so that the last position is the one to read."""


def usage_facts(info: PackageInfo, run: RunInfo, folder: Path) -> dict[str, str]:
    """What the examples of a format's usage name."""
    pair, encoder = len(info.columns) > 1, info.architecture == "encoder"
    found = json.dumps(javascript_options(info.precision, has_data_file(folder / info.model)))
    javascript = CUSTOM.replace("FOUND", found) if not encoder else MODEL if pair else PIPELINE
    texts, second = ('["one"]', 'text_pair: ["another"], ') if pair else ('["a text"]', "")
    options = f"{{ {second}padding: true, truncation: true }}"
    return {
        "file": info.model,
        "name": Path(info.model).name,
        "task": run.task.name,
        "backbone": f'"{run.bundle.backbone}"'
        + (f', revision="{run.bundle.revision}"' if run.bundle.revision else ""),
        "auto": "AutoModelForSeq2SeqLM"
        if info.architecture == "encoder-decoder"
        else "AutoModelForCausalLM",
        "inputs": (
            "texts = "
            f"{json.dumps(dict.fromkeys(info.columns, 'a text'))}\n"
            f"{ADAPTER_INPUTS[info.template_group]}"
        ),
        "javascript": javascript.replace("TEXTS", texts).replace("OPTIONS", options),
        "hint": "bf16" if info.precision == "bf16" else "f32",
        "example": '{"text": "one", "text_pair": "another"}' if pair else '"a text"',
    }


def card_facts(info: PackageInfo, run: RunInfo) -> dict[str, object]:
    """What a reader has to know to trust the result, and to make it again."""
    b, data = run.bundle, run.data
    facts: dict[str, object] = {
        "backbone": backbone_name(b.backbone) + (f", revision {b.revision}" if b.revision else ""),
        "method": f"{b.method}, {b.prompt_mode}, {run.prompt_shape[-2]} prompt tokens",
        "precision": info.precision
        + (f", calibrated on {info.calibrated_on}" if info.calibrated_on else ""),
        "task": f"{run.task.name}; text: {', '.join(info.columns)}",
        "template": repr(run.task.template(info.template_group)),
        **({"before every row": run.context} if run.context else {}),
        "label words": "; ".join(", ".join(own) for own in run.task.all_words(info.template_group)),
        "labels": ", ".join(f"{i} = {label}" for i, label in enumerate(info.labels)),
        "readout": info.readout,
        "longest text": f"{info.max_tokens} tokens; longer texts are truncated",
        "rows": f"{data.train_rows} train, {data.dev_rows} dev; sha256 {data.digest}",
        "forward passes of the search": (
            f"{run.calls} calls, {run.seconds:.1f} s on {run.engine.name}"
        ),
    }
    if info.score is not None:
        s = info.score
        facts[f"{s.metric} on {s.rows} test rows"] = f"{s.score:.4f}"
        unbiased = f"{s.batch_calibrated:.4f} with the label bias removed"
        facts["the same without a prompt"] = f"{s.without_prompt:.4f} ({unbiased})"
    versions = {"search": run.versions, "package": info.versions}
    facts |= {
        f"versions, {what}": ", ".join(f"{n} {v}" for n, v in of.items())
        for what, of in versions.items()
    }
    facts["sha256 of run.json, bundle.json"] = f"{info.run.digest}, {info.bundle.digest}"
    return facts | {"command": f"`{info.command}`"}


def compared(info: PackageInfo) -> str:
    """What the comparison with `predict` has shown."""
    c = info.comparison
    # No tokenizer is part of an adapter: its user's reads the texts.
    same = (
        ", both by bbt-accel's tokenization:"
        if info.kind == "peft"
        else ": the token ids are the same,"
    )
    found = (
        f"{c.rows} texts (sha256 {c.digest}) went through this package and through bbt-accel's "
        f"`predict`{same} "
        f"the scores differ by at most {c.largest_error:.1e}."
    )
    if c.labels_differ:
        found += f" {c.labels_differ} texts have another label, of two with almost the same score."
    return (
        f"{found} `bbt-accel package --check` repeats it, and verifies the sha256 of every "
        "file in `bbt_accel.json`."
    )
