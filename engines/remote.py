"""A backbone on a server of the Open Inference Protocol: `bbt-accel serve` or any other."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import gevent
import gevent.ssl
import geventhttpclient  # noqa: F401 - where it is missing, tritonclient.http raises RuntimeError
import numpy as np
import tritonclient.http as triton
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException

from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import Bundle
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import BundleError, EngineError, UsageError
from bbt_accel.inference_protocol import (
    BACKBONE,
    DIGEST,
    LAYER,
    ROWS,
    ROWS_EXTENSION,
    STDS,
    TOKEN,
    UNKNOWN_ROWS,
    stage_model,
)
from bbt_accel.population import Population

TIMEOUT = 600.0
"""Seconds to wait for a response."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry after a connection error."""
HEAD = 65536
"""Bytes of a request that are reserved for its JSON header."""
DATATYPES = {np.dtype(np.float32): "FP32", np.dtype(np.float16): "FP16", np.dtype(np.int64): "INT64"}

Result = TypeVar("Result")


def connect(
    bundle: Bundle, *, url: str, device: str = "cpu", threads: int | None = None, without: frozenset[str] = frozenset()
) -> Engine:
    """An engine that sends its work to `url`, after checking that the server has the same bundle.

    Raises UsageError for options that only the server can set, EngineError when it cannot be reached or refuses,
    BundleError when it has another bundle.
    """
    if device != "cpu" or threads is not None:
        raise UsageError("--device and --threads are set on the server; omit them with --engine remote")
    server = Server(url)
    if ROWS_EXTENSION not in server.facts.get("extensions", ()):
        return TritonEngine(bundle, server, without)
    if without:
        raise UsageError("--without does not apply to a bbt-accel server; omit it")
    return RemoteEngine(bundle, server)


