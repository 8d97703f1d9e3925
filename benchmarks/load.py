"""Load test of a served bundle or run on loopback: requests/s, and percentiles of their time.

python -m bbt_accel.benchmarks.load RUN -o load

The server is a process of its own; each client is a thread that sends its next request when the
last one is answered.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tritonclient.http as triton
from pydantic import Field
from tritonclient.utils import np_to_triton_dtype

from bbt_accel.benchmarks.script import Report, Timed, count, counts, run_script
from bbt_accel.benchmarks.steps import SEED, random_prompts, timed_rows
from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import DEFAULT_ENGINE
from bbt_accel.core.inference_protocol import BACKBONE, CLASSIFIER, ROWS, TOKEN
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import EngineError
from bbt_accel.io import processes
from bbt_accel.io.progress import StepProgress
from bbt_accel.io.reporting import BLUE, GREY, ORANGE, figure, tidy
from bbt_accel.search.run import Run, is_run
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.task import load_task

TIMEOUT = 120.0  # seconds that the server may take to load, and to answer
WARM_UP = 2  # requests before those that are timed
SCALED = ("population", "texts")  # requests that are sent by each number of clients
Request = tuple[
    str, str, bytes, dict[str, str]
]  # what a client sends repeatedly: method, path, body and headers


class RequestTiming(Timed):
    """One kind of request. Times are per request."""

    request: str = Field(description="What is sent.")
    clients: int = Field(description="Concurrent clients.")
    requests: int = Field(
        description="Requests answered within the time, without those to warm up."
    )
    errors: int = Field(description="Clients that ended with an error.")
    per_second: float = Field(description="Requests/s of all clients together.")
    ms_max: float = Field(description="Milliseconds of the slowest request.")
    kib_sent: float = Field(description="Body of one request, KiB.")


class LoadReport(Report):
    """Load test of bbt-accel serve."""

    caption = "Latency and throughput by clients"
    backbone: str = Field(description="Of the bundle.")
    length: int = Field(description="S, tokens per row.")
    rows: list[RequestTiming] = Field(description="Every kind of request and number of clients.")

    def draw(self, file: Path) -> None:
        """Latency (median and 99th percentile) and throughput by clients."""
        kinds = {
            name: found
            for name in SCALED
            if (found := [row for row in self.rows if row.request == name])
        }
        with figure(file, 9, 3.2 * len(kinds), nrows=len(kinds), ncols=2, squeeze=False) as (
            _,
            grid,
        ):
            for (latency, throughput), (name, found) in zip(grid, kinds.items(), strict=True):
                clients = [row.clients for row in found]
                latency.plot(
                    clients, [row.ms_median for row in found], "o-", color=BLUE, label="median"
                )
                latency.plot(
                    clients,
                    [row.ms_p99 for row in found],
                    "s--",
                    color=ORANGE,
                    label="99th percentile",
                )
                throughput.plot(clients, [row.per_second for row in found], "o-", color=BLUE)
                for direct in (row for row in self.rows if row.request == f"{name}, no server"):
                    style = {"color": GREY, "linewidth": 0.9, "linestyle": ":"}
                    latency.axhline(direct.ms_median, label="median without a server", **style)
                    throughput.axhline(direct.per_second, **style)
                latency.legend(frameon=False, fontsize=9)
                for axes, label in ((latency, "ms per request"), (throughput, "requests/s")):
                    axes.set_title(name, fontsize=10, loc="left")
                    top = max(max(line.get_ydata()) for line in axes.get_lines())
                    axes.set(
                        xlabel="concurrent clients",
                        ylabel=label,
                        xticks=clients,
                        ylim=(0, 1.1 * top),
                    )
                    tidy(axes)


def measure_load(given: argparse.Namespace, work: Path, tell: StepProgress) -> LoadReport:
    """Raises EngineError when the server does not start; what reading the bundle and the task
    raises.
    """
    run = Run.read(given.path) if is_run(given.path) else None
    bundle = Bundle.read(given.path) if run is None else run.open_bundle()
    bundle.require("bbt")
    task = load_task(given.task) if run is None else run.task
    shown = [] if run is None else run.info.demonstrations
    data = None if run is None else run.data_path
    batch = Encoder(bundle, task, shown).encode(timed_rows(task, data, 16, given.rows))
    prompts = random_prompts(bundle.info, given.popsize, SEED)
    text = None if run is None else timed_rows(task, data, 16, 1)[0].fields
    tell("population, no server")
    with (
        load_engine(bundle, given.engine, threads=given.threads) as engine,
        engine.bind(batch) as bound,
    ):
        timings = [
            summary(
                "population, no server", repeat(lambda: bound.label_logits(prompts), given.seconds)
            )
        ]
    with served(given.path, given.engine, given.threads) as url:
        for name, request in requests(url, batch, prompts, text).items():
            for clients in given.clients if name in SCALED else given.clients[:1]:
                tell(f"{name}, {clients} clients")
                timings.append(load(url, name, request, clients, given.seconds))
    return LoadReport(
        backbone=bundle.info.backbone, length=batch.input_ids.shape[1], rows=timings, **given.report
    )


def requests(
    url: str, batch: Batch, prompts: Float32, text: dict[str, str] | None
) -> dict[str, Request]:
    """Health alone; a population with its rows, with rows sent before, and the same as JSON; and a
    text.
    """
    arrays = {"prompts": prompts, **batch.inputs()}
    with closing(connection(url)) as client:
        sent = json.loads(send(client, infer(BACKBONE, arrays, binary=False)))["parameters"][ROWS]
    found: dict[str, Request] = {
        "health": ("GET", "/v2/health/live", b"", {}),
        "population with its rows": infer(BACKBONE, arrays),
        "population": infer(BACKBONE, {"prompts": prompts}, rows=sent),
        "population as JSON": infer(BACKBONE, {"prompts": prompts}, rows=sent, binary=False),
    }
    if text is not None:
        found["texts"] = infer(
            CLASSIFIER, {name: np.array([value], object) for name, value in text.items()}
        )
    return found


def infer(
    model: str, arrays: dict[str, Any], rows: str | None = None, binary: bool = True
) -> Request:
    """A request as Triton's client writes it."""
    inputs = [
        triton.InferInput(key, list(a.shape), np_to_triton_dtype(a.dtype)).set_data_from_numpy(
            a, binary_data=binary
        )
        for key, a in arrays.items()
    ]
    outputs = None if binary else [triton.InferRequestedOutput("label_logits", binary_data=False)]
    parameters = {ROWS: rows} if rows else None
    body, length = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, parameters=parameters
    )
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    return "POST", f"/v2/models/{model}/infer", body, headers


