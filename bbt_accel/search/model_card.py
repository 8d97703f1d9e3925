"""The model card of a run: README.md in its folder, with the metadata that the Hugging Face hub
reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bbt_accel.core.backbone_names import backbone_name, hub_id
from bbt_accel.core.objective import wilson
from bbt_accel.io.reporting import METRICS, cell, percent
from bbt_accel.search.run import RunInfo

TEMPLATE = Path(__file__).parent / "model_card.md.j2"


def model_card(info: RunInfo) -> str:
    """The text of the card. It names no path of this machine."""
    from huggingface_hub import ModelCard, ModelCardData

    record, metric = info.bundle, METRICS[info.task.metric]
    data = ModelCardData(
        license=record.license,
        base_model=hub_id(record.backbone, record.revision),
        library_name="bbt-accel",
        pipeline_tag="text-classification",
        metrics=[info.task.metric],
        tags=["black-box-tuning", "prompt-tuning"],
    )
    return str(
        ModelCard.from_template(data, template_path=str(TEMPLATE), metric=metric, **facts(info))
    )


def facts(info: RunInfo) -> dict[str, Any]:
    """What the template is filled with."""
    record, rows = info.bundle, info.data.dev_rows
    given = [name for name, template in info.task.templates.items() if template is not None]
    template = info.task.templates[record.template_group or given[0]]
    own = info.best.dev_score if info.best else None
    low, high = (
        wilson(own, rows) if own is not None and info.task.metric == "accuracy" else (None, None)
    )
    baselines = {} if info.baselines is None else info.baselines.model_dump()
    scores = {**baselines, "this classifier": own}
    return {
        "task": info.task.name,
        "backbone": backbone_name(record.backbone),
        "classes": list(map(cell, info.class_names)),
        "version": info.versions["bbt-accel"],
        "columns": list(map(cell, info.task.text)),
        "template": cell(str(template)),
        "context": cell(info.context),
        "words": list(map(cell, info.label_words)),
        "readout": info.readout.name,
        "searched": info.readout.searched,
        "method": record.method,
        "prompt_tokens": info.prompt_shape[-2] if info.prompt_shape else 0,
        "precision": record.precision,
        "engine": info.engine.name,
        "license": record.license,
        "dev_rows": rows,
        "train_rows": info.data.train_rows,
        "interval": None if low is None else f"{percent(low, 0)} to {percent(high, 0)} %",
        "scores": [(name.replace("_", " "), percent(score, 1)) for name, score in scores.items()],
        "verdict": info.verdict(),
        "digest": info.data.digest,
        "seed": info.settings.seed,
        "calls": info.calls,
        "seconds": f"{info.seconds:.0f}",
    }
