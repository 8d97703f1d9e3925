"""Bundles for OpenVINO: its own format, int8 by NNCF with ranges fixed at calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.errors import MissingDependency
from bbt_accel.exporters.calibration import stage_feeds
from bbt_accel.exporters.sessions import Feeds


def optimize_for_openvino(
    bundle: Bundle, folder: Path, precision: str, batch: Batch, prompts: Float32
) -> dict[str, object]:
    """Convert every stage; int8 quantizes matrix products per channel (NNCF's transformer scheme)."""
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise MissingDependency(f'--target openvino needs {error.name}: pip install "bbt-accel[openvino]"') from None
    nncf.set_log_level(40)
    counts: Counter[str] = Counter()
    seen: Iterable[tuple[str, list[Feeds]]] = ((stage, []) for stage in bundle.info.stages)
    if precision == "int8":
        seen = stage_feeds(bundle, batch, prompts, rows=1)
    for stage, feeds in seen:
        model = openvino.convert_model(bundle.path / f"{stage}.onnx")
        if precision == "int8" and stage != "embed":
            takes = [i.get_any_name() for i in model.inputs]
            model = quantized(nncf, model, [{name: feed[name] for name in takes} for feed in feeds])
        counts.update(op.get_type_name() for op in model.get_ops())
        openvino.save_model(model, folder / f"{stage}.xml", compress_to_fp16=False)
    wanted = ("FakeQuantize", "MatMul", "MVN", "Softmax", "ScaledDotProductAttention")
    return {"operators": {name: counts[name] for name in wanted if counts[name]}}


def quantized(nncf: Any, model: Any, feeds: list[Feeds]) -> Any:
    return nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=True,
        # Tables of embeddings are read, not multiplied, and attention scores lose accuracy for little time.
        ignored_scope=nncf.IgnoredScope(types=["Gather", "ScaledDotProductAttention"], validate=False),
        # Smoothing scales that suit one prompt do not suit the next: without them the logits are twice as close.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )
