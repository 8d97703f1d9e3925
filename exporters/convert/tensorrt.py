"""Bundles for TensorRT: the shape profile of a task, and plans of every stage.

Networks are strongly typed: TensorRT 11 has no precision flags, a plan computes in the types of the
graph.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle, BundleInfo
from bbt_accel.core.settings import Settings
from bbt_accel.engines.cuda import GPU_TOKENS, Cuda
from bbt_accel.engines.plan_building import each_plan
from bbt_accel.engines.plans import STEP, Record, ShapeProfile, keys
from bbt_accel.engines.trt_api import find_api
from bbt_accel.errors import EngineError
from bbt_accel.exporters.convert.calibration import lengths
from bbt_accel.io.manifests import PLANS
from bbt_accel.io.progress import Tell
from bbt_accel.tasks.encoding import FEATURE_WORDS

OPERATORS = (
    "MatMul",
    "Softmax",
    "LayerNormalization",
    "Gelu",
    "Erf",
    "Tanh",
)  # those that the report counts
CONTEXT = 512
"""Tokens of a decoder's context that every profile accepts."""


def check_capabilities(text: str | None) -> tuple[str, ...]:
    """`8.6,8.9` as a tuple; empty for this machine's GPU, whose presence is checked here, before
    minutes of work.

    Raises UsageError for an unknown capability, EngineError where there is no GPU, PlanError for
    one without plans.
    """
    if text is None:
        api = find_api()
        name, capability, _ = local_gpu()
        api.check_gpu(name, *capability)
        return ()
    api = find_api(ahead=True)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        api.capability(name)
    return names


def local_gpu() -> tuple[str, tuple[str, ...], str]:
    """Name, compute capability and driver of this machine's GPU. Raises EngineError where there is
    none.
    """
    try:
        gpu = Cuda().gpu
    except EngineError as error:
        raise EngineError(
            f"{error}; or build ahead of time with bbt-accel optimize --compute-capability"
        ) from None
    return gpu.name, (gpu.capability,), gpu.driver


def shape_profile(info: BundleInfo, batch: Batch, longest: int, settings: Settings) -> ShapeProfile:
    """The profile for a task's searches, tuned for the most frequent length of its train rows.

    batch: the train rows. longest: tokens of the longest row to accept. settings: of the search.
    The largest call has no more candidates × rows × tokens than `GPU_TOKENS`, about 2 GiB at H =
    1024.
    """
    shortest, popsize = info.shortest_row, settings.popsize
    longest = max(shortest, min(info.max_length, int(batch.aligned(info, np.array(longest), STEP))))
    rounded = batch.aligned(info, np.clip(lengths(batch), shortest, longest), STEP)
    [(bucket, frequency)] = Counter(rounded.tolist()).most_common(1)
    candidates = max(1, min(popsize, GPU_TOKENS // longest))
    rows = max(1, min(len(batch), GPU_TOKENS // (candidates * longest)))
    shifted = info.decodes and info.template_group == "masked"
    labels, dim = len(batch.label_token_ids), settings.intrinsic_dim
    context = len(batch.graph_inputs(info).get("context_ids", [0]))
    return ShapeProfile(
        candidates=(1, candidates, candidates),
        rows=(1, min(frequency, rows), rows),
        tokens=(shortest, min(longest, bucket), longest),
        labels=(1, labels, FEATURE_WORDS + max(512, labels)),
        decoder_tokens=(1, int(np.median(batch.readout)) + 1, longest) if shifted else (1, 2, 2),
        context=(1, context, max(context, min(CONTEXT, info.max_length)) if info.causal else 1),
        dim=(1, dim, max(dim, 1024)),
    )


def build_plans(bundle: Bundle, capabilities: tuple[str, ...], tell: Tell) -> dict[str, object]:
    """Build and cache the plans of all stages and device graphs, for this GPU or ahead of time;
    returns what was built.

    Raises PlanError; MissingDependency without TensorRT; EngineError where neither a GPU nor
    capabilities are given.
    """
    api = find_api(ahead=bool(capabilities))
    gpu, capability, driver = (None, capabilities, None) if capabilities else local_gpu()
    wanted = keys(bundle, api, gpu, capability, driver)
    for _ in each_plan(bundle, wanted, api, lambda line: None, tell):
        pass
    plans = sorted(bundle.path.glob(f"{PLANS}/*/*.plan"))
    records = [
        Record.model_validate_json(plan.with_suffix(".json").read_text(encoding="utf-8"))
        for plan in plans
    ]
    kernels = [record.kernels for record in records if record.kernels is not None]
    return {
        "plans": len(plans),
        "attention_fused": sum(made.fused_attention for made in kernels),
        "attention_not_fused": sum(len(made.other_attention) for made in kernels),
        "plan_bytes": sum(plan.stat().st_size for plan in plans),
        "built_for": gpu or f"compute capability {', '.join(capability)}",
        "runtime": api.version,
    }
