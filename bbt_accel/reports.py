"""What each command reports, as a table or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbt_accel.display import print_facts, print_json, print_markdown, print_table

if TYPE_CHECKING:
    from bbt_accel.bundle import Bundle
    from bbt_accel.run import Run
    from bbt_accel.sweeps.report import Report as SweepReport


def report_bundle(bundle: Bundle, as_json: bool, models: Sequence[str] = ()) -> None:
    """models: those that were written into a Triton repository."""
    info = bundle.info
    if as_json:
        triton = {"triton_models": models} if models else {}
        print_json({"path": bundle.path, "bytes": bundle.size, **info.model_dump(mode="json"), **triton})
        return
    facts: dict[str, object] = {
        "backbone": info.backbone,
        "family": info.family,
        "method": f"{info.method}, {info.prompt_mode}, {info.n_prompt_tokens} prompt tokens",
        "precision": f"{info.precision} for {info.target}",
        "size": f"{bundle.size / 2**20:.1f} MiB",
        "largest error against eager PyTorch": info.max_error,
    }
    facts |= info.optimization or {}
    print_facts(str(bundle.path), facts | ({"models for Triton": models} if models else {}))


def report_run(run: Run, as_json: bool) -> None:
    info = run.info
    if as_json:
        print_json({"path": run.path, **info.model_dump(mode="json")})
        return
    facts: dict[str, object] = {
        "task": f"{info.task.name}, {info.settings.k_shot} rows a class, seed {info.settings.seed}",
        "backbone": f"{info.bundle.backbone}, {info.bundle.method}, {info.bundle.precision}",
        "engine": f"{info.engine.name} on {info.engine.url or info.engine.device}"
        + (f", {info.engine.workers} workers" if info.engine.workers else ""),
        "status": info.status if info.status == "done" else f"{info.status}; go on with --resume",
        "calls": info.calls,
        "seconds": info.seconds,
        "calls a second": info.calls / info.seconds if info.seconds else None,
    }
    if info.best:
        facts |= {f"dev {info.task.metric}": info.best.dev_score, "dev loss": info.best.dev_loss}
        facts |= {"best prompt found after": f"{info.best.calls} calls"}
    print_facts(from_here(run.path), facts)


def report_score(score: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print_json(score)
        return
    print_facts("Score", {**score, "bundle": from_here(str(score["bundle"]))})


def from_here(path: str | Path) -> str:
    """A path as one would write it here: relative, if what it names lies below."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def report_predictions(
    rows: Sequence[Mapping[str, str]], predictions: Iterable[Mapping[str, Any]], as_json: bool
) -> None:
    """One line of JSON a text; or a table of text, label word and its probability."""
    if as_json:
        for row, prediction in zip(rows, predictions, strict=True):
            print_json({"text": _whole(row), **prediction})
        return
    lines = [
        (" | ".join(row.values()), p["word"], f"{p['probabilities'][p['word']]:.3f}")
        for row, p in zip(rows, predictions, strict=True)
    ]
    print_table("", ["text", "label", "probability"], lines)


def _whole(row: Mapping[str, str]) -> object:
    return dict(row) if len(row) > 1 else next(iter(row.values()))


def report_serving(url: str, models: Sequence[str], as_json: bool) -> None:
    """The server's address and models, when it listens."""
    if as_json:
        print_json({"url": url, "models": models})
    else:
        print(f"serving {', '.join(models)} at {url}; Ctrl-C stops", flush=True)


def report_bench(output: Path, as_json: bool) -> None:
    if as_json:
        print_json(json.loads((output / "report.json").read_text(encoding="utf-8")))
        return
    print_markdown((output / "report.md").read_text(encoding="utf-8"))
    print(f"written to {output}")


def report_sweep(report: SweepReport, output: Path, as_json: bool) -> None:
    """The table of a sweep and what failed, or the whole of report.json."""
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    from bbt_accel.sweeps.markdown import failures, legend, scores, summary

    print_markdown("\n\n".join([summary(report), scores(report), legend(report), *failures(report)]))
    print(f"written to {output}; {output / 'report.md'} has every trial")
