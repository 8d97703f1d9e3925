"""Bundles for this machine: exported and optimized once, then kept in a cache."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bbt_accel
from bbt_accel.core.backbone_names import backbone_digest
from bbt_accel.core.bundle import Bundle, BundleInfo, Method, PromptMode
from bbt_accel.core.engine_specs import Device, Precision, engine_spec, local_engine
from bbt_accel.engines.availability import RULES, Availability, EngineState, availability, label
from bbt_accel.errors import BundleError, UsageError
from bbt_accel.io.files import reserved
from bbt_accel.io.progress import Tell, silent

# the environment variable with the folder of bundles; ~/.cache/bbt-accel unless given
CACHE = "BBT_ACCEL_CACHE"
PrecisionChoice = Literal["auto", Precision]


class Choice(NamedTuple):
    """Where a backbone runs, and why there."""

    engine: str
    device: Device
    precision: Precision
    reason: str

    @property
    def target(self) -> str:
        """Of the bundle that the engine takes for this precision; `onnx` for the exported one."""
        return engine_spec(self.engine).target(self.precision)


def choose(
    engine: str = "auto", precision: PrecisionChoice = "auto", here: Availability | None = None
) -> Choice:
    """What is given, and for `auto` what doctor recommends: for a named engine that it does not
    recommend fp16 on a GPU where it runs on one, else fp32, and the fastest engine for a named
    precision.

    here: what runs on the machine; by default on this one.
    Raises UsageError for an engine that does not run in that precision, or that needs a server.
    """
    if engine != "auto":
        local_engine(engine, "fit")
    found = _choose(engine, precision, *(here or availability()))
    engine_spec(found.engine).target(found.precision)
    return found


def _choose(
    engine: str, precision: PrecisionChoice, states: dict[str, EngineState], best: dict[str, Any]
) -> Choice:
    if engine in ("auto", best["engine"]) and precision in ("auto", best["precision"]):
        return Choice(
            best["engine"], best["device"], best["precision"], best["reason"].split(";")[0]
        )
    running = [
        (name, rule)
        for rule in RULES
        for name in rule.engines
        if engine in ("auto", name) and states[label(name, rule.device)]["runs"]
    ]
    if precision == "auto":
        for name, rule in running:
            if rule.device == "cuda":
                return Choice(name, rule.device, rule.precision, rule.reason)
        return Choice(
            engine, engine_spec(engine).device("cpu"), "fp32", "exact; name --precision for another"
        )
    fits = [
        (name, rule.device)
        for name, rule in running
        if precision in engine_spec(name).precisions
        if rule.device == "cpu"
        or rule.precision == precision  # a GPU only in a precision that is for GPUs
    ]
    if engine == "auto" and not fits:
        raise UsageError(f"no engine of this machine runs in {precision}; see bbt-accel doctor")
    name, device = fits[0] if fits else (engine, engine_spec(engine).device("cpu"))
    return Choice(name, device, precision, "as given")


def prepared_bundle(
    backbone: str,
    choice: Choice,
    method: Method,
    n_prompt_tokens: int,
    on_progress: Tell = silent,
    prompt_mode: PromptMode = "add",
    threads: int | None = None,
) -> Bundle:
    """The bundle of a backbone for an engine and a precision, from the cache or made now, on so
    many CPU threads.

    A process that makes one keeps others that want the same waiting. Raises what `export_bundle`
    and `optimize_bundle` raise.
    """
    exported = cache_folder(backbone, method, prompt_mode, n_prompt_tokens)
    target, precision = choice.target, choice.precision
    wanted = (
        exported
        if target == "onnx"
        else exported.with_name(f"{exported.name}-{target}-{precision}")
    )
    if wanted.exists():
        return _cached(wanted)
    from bbt_accel.exporters.convert.optimize import optimize_bundle
    from bbt_accel.exporters.trace.export import export_bundle

    with reserved(exported.with_suffix(".bundles"), patience=math.inf):
        if not exported.exists():
            export_bundle(
                backbone,
                exported,
                method=method,
                prompt_mode=prompt_mode,
                n_prompt_tokens=n_prompt_tokens,
                on_progress=on_progress,
            )
        if not wanted.exists():
            optimize_bundle(
                exported,
                wanted,
                target=target,
                precision=precision,
                threads=threads,
                on_progress=on_progress,
            )
    return _cached(wanted)


def _cached(folder: Path) -> Bundle:
    try:
        return Bundle.read(folder)
    except BundleError as error:
        raise BundleError(
            f"{error}. It is in the cache: remove {folder}, and it is made again"
        ) from None


def cache_folder(backbone: str, method: str, prompt_mode: str, n_prompt_tokens: int) -> Path:
    """Where the exported bundle of a backbone is kept: by name, and for a local checkpoint by its
    content.

    A hub id is known by its name alone, so that a fit sends no request to the hub: later commits
    are not seen.
    """
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "bbt-accel")
    formats = bbt_accel.__version__, str(BundleInfo.model_fields["format"].default)
    content = [backbone_digest(backbone), method, prompt_mode, str(n_prompt_tokens), *formats]
    return root / hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
