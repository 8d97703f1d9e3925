"""How a served bundle or prompt answers under load, on loopback: requests a second, and percentiles of their time.

Run as `python -m bbt_accel.benchmarks.load RUN -o REPORT`. The server is a process of its own; each client is a thread
that sends its next request when the last one is answered. Every row of the report is bounded in time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton

from bbt_accel.batch import Batch
from bbt_accel.benchmarks.load_report import Load, Measured, draw_load, load_markdown
from bbt_accel.benchmarks.timing import percentiles, random_prompts
from bbt_accel.benchmarks.workload import timed_rows
from bbt_accel.bundle import Bundle, new_folder
from bbt_accel.cli import called, one_line
from bbt_accel.display import busy, print_markdown
from bbt_accel.doctor import describe_machine, installed_versions
from bbt_accel.encoding import Encoder
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import EngineError, UsageError
from bbt_accel.run import INFO, Run
from bbt_accel.serving import BACKBONE, CLASSIFIER, ROWS, TOKEN
from bbt_accel.tasks import load_task

SEED = 42
START = 120.0
"""Seconds that the server may take to load."""
ANSWER = 120.0
"""Seconds that an answer may take."""
WARM = 2
"""Requests before those that are timed."""


@dataclass
class Request:
    """What a client sends, again and again."""

    what: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def measure(
    path: Path,
    output: Path,
    *,
    task: str = "demo",
    engine: str = "ort",
    threads: int | None = None,
    clients: list[int],
    seconds: float = 5.0,
    rows: int = 16,
    popsize: int = 10,
    command: str = "",
) -> None:
    """Measure a bundle, or a run with its bundle, and write report.json, report.md and report.png into `output`.

    command: for the report.
    Raises UsageError, EngineError when the server does not start, and what reading the bundle and the task raises.
    """
    run = Run.read(path) if (path / INFO).is_file() else None
    bundle = Bundle.read(path) if run is None else run.open_bundle()
    if bundle.info.method != "bbt":
        raise UsageError("the load test takes a bundle for bbt")
    chosen = load_task(task) if run is None else run.task
    batch = Encoder(bundle, chosen).encode(timed_rows(chosen, None, 16, rows, SEED))
    prompts = random_prompts(bundle.info, popsize, SEED)
    texts = None if run is None else [row.fields for row in timed_rows(chosen, None, 16, 1, SEED)]
    measured = []
    with new_folder(output) as folder, busy("load test") as tell:
        tell("the engine by itself", 0, 1)
        measured.append(direct(bundle, engine, threads, batch, prompts, seconds))
        with served(path, engine, threads) as url:
            steps = list(pairs(requests(url, batch, prompts, texts), clients))
            for done, (request, count) in enumerate(steps):
                tell(f"{request.what}, {count} clients", done, len(steps))
                measured.append(load(url, request, count, seconds))
        report = Load(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            bundle=bundle.info.backbone,
            engine=engine,
            threads=threads,
            rows=len(batch),
            length=batch.input_ids.shape[1],
            popsize=popsize,
            seconds=seconds,
            machine=dict(describe_machine()),
            versions=installed_versions(),
            measured=measured,
        )
        (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(load_markdown(report), encoding="utf-8")
        draw_load(folder / "report.png", report)


def pairs(plan: list[Request], clients: list[int]) -> Iterator[tuple[Request, int]]:
    """Each request with one client, then those that are worth it with more."""
    for request in plan:
        for count in clients if request.what in ("population", "texts") else clients[:1]:
            yield request, count


def requests(url: str, batch: Batch, prompts: Any, texts: list[dict[str, str]] | None) -> list[Request]:
    """Health alone, a population with its rows each time, with rows sent before, the same as JSON; and texts."""
    names = ("input_ids", "attention_mask", "readout", "label_token_ids")
    arrays = {"prompts": prompts, **{name: getattr(batch, name) for name in names}}
    path = f"/v2/models/{BACKBONE}/infer"
    full = infer("population with its rows", path, arrays)
    hash_ = json.loads(once(url, infer("", path, arrays, binary=False)))["parameters"][ROWS]
    found = [
        Request("health", "/v2/health/live"),
        full,
        infer("population", path, {"prompts": prompts}, rows=hash_),
        infer("population as JSON", path, {"prompts": prompts}, rows=hash_, binary=False),
    ]
    if texts is not None:
        columns = {name: np.array([row[name] for row in texts], object) for name in texts[0]}
        found.append(infer("texts", f"/v2/models/{CLASSIFIER}/infer", columns))
    return found


def infer(what: str, path: str, arrays: dict[str, Any], rows: str | None = None, binary: bool = True) -> Request:
    """A request as Triton's client writes it."""
    datatypes = {"f": "FP32", "i": "INT64", "O": "BYTES"}
    inputs = [triton.InferInput(name, list(a.shape), datatypes[a.dtype.kind]) for name, a in arrays.items()]
    for tensor, array in zip(inputs, arrays.values(), strict=True):
        tensor.set_data_from_numpy(array, binary_data=binary)
    outputs = None if binary else [triton.InferRequestedOutput("label_logits", binary_data=False)]
    parameters = {ROWS: rows} if rows else None
    body, length = triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs, parameters=parameters)
    return Request(what, path, body, {} if length is None else {"Inference-Header-Content-Length": str(length)})


