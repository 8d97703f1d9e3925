"""What the machine is and how fast it multiplies matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices."""
SECONDS = 1.0
"""How long each product is repeated."""


def matrix_rates(device: str, threads: int) -> dict[str, Any]:
    """fp32_rate, int8_rate (10⁹ operations a second, or None) and int8_rate_by, as `report.Machine` has them."""
    int8, by = int8_rate(device, threads)
    return {"fp32_rate": fp32_rate(device, threads), "int8_rate": int8, "int8_rate_by": by}


def fp32_rate(device: str, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    n = SIZE[device]
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    return rate(n, lambda: torch.mm(a, b), _wait(device))


def int8_rate(device: str, threads: int) -> tuple[float | None, str]:
    """The rate and what computed it; or None and why not."""
    try:
        return _torch_int8(device) if device == "cuda" else _ort_int8(threads)
    except Exception as error:  # whatever is missing or unsupported: no row depends on this rate
        return None, f"not measured ({type(error).__name__})"


def _torch_int8(device: str) -> tuple[float, str]:
    import torch

    n = SIZE[device]
    a = torch.randint(-128, 127, (n, n), dtype=torch.int8, device=device)
    return rate(n, lambda: torch._int_mm(a, a), _wait(device)), "torch._int_mm"


def _ort_int8(threads: int) -> tuple[float, str]:
    import onnx
    import onnxruntime

    n = SIZE["cpu"]
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.integers(-64, 64, (n, n), dtype=np.int8), "b")
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    a = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, [n, n])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [n, n])
    graph = onnx.helper.make_graph([node], "rate", [a], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"a": rng.integers(0, 255, (n, n), dtype=np.uint8)}
    return rate(n, lambda: session.run(None, feed)), "ONNX Runtime MatMulInteger"


def rate(n: int, multiply: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """10⁹ operations a second of an n × n × n product: 2 n³ over the median duration."""
    durations: list[float] = []
    multiply()
    wait()
    while sum(durations) < SECONDS or len(durations) < 3:
        start = time.perf_counter()
        multiply()
        wait()
        durations.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(durations) / 1e9


def _wait(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_mib() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not tell."""
    try:
        # Not getrusage first: on Linux a child starts with the peak of the process that started it.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
