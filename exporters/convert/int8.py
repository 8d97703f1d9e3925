"""Static int8: 8-bit matmuls with activation ranges fixed at calibration and one weight scale per
output channel.

Fixed ranges keep the candidates of a population independent: dynamic ones would span the whole
batch. Outlier channels are split (`outlier_channels`); where that is not enough, some weights stay
in fp32 (`sensitivity`). A decoder's context takes the int8 weights, too, but multiplies in fp32.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import helper, numpy_helper

from bbt_accel.exporters.convert.int8_calibration import CalibratedStage
from bbt_accel.exporters.convert.matmuls import is_transposed
from bbt_accel.exporters.convert.outlier_channels import (
    dequantize_weight,
    pad_activation,
    quantize_activation,
    quantize_weight,
)
from bbt_accel.exporters.trace.graph import name_nodes, replace_nodes


def to_int8(
    stage: CalibratedStage, weights: Collection[str], switchable: bool = False
) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """The graph with the matmuls of these weights quantized: uint8 activations, int8 weights, float
    results.

    Returns it, whose other weights stay beside the stage's file; the names of those matmuls, and of
    the ones that stay in fp32. switchable: the graph gets a boolean input for each quantized
    weight, named by `switch`, that has its matmuls computed in fp32 where it is true.
    """
    model = onnx.load(str(stage.file), load_external_data=False)
    graph = model.graph
    name_nodes(graph)
    exact = {t.name: t for t in graph.initializer}
    done: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        use = stage.uses.get(node.name)
        if use is None or use.weight not in weights:
            nodes.append(node)
            continue
        fitted, weight, transpose = (
            stage.ranges[use.input],
            f"{node.input[1]}_int8",
            is_transposed(node),
        )
        if use.input not in done:
            nodes += (pad_activation if stage.exact else quantize_activation)(
                graph, use.input, fitted
            )
        if weight not in done:
            array = numpy_helper.to_array(exact[node.input[1]], str(stage.file.parent))
            quantize_weight(graph, array, weight, transpose, fitted)
            if switchable:
                graph.input.append(
                    helper.make_tensor_value_info(switch(use.weight), onnx.TensorProto.BOOL, [1])
                )
        done |= {use.input, weight}
        matmul = onnx.NodeProto()
        matmul.CopyFrom(node)
        matmul.input[:2] = f"{use.input}_int8", f"{node.name}_weight"
        nodes.append(dequantize_weight(weight, matmul.input[1], transpose))
        nodes += switchable_matmul(node, matmul, switch(use.weight)) if switchable else [matmul]
    replace_nodes(graph, nodes)
    quantized = [name for name, use in stage.uses.items() if use.weight in weights]
    return model, quantized, [name for name in stage.uses if name not in quantized]


def switch(weight: str) -> str:
    """The graph input that switches a weight's matmuls to fp32."""
    return f"{weight}_exact"


def switchable_matmul(
    exact: onnx.NodeProto, quantized: onnx.NodeProto, switch: str
) -> list[onnx.NodeProto]:
    """Both matmuls, and the result of the one that the switch selects."""
    (result,) = exact.output
    inputs = [switch, f"{result}_fp32", f"{result}_uint8"]
    exact.output[0], quantized.output[0] = inputs[1:]
    quantized.name = f"{exact.name}_uint8"
    return [exact, quantized, helper.make_node("Where", inputs, [result], f"{exact.name}_switch")]