def connection(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)


def send(client: http.client.HTTPConnection, request: Request) -> bytes:
    """The body of the response. Raises EngineError for another status than 200."""
    client.request(*request)
    response = client.getresponse()
    content = response.read()
    if response.status != 200:
        raise EngineError(f"status {response.status}: {content.decode(errors='replace'):.200}")
    return content


def load(url: str, name: str, request: Request, clients: int, seconds: float) -> RequestTiming:
    """The request from several clients at once, each in a loop. Raises EngineError if none is
    answered.
    """
    durations: list[float] = []
    errors: list[str] = []

    def run(_: int) -> None:
        try:
            with closing(connection(url)) as client:
                durations.extend(repeat(lambda: send(client, request), seconds))
        except (EngineError, OSError, http.client.HTTPException) as error:
            errors.append(str(error) or type(error).__name__)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(run, range(clients)))
    if not durations:
        raise EngineError(f"no request was answered ({errors[0]})")
    return summary(name, durations, clients, len(errors), len(request[2]))


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call that began within `seconds`, after some to warm up."""
    for _ in range(WARM_UP):
        call()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        call()
        durations.append(time.perf_counter() - begun)
    return durations


def summary(
    request: str, durations: list[float], clients: int = 1, errors: int = 0, sent: int = 0
) -> RequestTiming:
    """Raises EngineError where no request was in time."""
    if not durations:
        raise EngineError(f"no {request} request fits into --seconds; give more")
    counts = {"clients": clients, "requests": len(durations), "errors": errors}
    rate, most = (clients - errors) * len(durations) / sum(durations), 1000 * max(durations)
    timing = RequestTiming(
        request=request, **counts, per_second=rate, ms_max=most, kib_sent=sent / 2**10
    )
    timing.set_times([1000 * duration for duration in durations])
    return timing


@contextmanager
def served(path: Path, engine: str, threads: int | None) -> Iterator[str]:
    """`bbt-accel serve` in a process of its own, on a free port; yields its address. Its errors are
    printed.
    """
    words = ["serve", str(path), "--engine", engine, "--port", "0", "--json"]
    words += ["--threads", str(threads)] if threads is not None else []
    open_access = {
        name: value for name, value in (os.environ | processes.SAFE).items() if name != TOKEN
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bbt-load-")))
        command = processes.prepare_named(
            "bbt_accel.cli.commands:main", {"arguments": words}, folder
        )
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=open_access)
        )
        limit = threading.Timer(TIMEOUT, process.kill)
        limit.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
            limit.cancel()
            if not line:
                raise EngineError(
                    f"the server did not start within {TIMEOUT:.0f} s, or ended with an error"
                )
            yield json.loads(line)["url"]
        finally:
            limit.cancel()
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a bundle, or a run that tune has written")
    parser.add_argument(
        "--task",
        default="demo",
        help="task of the rows that are sent, for a bundle (default: demo)",
    )
    parser.add_argument("--engine", default=DEFAULT_ENGINE)
    parser.add_argument("--threads", type=count, help="CPU threads of the server's engine")
    parser.add_argument("--clients", type=counts, default=[1, 2, 4, 8], help="(default: 1,2,4,8)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds per row of the report (default: 5)"
    )
    parser.add_argument(
        "--rows", type=count, default=16, help="rows of a population request (default: 16)"
    )
    parser.add_argument(
        "--popsize", type=count, default=10, help="candidates of a population request (default: 10)"
    )


if __name__ == "__main__":
    run_script("load", __doc__, add_options, measure_load)
