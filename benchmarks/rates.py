"""The ceilings of a machine: how fast its libraries multiply matrices, and how fast a GPU copies memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bbt_accel.errors import first_line

SIZE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices."""
SECONDS = 1.0
"""How long each call is repeated."""
Multiply = Callable[[], object]


def matrix_rates(device: str, threads: int) -> dict[str, Any]:
    """The ceilings of this machine.

    rates: 10⁹ operations/s of each product, by precision and library, and on a GPU 10⁹ bytes/s read and written by a
    copy. fp32_rate, fp32_rate_by: the best in fp32, and its library. unavailable: what is missing or failed, and why.
    """
    import torch

    torch.set_num_threads(threads)
    rates, unavailable = {}, {}
    for name, prepare in PRODUCTS[device].items():
        n = SIZE[device]
        try:
            rates[name] = 2 * n**3 / median_seconds(prepare(n, threads), device) / 1e9
        except Exception as error:  # whatever is missing or unsupported: no row depends on it
            unavailable[name] = f"{type(error).__name__}: {first_line(error):.100}"
    if device == "cuda":
        rates["copy, bytes"] = copy_rate()
    best = max((name for name in rates if name.startswith("fp32")), key=lambda name: rates[name])
    by = best.removeprefix("fp32 ")
    return {"fp32_rate": rates[best], "fp32_rate_by": by, "rates": rates, "unavailable": unavailable}


def median_seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Median duration of a call, which is repeated for a while after a warm-up."""

    def timed() -> float:
        start = perf_counter()
        call()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
        return perf_counter() - start

    timed()
    durations = [timed()]
    while len(durations) < 3 or sum(durations) < SECONDS:
        durations.append(timed())
    return median(durations)


def copy_rate(size: int = 2**30) -> float:
    """10⁹ bytes/s that a copy on the GPU reads and writes."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), "cuda") / 1e9


def _torch(n: int, threads: int, device: str = "cpu", half: bool = False) -> Multiply:
    """torch.mm: MKL in PyTorch's builds for x86, cuBLAS on a GPU."""
    import torch

    a = torch.rand(n, n, device=device, dtype=torch.float16 if half else torch.float32)
    return lambda: torch.mm(a, a)


def _onednn(n: int, threads: int) -> Multiply:
    """PyTorch's own oneDNN, with the weight packed ahead of time."""
    import torch
    from torch.utils import mkldnn

    layer, x = mkldnn.to_mkldnn(torch.nn.Linear(n, n, bias=False).requires_grad_(False)), torch.rand(n, n).to_mkldnn()
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

    core = openvino.Core()
    # Without the hint OpenVINO computes in bf16 where the processor has it.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(product(n), b""), "CPU", options).create_infer_request()
    a = np.ones((n, n), np.float32)
    return lambda: request.infer({"a": a}, share_inputs=True, share_outputs=True)


def product(n: int, int8: bool = False) -> bytes:
    """An ONNX model of the product of an n × n matrix with a constant one, in fp32 or uint8 by int8."""
    from onnx import parser

    left, right, result = ("uint8", "int8", "int32") if int8 else ("float",) * 3
    constant = f"ConstantOfShape<value = {right}[1] {{{7 if int8 else 0.5}}}>(s)"
    nodes = f"s = Constant<value = int64[2] {{{n}, {n}}}>() b = {constant} y = MatMul{'Integer' * int8}(a, b)"
    graph = f"product ({left}[{n}, {n}] a) => ({result}[{n}, {n}] y) {{ {nodes} }}"
    model: bytes = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {graph}').SerializeToString()
    return model


PRODUCTS: dict[str, dict[str, Callable[[int, int], Multiply]]] = {
    "cpu": {
        "fp32 PyTorch": _torch,
        "fp32 PyTorch oneDNN": _onednn,
        "fp32 ONNX Runtime": _ort,
        "fp32 OpenVINO": _openvino,
        "int8 ONNX Runtime": lambda n, threads: _ort(n, threads, int8=True),
    },
    "cuda": {
        "fp32 PyTorch": lambda n, threads: _torch(n, threads, "cuda"),
        "fp16 PyTorch": lambda n, threads: _torch(n, threads, "cuda", half=True),
    },
}
"""Device → precision and library → from n and the threads to the call."""
