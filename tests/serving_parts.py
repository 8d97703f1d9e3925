"""Shared by the tests of the server and its client: an app on the dummy engine, requests, and a
server in a thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from search_parts import batch
from starlette.testclient import TestClient

from bbt_accel.core.batch import Batch
from bbt_accel.core.bundle import Bundle
from bbt_accel.engines.base import Engine
from bbt_accel.engines.registry import load_engine
from bbt_accel.search.run import Run
from bbt_accel.serve.app import make_app
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.models import make_models
from bbt_accel.serve.server import address, configuration, listen

LIMITS = Limits(request_bytes=2**20, batch=200, timeout=30.0, cached_batches=3)
HEADER = "Inference-Header-Content-Length"


def app(
    bundle: Bundle, limits: Limits = LIMITS, token: str | None = None, run: Run | None = None
) -> Any:
    return app_of(load_engine(bundle, "dummy"), limits, token, run)


def app_of(
    engine: Engine, limits: Limits = LIMITS, token: str | None = None, run: Run | None = None
) -> Any:
    return make_app(make_models(engine, limits, run), limits, token)


def local_client(app: Any, **options: Any) -> TestClient:
    """A client on this machine: without a token the server answers no other."""
    return TestClient(app, base_url="http://localhost", **options)


def rows(seed: int = 0, count: int = 8, readout: int = 1) -> Batch:
    return replace(batch(rows=count, seed=seed), readout=np.full(count, readout))


def rows_for(bundle: Bundle) -> Batch:
    """Rows with a context where the backbone is a decoder."""
    found = rows()
    if not bundle.info.causal:
        return found
    last = np.full(len(found), found.input_ids.shape[1] - 1)
    return replace(found, readout=last, context_ids=np.array([5, 6, 7]))


def row_tensors(found: Batch) -> dict[str, Any]:
    return dict(found.inputs())


def prompts(bundle: Bundle, population: int = 5, seed: int = 0) -> Any:
    shape = (population, *bundle.info.prompt_shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def datatype(array: Any) -> str:
    return {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]


def in_json(tensors: Mapping[str, Any], **parameters: Any) -> dict[str, Any]:
    """A request whose tensors are JSON."""
    inputs = [
        {"name": name, "datatype": datatype(a), "shape": list(a.shape), "data": a.tolist()}
        for name, a in tensors.items()
    ]
    return {"inputs": inputs, "parameters": parameters}


def in_binary(tensors: Mapping[str, Any], **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """Body and header of a request with binary tensors that asks for binary outputs."""
    blobs = [bytes_of(a) for a in tensors.values()]
    inputs = [
        {
            "name": n,
            "datatype": datatype(a),
            "shape": list(a.shape),
            "parameters": {"binary_data_size": len(blob)},
        }
        for (n, a), blob in zip(tensors.items(), blobs, strict=True)
    ]
    head = json.dumps(
        {"inputs": inputs, "parameters": {**parameters, "binary_data_output": True}}
    ).encode()
    return b"".join([head, *blobs]), {HEADER: str(len(head))}


def bytes_of(array: Any) -> bytes:
    if array.dtype.kind != "O":
        return bytes(array.tobytes())
    texts = [text.encode() for text in array.flat]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def from_json(answer: Any) -> dict[str, Any]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer.json()["outputs"]}


def from_binary(answer: Any) -> dict[str, Any]:
    """Outputs of numbers in a binary response."""
    at = int(answer.headers[HEADER])
    found = {}
    for output in json.loads(answer.content[:at])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        dtype = {"FP32": "<f4", "INT64": "<i8"}[output["datatype"]]
        found[output["name"]] = np.frombuffer(answer.content[at : at + size], dtype).reshape(
            output["shape"]
        )
        at += size
    assert at == len(answer.content)
    return found


@contextmanager
def running(application: Any, limits: Limits = LIMITS) -> Iterator[str]:
    """The address of a server that runs in a thread, on a free port."""
    with listen("127.0.0.1", 0) as listener:
        settings = configuration(application, limits)
        settings.timeout_graceful_shutdown = 1
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield address(
                listener
            )  # it listens already: connections wait until the server accepts them
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()