def direct(bundle: Bundle, engine: str, threads: int | None, batch: Batch, prompts: Any, seconds: float) -> Measured:
    """The same population in this process, without a server."""
    with load_engine(bundle, engine, threads=threads) as loaded, loaded.bind(batch) as bound:
        return summary("population, no server", 1, repeat(lambda: bound.label_logits(prompts), seconds), [], 0)


def load(url: str, request: Request, clients: int, seconds: float) -> Measured:
    """The request from so many clients at once, each in a loop."""
    durations: list[float] = []
    errors: list[str] = []

    def client() -> None:
        try:
            with connection(url) as held:
                durations.extend(repeat(lambda: send(held, request), seconds))
        except (EngineError, OSError, http.client.HTTPException) as error:
            errors.append(str(error) or type(error).__name__)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not durations:
        raise EngineError(f"no request was answered ({errors[0]})")
    return summary(request.what, clients, durations, errors, len(request.body))


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds that each call took, of those that began within `seconds`; after a few that are not timed."""
    for _ in range(WARM):
        call()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        call()
        durations.append(time.perf_counter() - begun)
    return durations


def summary(what: str, clients: int, durations: list[float], errors: list[str], sent: int) -> Measured:
    median, p90, p99 = percentiles(durations)
    return Measured(
        what=what,
        clients=clients,
        requests=len(durations),
        errors=len(errors),
        per_second=clients * len(durations) / sum(durations),
        ms_median=median,
        ms_p90=p90,
        ms_p99=p99,
        ms_max=1000 * max(durations),
        kib_sent=sent / 2**10,
    )


@contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    held = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER)
    try:
        yield held
    finally:
        held.close()


def send(held: http.client.HTTPConnection, request: Request) -> bytes:
    held.request("POST" if request.body else "GET", request.path, request.body, request.headers)
    answer = held.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise EngineError(f"status {answer.status}: {content.decode(errors='replace'):.200}")
    return content


def once(url: str, request: Request) -> bytes:
    with connection(url) as held:
        return send(held, request)


@contextmanager
def served(path: Path, engine: str, threads: int | None) -> Iterator[str]:
    """`bbt-accel serve` in a process of its own, on a free port; gives its address."""
    command = [sys.executable, "-m", "bbt_accel.cli", "serve", str(path), "--engine", engine, "--port", "0", "--json"]
    command += ["--threads", str(threads)] if threads is not None else []
    free = {name: value for name, value in os.environ.items() if name != TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=free) as process:
        limit = threading.Timer(START, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            limit.cancel()
            if not line:
                raise EngineError(f"the server did not start: {process.stderr.read().strip() or 'no answer in time'}")
            yield json.loads(line)["url"]
        finally:
            limit.cancel()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="load", description="Load test of bbt-accel serve, on loopback.")
    parser.add_argument("path", type=Path, help="a bundle, or a run that tune has written")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--task", default="demo", help="whose rows are sent, for a bundle (default: demo)")
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--threads", type=int, help="of the server's engine (default: its own)")
    parser.add_argument("--clients", default="1,2,4,8", help="at once, with commas between (default: 1,2,4,8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a row of the report (default: 5)")
    parser.add_argument("--rows", type=int, default=16, help="of a request (default: 16)")
    parser.add_argument("--popsize", type=int, default=10, help="candidates of a request (default: 10)")
    given = parser.parse_args()
    if not all(count.isdigit() and int(count) for count in given.clients.split(",")):
        parser.error("--clients takes numbers from 1, with commas between")
    given.clients = [int(count) for count in given.clients.split(",")]
    with one_line():
        command = called("load")
        measure(**vars(given), command=command)
        print_markdown((given.output / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
