"""OpenVINO's own format: every stage's graph as XML, and one file that holds the constants of all
of them.

OpenVINO itself writes a file of constants for each graph, so that a decoder's blocks would be
stored twice.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from bbt_accel.errors import ExportError, first_line
from bbt_accel.exporters.convert.openvino_mlp import separate_mlps
from bbt_accel.exporters.trace.graph import NewWeights

ALIGNMENT = 64
"""Of constants, which are mapped: bytes of a vector register. Memory pages would cost more than
small constants.
"""


def save_openvino(file: Path, folder: Path, stage: str, weights: NewWeights) -> Counter[str]:
    """Write an ONNX file in OpenVINO's format. Returns the count of each operator.

    OpenVINO's low-precision transformations turn quantized matmuls into 8-bit ones when the graph
    is loaded.
    """
    import openvino

    converted = openvino.convert_model(file)
    separate_mlps(converted)
    xml = folder / f"{stage}.xml"
    try:
        openvino.save_model(converted, xml, compress_to_fp16=False)
    except RuntimeError as refusal:  # no OSError, even where the disk is full
        raise ExportError(
            f"cannot write {xml.name} ({first_line(refusal)}); free some space or choose another -o"
        ) from refusal
    operators = Counter(op.get_type_name() for op in converted.get_ops())
    share_constants(xml, weights)
    return operators


def share_constants(xml: Path, weights: NewWeights) -> None:
    """Move the constants of a saved model to the file that all stages share, each stored once."""
    own, tree = xml.with_suffix(".bin"), ElementTree.parse(xml)
    with own.open("rb") as stream:
        for data in tree.iterfind(".//layer[@type='Const']/data"):
            stream.seek(int(data.attrib["offset"]))
            data.set("offset", str(weights.place(stream.read(int(data.attrib["size"])), ALIGNMENT)))
    tree.write(xml, encoding="utf-8", xml_declaration=True)
    own.unlink()