class Server:
    """A server at `http://HOST:PORT[/BASE]`, with `/v2/models/NAME` appended to choose one of several models."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise UsageError(f"--url must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
        base, _, name = parts.path.rstrip("/").partition("/v2/models/")
        self.url, self.model = url, name or None
        gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)  # gevent would print Ctrl-C instead of raising it
        secure = parts.scheme == "https"
        try:
            self.client = triton.InferenceServerClient(
                parts.netloc + base.removesuffix("/v2"),
                connection_timeout=10.0,
                network_timeout=TIMEOUT,
                ssl=secure,
                ssl_context_factory=gevent.ssl.create_default_context if secure else None,
            )
        except (ValueError, InferenceServerException) as error:
            raise UsageError(f"--url {url!r} is not an address ({error})") from None
        self.facts = self.ask(lambda headers: self.client.get_server_metadata(headers=headers))

    def ask(self, call: Callable[[dict[str, str]], Any]) -> Any:
        """The server's response; only connection errors are retried. Raises EngineError, or ServerRefused."""
        for wait in (*WAITS, None):
            token = os.environ.get(TOKEN)
            try:
                return call({"Authorization": f"Bearer {token}"} if token else {})
            except (ConnectionError, HTTPConnectionClosed) as error:
                if wait is None:
                    raise EngineError(
                        f"cannot reach {self.url} ({error}), after {len(WAITS)} retries; is the server running?"
                    ) from None
                time.sleep(wait)
            except InferenceServerException as error:
                raise ServerRefused(self.url, error) from None
            except TimeoutError:
                raise EngineError(f"{self.url} did not respond within {TIMEOUT:g} seconds") from None
            except (OSError, ValueError) as error:
                raise EngineError(f"cannot query {self.url} ({error}); check --url") from None
        raise AssertionError

    def config(self, model: str) -> dict[str, str]:
        """The parameters of a model's configuration; empty for a server that has none."""
        try:
            found = self.ask(lambda headers: self.client.get_model_config(model, headers=headers))
        except ServerRefused as error:
            if error.status in (404, 405, 501) or error.status is None:
                return {}
            raise
        return {name: str(entry.get("string_value", "")) for name, entry in (found.get("parameters") or {}).items()}

    def metadata(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(lambda headers: self.client.get_model_metadata(model, headers=headers))
        return found

    def infer(self, model: str, arrays: Mapping[str, Any], rows: str | None = None) -> Any:
        """The result of one request with these arrays, and a hash that refers to rows."""
        inputs = []
        for name, array in arrays.items():
            tensor = triton.InferInput(name, list(array.shape), DATATYPES[array.dtype])
            inputs.append(tensor.set_data_from_numpy(array))
        parameters = {ROWS: rows} if rows is not None else None
        return self.ask(
            lambda headers: self.client.infer(model, inputs, headers=headers, parameters=parameters),
        )

    def check(self, bundle: Bundle, model: str) -> dict[str, str]:
        """The parameters of a model's configuration. Raises BundleError when they name another bundle."""
        found = self.config(model)
        if found.get(DIGEST, bundle.digest) != bundle.digest:
            raise BundleError(
                f"{self.url} serves another bundle ({found.get('backbone', 'unknown')}, {found[DIGEST][:12]}) than "
                f"{bundle.path} ({bundle.digest[:12]}); pass the server's bundle as --bundle"
            )
        return found

    def close(self) -> None:
        self.client.close()


class ServerRefused(EngineError):
    """The server responded with an error; `status` is its HTTP status."""

    def __init__(self, url: str, error: InferenceServerException) -> None:
        status = str(error.status() or "")
        self.status = int(status) if re.fullmatch(r"\d{3}", status) else None
        hint = f"; set {TOKEN} to the server's token" if self.status in (401, 403) else ""
        super().__init__(f"{url} refused: {str(error.message()).splitlines()[0]} (status {status or 'unknown'}){hint}")


class RemoteEngine(Engine):
    """A bbt-accel server: rows are sent once, then only prompts."""

    name = "remote"

    def __init__(self, bundle: Bundle, server: Server) -> None:
        super().__init__(bundle)
        self.server = server
        self.facts = server.check(bundle, BACKBONE)

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The server's limits: rows times candidates, and bytes."""
        return int(self.facts.get("max_batch", 2**31)), int(self.facts.get("max_request_bytes", 2**31))

    def bind(self, batch: Batch) -> RemoteBoundBatch:
        check_tokens(self.bundle, batch)
        return RemoteBoundBatch(self, batch)

    def versions(self) -> dict[str, str]:
        server = f"{self.server.facts.get('name')} {self.server.facts.get('version')}"
        return {"url": self.server.url, "server": server, "engine": self.facts.get("engine", "unknown")}

    def close(self) -> None:
        self.server.close()


class RemoteBoundBatch(BoundBatch):
    """Rows that the server caches; they are sent again when it has dropped them."""

    def __init__(self, engine: RemoteEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine = engine
        self.rows = batch.inputs()
        self.hash: str | None = None
        """As the server returned it; None until it has the rows."""

    def infer(self, model: str, own: dict[str, Any], output: str) -> Float32:
        server = self.engine.server
        if self.hash is not None:
            try:
                return self.numpy(server.infer(model, own, self.hash), output)
            except ServerRefused as error:
                if error.status != UNKNOWN_ROWS:
                    raise
        result = server.infer(model, {**own, **self.rows})
        self.hash = str(result.get_response().get("parameters", {}).get(ROWS))
        return self.numpy(result, output)

    def numpy(self, result: Any, output: str) -> Float32:
        found = result.as_numpy(output)
        if found is None:
            raise EngineError(f"{self.engine.server.url} responded without {output}")
        return np.array(found, np.float32)

    def _label_logits(self, population: Population) -> Float32:
        candidates = np.asarray(population.candidates)  # this engine does not project
        if population.layer is None or population.fixed is None:
            model, name, other = BACKBONE, "prompts", {}
        else:
            model, name = LAYER, "candidates"
            other = {"stack": population.fixed, "layer": np.array([population.layer], np.int64)}
        reserved = sum(array.nbytes for array in other.values())
        chunks = self.chunks(candidates, reserved)
        return np.concatenate([self.infer(model, {name: candidates[some], **other}, "label_logits") for some in chunks])

    def layer_stds(self) -> Float32:
        return self.infer(STDS, {}, "layer_stds")

    def chunks(self, candidates: Float32, reserved: int) -> Iterator[slice]:
        """Candidates that fit into one request, with the rows and the reserved bytes."""
        batch, size = self.engine.limits
        room = size - HEAD - reserved - sum(value.nbytes for value in self.rows.values())
        step = max(1, min(batch // len(self.batch), room // candidates[:1].nbytes))
        for start in range(0, len(candidates), step):
            yield slice(start, start + step)


class TritonEngine(StagedEngine):
    """Any other server, with one model for each stage of the bundle (`bbt-accel triton` writes them).

    Every request carries all its tensors; buckets, chunks and bbtv2's cached layers stay on the client.
    """

    name = "remote"

    def __init__(self, bundle: Bundle, server: Server, without: frozenset[str]) -> None:
        super().__init__(bundle, "cpu", None, without)
        self.server = server
        name = server.model or bundle.path.resolve().name
        self.models = {stage: stage_model(name, stage) for stage in bundle.info.stages}
        self.inputs: dict[str, list[str]] = {}
        for stage, model in self.models.items():
            server.check(bundle, model)
            self.inputs[stage] = self.check_tensors(stage, server.metadata(model))

    def check_tensors(self, stage: str, metadata: dict[str, Any]) -> list[str]:
        """Names of a model's inputs. Raises BundleError when its prompts have another shape than the bundle's."""
        shapes = {tensor["name"]: [int(size) for size in tensor["shape"]] for tensor in metadata["inputs"]}
        wanted = [-1, *self.bundle.info.prompt_shape[-2:]]
        if stage != "embed" and shapes.get("prompts") != wanted:
            raise BundleError(
                f"model {self.models[stage]} of {self.server.url} takes prompts {shapes.get('prompts')}, not {wanted}; "
                "it belongs to another bundle"
            )
        return list(shapes)

    def run(self, stage: str, inputs: Arrays) -> Arrays:
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs[stage]}
        result = self.server.infer(self.models[stage], arrays)
        names = [output["name"] for output in result.get_response()["outputs"]]
        return {name: result.as_numpy(name) for name in names}

    def versions(self) -> dict[str, str]:
        facts = self.server.facts
        return {"url": self.server.url, "server": f"{facts.get('name')} {facts.get('version')}"}

    def close(self) -> None:
        self.server.close()
