"""A bundle's stages as plain functions from arrays to arrays, on the CPU: for checks and
calibration.

Engines run searches; this is what an exporter needs to check its own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bbt_accel.core.batch import Batch, Float32, Int64, group_by_beginning
from bbt_accel.core.bundle import Bundle, BundleInfo, block_of, state_name
from bbt_accel.engines.openvino_ir import StageReader, compile_options
from bbt_accel.engines.ort_sessions import inference_session, session_options
from bbt_accel.errors import ExportError

Feeds = dict[str, Any]
"""Inputs or outputs of a stage by name, numpy."""
ROWS_PER_CALL = 8
"""More would take more memory, and no less time."""
RunStage = Callable[[Feeds], Feeds]


_THREADS: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """At most so many CPU threads in the block, of ONNX Runtime, OpenVINO, PyTorch and BLAS; None
    for no limit.
    """
    if threads is None:
        yield
        return
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before, token = torch.get_num_threads(), _THREADS.set(threads)
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
        _THREADS.reset(token)


def open_stage(bundle: Bundle, stage: str) -> RunStage:
    """One stage of a bundle. Its outputs have the names of the next stage's inputs."""
    if bundle.info.target == "openvino":
        return openvino_stage(bundle, stage)
    return onnx_stage(bundle.path / f"{stage}.onnx")


def onnx_stage(file: Path) -> RunStage:
    """A graph in ONNX Runtime."""
    session = open_session(file)
    inputs = [i.name for i in session.get_inputs()]
    outputs = [state_name(o.name) for o in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        if missing := set(inputs) - feeds.keys():
            raise ExportError(
                f"{file.name} needs {', '.join(sorted(missing))}, which no earlier stage provides"
            )
        return dict(
            zip(outputs, session.run(None, {name: feeds[name] for name in inputs}), strict=True)
        )

    return run


def open_session(file: Path) -> Any:
    options = session_options(_THREADS.get())
    # Folding constants would transpose all weights in memory; without it, matmuls take them as they
    # are.
    folding = ["ConstantFolding"]
    return inference_session(file, options, ["CPUExecutionProvider"], disabled_optimizers=folding)


@contextmanager
def temporary_graph(model: onnx.ModelProto, folder: Path) -> Iterator[Path]:
    """The file of a graph, with its weights beside it, for as long as the block runs."""
    file = folder / "temporary.onnx"
    try:
        onnx.save(model, str(file), save_as_external_data=True, location=f"{file.name}.data")
        yield file
    finally:
        file.unlink(missing_ok=True)
        file.with_suffix(".onnx.data").unlink(missing_ok=True)


def openvino_stage(bundle: Bundle, stage: str) -> RunStage:
    """An OpenVINO model."""
    reader = StageReader(bundle.path)
    model = reader.compile(stage, compile_options(bundle.info.precision, _THREADS.get()))

    def run(
        feeds: Feeds, reader: StageReader = reader
    ) -> Feeds:  # the reader lives as long as the model
        found = model({i.get_any_name(): feeds[i.get_any_name()] for i in model.inputs})
        return {state_name(o.get_any_name()): np.array(found[o]) for o in model.outputs}

    return run


def run_stages(bundle: Bundle, batch: Batch, prompts: Float32) -> Float32:
    """Label logits (P, N, C) of the graphs, some rows at a time. prompts: float32 (P, n, H) or (P,
    L, n, H).
    """
    parts = calls(bundle.info, batch, ROWS_PER_CALL)
    feeds = initial_feeds(bundle, batch, parts)
    for stage in bundle.info.stages:
        run, own = open_stage(bundle, stage), prompt_feeds(bundle.info, stage, prompts)
        feeds = [feed | run(feed | own) for feed in feeds]
        del run  # before the next stage is loaded
    logits: Float32 = np.concatenate([feed["label_logits"] for feed in feeds], axis=1)
    return logits[:, np.argsort(np.concatenate(parts))]


def initial_feeds(bundle: Bundle, batch: Batch, parts: list[Int64]) -> list[Feeds]:
    """What the first stage gets, besides prompts, in each call. parts: as from `calls`."""
    batch = batch.with_decoder_input(bundle.info)
    return [dict(batch.rows(rows).graph_inputs(bundle.info)) for rows in parts]


def calls(info: BundleInfo, batch: Batch, size: int) -> list[Int64]:
    """Indices of the rows of each call, at most so many."""
    alike = group_by_beginning(info, batch)
    return [rows[i : i + size] for rows in alike for i in range(0, len(rows), size)]


def prompt_feeds(info: BundleInfo, stage: str, prompts: Float32) -> Feeds:
    """The prompts that a stage reads: all of them for bbt, those of its layer for bbtv2."""
    if stage in ("context", "embed"):
        return {}
    if info.method == "bbt":
        return {"prompts": prompts}
    layer = info.n_layers - 1 if stage == "last" else block_of(stage)
    return {"prompts": np.ascontiguousarray(prompts[:, layer])}
