"""What each command prints: tables, or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbt_accel.io.command import print_facts, print_json, print_markdown, print_table
from bbt_accel.io.reporting import JSON, METRICS, PAGE, TABLE, percent

if TYPE_CHECKING:
    from bbt_accel.benchmarks.sweep.report import SweepReport
    from bbt_accel.core.bundle import Bundle
    from bbt_accel.predict.fit import FitPlan, Fitted
    from bbt_accel.search.run import Run


def print_bundle(bundle: Bundle, as_json: bool) -> None:
    info = bundle.info
    if as_json:
        print_json({"path": bundle.path, "bytes": bundle.size, **info.model_dump(mode="json")})
        return
    facts: dict[str, object] = {
        "backbone": info.backbone,
        "family": info.family,
        "method": f"{info.method}, {info.prompt_mode}, {info.n_prompt_tokens} prompt tokens",
        "precision": f"{info.precision} for {info.target}",
        "size": f"{bundle.size / 2**20:.1f} MiB",
        "largest error vs. eager PyTorch": info.max_error if info.optimization is None else None,
    }
    facts |= {
        name.replace("_", " "): value
        for name, value in (info.optimization or {}).items()
        if value != []
    }
    print_facts(str(bundle.path), facts)


def print_run(run: Run, as_json: bool) -> None:
    info = run.info
    if as_json:
        print_json({"path": run.path, **info.model_dump(mode="json")})
        return
    workers = f", {info.engine.workers} workers" if info.engine.workers else ""
    most = "up to " if info.settings.allow_rare_classes else ""
    examples = f"{most}{info.settings.k_shot} examples per class"
    facts: dict[str, object] = {
        "task": f"{info.task.name}, {examples}, seed {info.settings.seed}",
        "backbone": f"{info.bundle.backbone}, {info.bundle.method}, {info.bundle.precision}",
        "engine": f"{info.engine.name} on {info.engine.url or info.engine.device}{workers}",
        "status": info.status + ("" if info.status == "done" else "; continue with --resume"),
        "calls": info.calls,
        "seconds": info.seconds,
        "calls/s": info.calls / info.seconds if info.seconds else None,
    }
    if info.best:
        facts |= {f"dev {info.task.metric}": info.best.dev_score, "dev loss": info.best.dev_loss}
        facts |= {"best prompt at call": info.best.calls}
    if info.baselines is not None:
        for name, value in info.baselines.model_dump().items():
            facts[f"dev, {name.replace('_', ' ')}"] = value
    facts["readout"] = "; ".join(filter(None, [info.readout.name, info.readout.reason]))
    if tried := info.readout.tried:
        rows = [
            (t.name, f"{t.log_loss:.3f}", percent(t.score, 1), f"{t.seconds:.1f}") for t in tried
        ]
        header = [
            "readout",
            "held-out log loss",
            f"held-out {METRICS[info.task.metric]}",
            "seconds",
        ]
        print_table("Readouts without a search (1 call)", rows, header)
    print_facts(relative(run.path), facts)
    if verdict := info.verdict():
        print(f"note: {verdict}")


def print_plan(plan: FitPlan) -> None:
    """What fit has chosen, and the commands that do the same, before the search."""
    print_facts("Chosen", plan.facts())
    print("The same in steps:", *plan.script(), "", sep="\n", flush=True)


def print_fitted(found: Fitted, as_json: bool) -> None:
    if as_json:
        run, plan = found.run, found.plan
        chosen = {"commands": plan.script(), "classes": plan.counts}
        print_json(
            {"path": run.path, **chosen, "score": found.score, **run.info.model_dump(mode="json")}
        )
        return
    print_run(found.run, as_json)
    if found.score is not None:
        print_score(found.score, as_json)


def print_score(score: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print_json(score)
        return
    facts = {**score, "bundle": relative(str(score["bundle"]))}
    print_facts("Score", {name.replace("_", " "): value for name, value in facts.items()})


def relative(path: str | Path) -> str:
    """A path relative to the working directory if it lies below, as one would type it."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def print_predictions(
    rows: Sequence[Mapping[str, str]], found: Sequence[Mapping[str, Any]], as_json: bool
) -> None:
    """One line of JSON per text; or a table of text, class and its probability."""
    pairs = list(zip(rows, found, strict=True))
    if not as_json:
        lines = [
            (" | ".join(row.values()), p["class"], f"{p['probabilities'][p['class']]:.3f}")
            for row, p in pairs
        ]
        print_table("", lines, ["text", "label", "probability"])
        return
    for row, prediction in pairs:
        print_json({"text": dict(row) if len(row) > 1 else next(iter(row.values())), **prediction})


def print_package(path: Path, info: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"path": path, **info})
        return
    found, score = info["comparison"], info["score"]
    facts: dict[str, object] = {
        "format": f"{info['kind']}, {info['precision']}",
        "model": info["model"],
        "labels": ", ".join(info["labels"]),
        "readout": info["readout"],
        "compared with predict": (
            f"{found['rows']} texts, largest error of scores {found['largest_error']:.1e}"
        ),
        "labels that differ by rounding": found["labels_differ"] or None,
    }
    if score is not None:
        facts |= {
            f"test {score['metric']}": score["score"],
            "without a prompt": score["without_prompt"],
        }
    print_facts(relative(path), facts)


def print_pushed(repository: str, commit: str, kind: str, as_json: bool) -> None:
    """kind: run (also of a saved classifier), or package, which other tools load by the
    repository's name.
    """
    address = f"hf://{repository}" if kind == "run" else repository
    if as_json:
        print_json({"repository": repository, "commit": commit, kind: address})
    else:
        print(f"uploaded to {commit}; {'use' if kind == 'run' else 'load'} it as {address}")


def print_serving(url: str, models: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"url": url, "models": models})
    else:
        print(f"serving {', '.join(models)} at {url}; stop with Ctrl-C", flush=True)


def print_bench(output: Path, as_json: bool) -> None:
    if as_json:
        print_json(json.loads((output / JSON).read_text(encoding="utf-8")))
        return
    print_markdown((output / TABLE).read_text(encoding="utf-8"))
    print(f"written to {output}; open {output / PAGE} in a browser")


def print_sweep(report: SweepReport, output: Path, as_json: bool) -> None:
    """The table of a sweep and what failed, or the whole report.json."""
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    from bbt_accel.benchmarks.sweep.rendering import summary

    print_markdown(summary(report))
    print(f"written to {output}; {output / PAGE} lists every trial")


def print_diagnosis(diagnosis: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(diagnosis)
        return
    machine, versions = diagnosis["machine"], diagnosis["versions"]
    print_facts("Machine", machine | {"gpus": machine["gpus"] or "none found"})
    print_facts("Versions", {name: found or "not installed" for name, found in versions.items()})
    if diagnosis["onnxruntime_providers"]:
        print_facts("ONNX Runtime", {"listed providers": diagnosis["onnxruntime_providers"]})
    rows = [
        (name, "yes" if state["runs"] else "no", state["reason"], state["install"] or "")
        for name, state in diagnosis["engines"].items()
    ]
    print_table("Engines", rows, ["engine", "can run here", "reason", "to install"])
    print_facts("Recommended", diagnosis["recommended"])
    for kind in ("warning", "note"):
        for line in diagnosis[f"{kind}s"]:
            print(f"{kind}: {line}")
