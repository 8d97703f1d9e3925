"""Recorded losses are reproduced: those of the original program, and those of transformers at the
time of writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from conftest import THREADS, Export
from tiny_backbones import N_PROMPT, PARITY, VARIANTS

from bbt_accel import Batch, Bundle, Objective, Population, Projection, export_bundle, load_engine
from bbt_accel.core.bundle import BundleInfo
from bbt_accel.engines.base import BoundBatch

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TRACES = sorted(GOLDEN.glob("*.npz"))
TOLERANCE = 1e-4
N = 10
"""Prompt tokens of the original's traces."""

Trace = dict[str, Any]


def traced_batch(arrays: dict[str, Any], info: BundleInfo) -> Batch:
    """The rows of a trace as the original program laid them out."""
    ids, mask = arrays["train_input_ids"], arrays["train_attention_mask"]
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    decoder = arrays.get("train_decoder_input_ids")
    # The decoder of a masked template reads the input shifted by one, behind the last token of the
    # row.
    if info.decodes and info.template_group == "masked":
        decoder = np.concatenate([ids[rows, last][:, None], ids[:, :-1]], axis=1)
    readout = {"span": np.ones_like(rows), "causal": last}.get(
        info.template_group, arrays.get("train_mask_pos")
    )
    targets = (arrays["train_labels"][:, None] == arrays["label_ids"]).argmax(axis=1)
    return Batch(ids, mask, readout, targets, arrays["label_ids"], decoder)  # type: ignore[arg-type]


def read_trace(file: Path | None, export: Export) -> Trace:
    """A trace of the original program as a dict, with the bundle of its backbone."""
    if file is None:
        pytest.skip(f"the original's traces are not here ({GOLDEN})")
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    backbone, *words = file.stem.split("_")
    checkpoint = min((GOLDEN / "models").glob(f"{backbone}*"))
    method = "bbt" if len(arrays["A"]) == 1 else "bbtv2"
    bundle = export(checkpoint, method, "cat" if "cat" in words else "add", N)
    objective = Objective(next((word for word in words if word in ("hinge", "perf")), "ce"))  # type: ignore[arg-type]
    return {
        **arrays,
        "bundle": bundle,
        "batch": traced_batch(arrays, bundle.info),
        "objective": objective,
    }


def projections(trace: Trace) -> list[Projection]:
    p0 = trace["init_prompt"] if trace["init_prompt"].size else None
    return [Projection(A, (N, A.shape[0] // N), p0) for A in trace["A"]]


each_trace = pytest.mark.parametrize(
    "file", TRACES or [None], ids=lambda file: file.stem if file else "none"
)


@each_trace
@pytest.mark.usefixtures("without_graphs")
def test_the_losses_of_the_original_are_reproduced(file: Path | None, tmp_path: Path) -> None:
    def export(checkpoint: Path, method: str, mode: str, n: int) -> Bundle:
        options: Any = {"method": method, "prompt_mode": mode, "n_prompt_tokens": n}
        return export_bundle(checkpoint, tmp_path / "bundle", **options)

    trace = read_trace(file, export)
    assert_reproduced(
        trace, "torch", step=3 if len(trace["A"]) == 1 else 5
    )  # 5, so that every layer comes up


@each_trace
@pytest.mark.slow
def test_the_losses_of_the_original_are_those_of_the_graphs(
    file: Path | None, exported: Export
) -> None:
    assert_reproduced(read_trace(file, exported), "ort", step=1)


def assert_reproduced(trace: Trace, engine: str, step: int) -> None:
    """In every `step`-th generation and the last."""
    losses, layers = [], projections(trace)
    compared = sorted({*range(0, len(trace["X"]), step), len(trace["X"]) - 1})
    best = [(np.inf, np.zeros(layer.prompt_shape, np.float32)) for layer in layers]
    with (
        load_engine(trace["bundle"], engine, threads=THREADS) as loaded,
        loaded.bind(trace["batch"]) as bound,
    ):
        for generation, z in enumerate(trace["X"]):
            at = generation % len(layers)
            prompts = layers[at].prompts(z)
            if generation in compared:
                stack = np.stack([prompt for _, prompt in best])
                logits = scored(bound, prompts, at, stack, first=len(losses) % 5)
                losses.append(trace["objective"].score(logits, trace["batch"].targets)[0])
            winner = int(trace["fitness"][generation].argmin())
            best[at] = min(
                best[at],
                (trace["fitness"][generation][winner], prompts[winner]),
                key=lambda pair: pair[0],
            )
    np.testing.assert_allclose(losses, trace["fitness"][compared], rtol=0, atol=TOLERANCE)


def scored(bound: BoundBatch, prompts: Any, at: int, stack: Any, first: int) -> Any:
    """Logits of the prompts; of a layer's, those of every fifth are compared with the logits of its
    whole stack.
    """
    if bound.bundle.info.method == "bbt":
        return bound.label_logits(prompts)
    logits = bound.label_logits(Population(prompts, at, stack))
    some = slice(first, None, 5)
    whole = np.repeat(stack[None], len(prompts), axis=0)
    whole[:, at] = prompts
    np.testing.assert_allclose(
        bound.label_logits(whole[some]), logits[some], rtol=0, atol=TOLERANCE
    )
    return logits


@pytest.mark.parametrize("engine", ["eager", "torch", "ort"])
@pytest.mark.parametrize(
    ("name", "method", "mode"), VARIANTS, ids=["-".join(variant) for variant in VARIANTS]
)
def test_the_recorded_losses_of_transformers_are_reproduced(
    tiny: Export, name: str, method: str, mode: str, engine: str
) -> None:
    """fixtures/make_parity.py wrote them: a later torch, transformers or exporter has to give the
    same numbers.
    """
    bundle: Bundle = tiny(name, method, mode)
    with np.load(PARITY) as file:
        prefix = f"{name}-{method}-{mode}/"
        recorded = {
            key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)
        }
    fields = ("input_ids", "attention_mask", "readout", "targets", "label_token_ids")
    rows = Batch(*(recorded[field] for field in fields))
    layers = [
        Projection(A, (N_PROMPT, bundle.info.hidden_size)).prompts(z)
        for A, z in zip(recorded["A"], recorded["X"], strict=True)
    ]
    prompts = layers[0] if method == "bbt" else np.stack(layers, axis=1)
    with load_engine(bundle, engine, threads=THREADS) as loaded, loaded.bind(rows) as bound:
        logits = bound.label_logits(prompts)
    np.testing.assert_allclose(logits, recorded["label_logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        Objective("ce").score(logits, rows.targets)[0], recorded["losses"], atol=1e-5
    )
