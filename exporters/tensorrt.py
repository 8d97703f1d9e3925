"""Bundles for TensorRT: the plain graph in the target's precision, and plans of every stage.

Networks are strongly typed: TensorRT 11 has no precision flags, a plan computes in the types that the graph names.
The fused graphs of ONNX Runtime hold operators that TensorRT does not know; it fuses by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bbt_accel.batch import Batch, Int64
from bbt_accel.bundle import Bundle, BundleInfo
from bbt_accel.errors import DataError, EngineError
from bbt_accel.exporters.plans import Sizes, get_plan, keys
from bbt_accel.exporters.rows import sample_rows
from bbt_accel.exporters.trt_api import find_api

OPERATORS = ("MatMul", "Softmax", "LayerNormalization", "Gelu", "Erf", "Tanh")
"""Those that the report counts."""
TOKENS = 2**17
"""Candidates × rows × tokens of a profile's largest call: bounds the memory of a plan, about 2 GiB at H = 1024."""
STEP = 8
"""Rows whose lengths round up to the same multiple are computed together; also the granule of the longest row."""
TEST_ROWS = 4096
"""Test rows whose lengths are looked at, at most."""


def rounded(bundle: Bundle, folder: Path) -> Bundle:
    """A bf16 bundle as one that a CPU can run: fp32 graphs in `folder` that round to bf16 wherever it would.

    ONNX Runtime has no bf16 kernels for CPUs. Tensor cores sum bf16 products in fp32, as these graphs do.
    """
    for stage in bundle.info.stages:
        model = onnx.load(bundle.path / f"{stage}.onnx")
        round_nodes(model)
        onnx.save(model, str(folder / f"{stage}.onnx"), save_as_external_data=True, location=f"{stage}.data")
    return Bundle(folder, bundle.info)


def round_nodes(model: onnx.ModelProto) -> None:
    """Turn bf16 weights, constants and outputs into fp32 ones that are rounded to bf16."""
    low = {t.name for t in model.graph.initializer if t.data_type == TensorProto.BFLOAT16}
    for tensor in model.graph.initializer:
        if tensor.name in low:
            tensor.CopyFrom(as_float(tensor))
    nodes = []
    for node in model.graph.node:
        makes = makes_low(node, low)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(as_float(attribute.t))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        if makes:
            for i, name in enumerate(node.output):
                low.add(name)
                node.output[i] = f"{name}_exact"
                half = f"{name}_rounded"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [half], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del model.graph.node[:]
    model.graph.node.extend(copies)
    del model.graph.value_info[:]


INTEGERS = {"Shape", "Size", "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN"}
"""Operators whose outputs are no floats, whatever their inputs."""


def makes_low(node: onnx.NodeProto, low: set[str]) -> bool:
    """Whether a node gives bf16."""
    if node.op_type == "Cast":
        return any(a.name == "to" and a.i == TensorProto.BFLOAT16 for a in node.attribute)
    constant = any(
        a.type == onnx.AttributeProto.TENSOR and a.t.data_type == TensorProto.BFLOAT16 for a in node.attribute
    )
    return constant or (node.op_type not in INTEGERS and bool(low & set(node.input)))


def as_float(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


# Profiles ----------------------------------------------------------------------------------------------------


def sizes_of(bundle: Bundle, task: str | None, data: Path | None) -> Sizes:
    """The profile for a task: its population, the lengths of its rows, its label words.

    Tuned for the commonest length of the few-shot train rows; as long as the longest train, dev or test row. Without a
    task any row that the backbone takes fits, and it is tuned for the shipped texts.
    """
    info = bundle.info
    if task is None:
        batch = sample_rows(bundle, count=32)
        return sizes(info, lengths(batch), info.max_length, 20, len(batch.label_token_ids), batch)
    from bbt_accel.data import few_shot, load_rows
    from bbt_accel.encoding import Encoder
    from bbt_accel.settings import resolve
    from bbt_accel.tasks import load_task

    loaded = load_task(task)
    settings = resolve(loaded.preset(info.method))
    train, dev = few_shot(load_rows(loaded, "train", data), loaded.n_classes, settings.k_shot, settings.seed)
    encoder = Encoder(bundle, loaded)
    batch, others = encoder.encode(train), [encoder.encode(dev)]
    with suppress(DataError):  # a task without test rows can be tuned
        others.append(encoder.encode(load_rows(loaded, "test", data)[:TEST_ROWS]))
    longest = max(int(lengths(b).max()) for b in (batch, *others))
    popsize, dim = settings.popsize, settings.intrinsic_dim
    return sizes(info, lengths(batch), longest, popsize, loaded.n_classes, batch, dim)


def lengths(batch: Batch) -> Int64:
    """Real tokens of each row."""
    found: Int64 = batch.attention_mask.sum(axis=1)
    return found


def sizes(
    info: BundleInfo, found: Int64, longest: int, popsize: int, labels: int, batch: Batch, dim: int = 500
) -> Sizes:
    shortest = 2 if info.prompt_mode == "cat" else info.n_prompt_tokens + 2
    longest = max(shortest, min(info.max_length, -(-longest // STEP) * STEP))
    found = np.clip(found, shortest, longest)
    groups = Counter((-(-found // STEP)).tolist())
    group, common = groups.most_common(1)[0]
    rows = max(1, min(len(found), TOKENS // (popsize * longest)))
    best = max(1, min(int(common), rows))
    decoder = (1, 2, 2) if info.family != "bart" else (1, int(np.median(batch.readout)) + 1, longest)
    return Sizes(
        candidates=(1, popsize, popsize),
        rows=(1, best, rows),
        tokens=(shortest, min(longest, int(group) * STEP), longest),
        labels=(1, labels, max(256, labels)),
        decoder=decoder if info.family in ("bart", "t5") else (1, 2, 2),
        dim=(1, dim, max(dim, 1024)),
    )


# Plans -------------------------------------------------------------------------------------------------------


def build_plans(
    bundle: Bundle, capabilities: tuple[str, ...], tell: Callable[[str, int, int], None]
) -> dict[str, object]:
    """Build and keep the plans of all stages and of the projection, for this machine's GPU or ahead of time.

    Returns what was built. Raises PlanError; MissingDependency without TensorRT; EngineError where neither a GPU nor
    capabilities are given.
    """
    api = find_api(ahead=bool(capabilities))
    gpu, capability, driver = (None, capabilities, None) if capabilities else machine()
    for name in capabilities:
        api.capability(name)
    wanted = keys(bundle, api, gpu, capability, driver)
    for done, (stage, key) in enumerate(wanted.items()):
        tell(f"TensorRT plan of {stage}", done, len(wanted))
        get_plan(bundle, stage, key, api, tell=lambda line: None)
    plans = sorted(bundle.path.glob("plans/*/*.plan"))
    return {
        "plans": len(plans),
        "plan_bytes": sum(plan.stat().st_size for plan in plans),
        "built_for": gpu or f"compute capability {', '.join(capability)}",
        "runtime": api.version,
    }


def machine() -> tuple[str, tuple[str, ...], str]:
    """Name, compute capability and driver of this machine's GPU. Raises EngineError where there is none."""
    from bbt_accel.cuda import Cuda

    try:
        gpu = Cuda().gpu
    except EngineError as error:
        raise EngineError(f"{error}; or build ahead of time with --compute-capability") from None
    return gpu.name, (gpu.capability,), gpu.driver
