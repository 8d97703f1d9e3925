"""The graphs before and after the backbone, for engines on a GPU: from z to prompts, and from label logits to batch
statistics. A generation then transfers z, and five numbers per candidate.
"""

from __future__ import annotations

from pathlib import Path

from onnx import parser

from bbt_accel.bundle import PROJECT, STATISTICS, BundleInfo
from bbt_accel.objective import MARGIN

PROJECTION = """
<ir_version: 10, opset_import: ["" : {opset}]>
project (float[candidates, dim] z, float[{size}, dim] matrix, float[{size}] p0)
     => (float[candidates, {n}, {hidden}] prompts)
<int64[3] shape = {{-1, {n}, {hidden}}}> {{
    flat = Gemm <transB = 1> (z, matrix, p0)
    prompts = Reshape (flat, shape)
}}
"""
"""prompts = reshape(z Aᵀ + p0): A is `matrix`, (n·H, d)."""

SUMS = """
<ir_version: 10, opset_import: ["" : {opset}]>
statistics (float[candidates, rows, labels] label_logits, float[rows, labels] targets, float[labels] classes)
   => (float[candidates, 5] statistics)
<int64[1] over_rows = {{1}}, int64[1] over_labels = {{2}},
 float[1] one = {{1}}, float[1] margin = {{{margin}}}, float[1] many = {{1000000}}> {{
    top = ReduceMax (label_logits, over_labels)
    shifted = Sub (label_logits, top)
    wanted_alone = Mul (shifted, targets)
    wanted = ReduceSum (wanted_alone, over_labels)
    powers = Exp (shifted)
    power = ReduceSum (powers, over_labels)
    log_power = Log (power)
    ce = Sub (log_power, wanted)

    above = Sub (shifted, wanted)
    beyond = Add (above, margin)
    violation = Relu (beyond)
    others = Sub (one, targets)
    violations = Mul (violation, others)
    hinge = ReduceSum (violations, over_labels)

    is_top = Equal (label_logits, top)
    tops = Cast <to = 1> (is_top)
    no_tops = Sub (one, tops)
    far = Mul (no_tops, many)
    numbers = Add (far, classes)
    predicted = ReduceMin (numbers, over_labels)
    class_alone = Mul (targets, classes)
    actual = ReduceSum (class_alone, over_rows)
    is_correct = Equal (predicted, actual)
    correct = Cast <to = 1> (is_correct)
    is_one = Equal (predicted, one)
    positives = Cast <to = 1> (is_one)
    true_positives = Mul (correct, positives)

    each = Concat <axis = 2> (ce, hinge, correct, true_positives, positives)
    statistics = ReduceSum <keepdims = 0> (each, over_rows)
}}
"""
"""`objective.batch_statistics` in fp32. targets is one-hot, classes is 0 … C-1.

A logit that is not finite makes `wanted_alone` NaN, be it the target's or another times 0. Of equal logits the first
class is predicted, as by numpy's argmax; TensorRT's ArgMax does not guarantee that.
"""


def write_device_graphs(folder: Path, info: BundleInfo) -> None:
    """Write project.onnx and statistics.onnx beside the stages of the backbone."""
    n, hidden = info.prompt_shape[-2:]
    sizes = {"opset": info.opset, "n": n, "hidden": hidden, "size": n * hidden, "margin": MARGIN}
    for name, text in ((PROJECT, PROJECTION), (STATISTICS, SUMS)):
        model = parser.parse_model(text.format(**sizes))
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
