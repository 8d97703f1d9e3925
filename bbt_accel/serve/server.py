"""`bbt-accel serve`: load a bundle or a run, and serve it until Ctrl-C."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, engine_spec
from bbt_accel.core.inference_protocol import TOKEN
from bbt_accel.engines.registry import load_engine
from bbt_accel.errors import BbtError, UsageError
from bbt_accel.io.hub import fetched
from bbt_accel.search.run import Run, is_run
from bbt_accel.serve.app import is_loopback, make_app
from bbt_accel.serve.connection import Connection
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.models import make_models


def serve(
    path: str | Path,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    bundle: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits,
    ready: Callable[[str, list[str]], None],
) -> None:
    """Serve a bundle, or the prompt of a run and its bundle, until Ctrl-C or SIGTERM.

    engine, device: those of the run unless given; for a bundle the engine that it was made for, on
    the cpu if it can.
    bundle: for a run, another than the one that it was tuned for, as `Run.open_bundle` takes it.
    port: 0 for any free one. ready: called with the server's address and the names of its models
    once it listens. The bearer token is that of BBT_ACCEL_TOKEN.
    Raises UsageError for an address that others can reach if there is no token, and for a bundle
    with another; BbtError when the port is in use, and what reading and loading raise.
    """
    token = os.environ.get(TOKEN) or None
    check_host(host, token)
    path = fetched(path)
    run = Run.read(path) if is_run(path) else None
    served = Bundle.read(path) if run is None else run.open_bundle(bundle)
    if run is None and bundle is not None:
        raise UsageError(f"{path} is a bundle itself; --bundle is for a run")
    options: dict[str, Any] = {"threads": threads}
    if run is not None:
        engine, options["device"], options["without"] = run.info.engine.used_with(engine, device)
    else:
        engine = engine or (DEFAULT_ENGINE if served.info.target == "onnx" else served.info.target)
        options["device"] = device or engine_spec(engine).device("cpu")
    with listen(host, port) as listener, load_engine(served, engine, **options) as loaded:
        models = make_models(loaded, limits, run)
        app = make_app(models, limits, token)
        ready(address(listener), [model.name for model in models])
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
            uvicorn.Server(configuration(app, limits)).run(sockets=[listener])
        if (
            not app.state.stopped
        ):  # a call of the engine cannot be ended, and a close would wait for it or crash
            sys.stdout.flush()
            os._exit(0)


def configuration(app: Starlette, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"idle": limits.idle, "longest": limits.timeout}),
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=math.ceil(limits.keep_alive),
        timeout_graceful_shutdown=5,  # seconds for running requests to finish
        server_header=False,
    )


def check_host(host: str, token: str | None) -> None:
    """Raises UsageError for an address that other machines can reach, without a token."""
    if not is_loopback(host) and token is None:
        raise UsageError(
            f"--host {host} can be reached from other machines: set a bearer token in {TOKEN} first"
        )


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Unlike socket.create_server, this names the protocol: asyncio sets TCP_NODELAY on such sockets
    # only, and without it the client's delayed acknowledgement costs 40 ms per request.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
        return listener
    except OSError as error:
        listener.close()
        raise BbtError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from None


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
