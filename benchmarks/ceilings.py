"""The ceilings of a machine: its matrix rates, by precision and library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bbt_accel.core.engine_specs import index_of, kind_of
from bbt_accel.errors import first_line

SIZE = {"cpu": 2048, "cuda": 8192}  # side of the square matrices whose product is the ceiling
SECONDS = 1.0  # how long each product is repeated
Multiply = Callable[[], object]


def matrix_rates(device: str, threads: int) -> dict[str, Any]:
    """The ceilings of this machine.

    rates: 10⁹ operations/s of each product, by precision and library, and on a GPU 10⁹ bytes/s read
    and written by a copy. fp32_rate, fp32_rate_by: the best in fp32, and its library. unavailable:
    what is missing or failed, and why.
    """
    kind = kind_of(device)
    n, rates, unavailable = SIZE[kind], {}, {}
    if kind == "cuda":
        import torch

        torch.cuda.set_device(index_of(device))
    for name, prepare in PRODUCTS[kind].items():
        try:
            rates[name] = 2 * n**3 / median_seconds(prepare(n, threads), threads) / 1e9
        except Exception as error:  # whatever is missing or unsupported: no row depends on it
            unavailable[name] = f"{type(error).__name__}: {first_line(error):.100}"
    if kind == "cuda":
        block = torch.ones(2**30, dtype=torch.uint8, device="cuda")
        rates["copy, bytes"] = 2 * block.numel() / median_seconds(block.clone, threads) / 1e9
    best = max((name for name in rates if name.startswith("fp32")), key=rates.__getitem__)
    by = best.removeprefix("fp32 ")
    return {
        "fp32_rate": rates[best],
        "fp32_rate_by": by,
        "rates": rates,
        "unavailable": unavailable,
    }


def median_seconds(call: Callable[[], object], threads: int) -> float:
    """Median duration of a call, GPU included; PyTorch on as many CPU threads."""
    from torch.utils.benchmark import Timer

    return (
        Timer("call()", globals={"call": call}, num_threads=threads)
        .blocked_autorange(min_run_time=SECONDS)
        .median
    )


def _torch(n: int, device: str = "cpu", half: bool = False, tf32: bool = False) -> Multiply:
    """torch.mm: MKL in PyTorch's builds for x86, cuBLAS on a GPU, whose fp32 is TF32 only where
    that is asked for.
    """
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    a = torch.rand(n, n, device=device, dtype=torch.float16 if half else torch.float32)
    return lambda: torch.mm(a, a)


def _onednn(n: int) -> Multiply:
    """PyTorch's own oneDNN, with the weight packed ahead of time."""
    import torch
    from torch.utils import mkldnn

    layer, x = (
        mkldnn.to_mkldnn(torch.nn.Linear(n, n, bias=False).requires_grad_(False)),
        torch.rand(n, n).to_mkldnn(),
    )
    return lambda: layer(x)


def _ort(n: int, threads: int, int8: bool = False) -> Multiply:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(product(n, int8), options, ["CPUExecutionProvider"])
    feed = {"a": np.ones((n, n), np.uint8 if int8 else np.float32)}
    return lambda: session.run(None, feed)


def _openvino(n: int, threads: int) -> Multiply:
    import openvino

    from bbt_accel.engines.openvino_ir import compile_options

    core = openvino.Core()
    model = core.compile_model(
        core.read_model(product(n), b""), "CPU", compile_options("fp32", threads)
    )
    request = model.create_infer_request()
    a = np.ones((n, n), np.float32)
    return lambda: request.infer({"a": a}, share_inputs=True, share_outputs=True)


def product(n: int, int8: bool = False) -> bytes:
    """An ONNX model of the product of an n × n matrix with a constant one, in fp32 or uint8 by
    int8.
    """
    from onnx import parser

    left, right, result = ("uint8", "int8", "int32") if int8 else ("float",) * 3
    constant = f"ConstantOfShape<value = {right}[1] {{{7 if int8 else 0.5}}}>(s)"
    nodes = (
        f"s = Constant<value = int64[2] {{{n}, {n}}}>() b = {constant} y = "
        f"MatMul{'Integer' * int8}(a, b)"
    )
    graph = f"product ({left}[{n}, {n}] a) => ({result}[{n}, {n}] y) {{ {nodes} }}"
    return bytes(
        parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {graph}').SerializeToString()
    )


PRODUCTS: dict[str, dict[str, Callable[[int, int], Multiply]]] = {
    "cpu": {
        "fp32 PyTorch": lambda n, threads: _torch(n),
        "fp32 PyTorch oneDNN": lambda n, threads: _onednn(n),
        "fp32 ONNX Runtime": _ort,
        "fp32 OpenVINO": _openvino,
        "int8 ONNX Runtime": lambda n, threads: _ort(n, threads, int8=True),
    },
    "cuda": {
        "fp32 PyTorch": lambda n, threads: _torch(n, "cuda"),
        "TF32 PyTorch": lambda n, threads: _torch(n, "cuda", tf32=True),
        "fp16 PyTorch": lambda n, threads: _torch(n, "cuda", half=True),
    },
}
"""Device → precision and library → from n and the threads to the call."""
