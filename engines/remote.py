"""A backbone on a server of the Open Inference Protocol: `bbt-accel serve` or any other."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import chain, repeat
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.ssl
import geventhttpclient  # noqa: F401 - where it is missing, tritonclient.http raises RuntimeError
import numpy as np
import tritonclient.http as triton
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from bbt_accel import inference_protocol as protocol
from bbt_accel.batch import Batch, Float32
from bbt_accel.bundle import STATES, Bundle
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.staged import Arrays, StagedEngine
from bbt_accel.errors import BundleError, EngineError, UsageError, clipped
from bbt_accel.population import Population

TIMEOUT = 600.0  # seconds to wait for a response
PATIENCE = 60.0  # seconds for which a request is tried again, unless the environment says otherwise
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry; the last one again and again
UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
NOT_READY = re.compile("not ready|no available versions|loading|unavailable")
"""What servers say with the status 400 or 404 of a model that is there and being loaded."""
HEAD = 65536  # bytes of a request that are reserved for its JSON header


def connect(bundle: Bundle, *, url: str, without: frozenset[str] = frozenset()) -> Engine:
    """An engine that sends its work to `url`, after checking that the server has the same bundle.

    Raises UsageError for `without` where the server decides, EngineError when it cannot be reached or refuses,
    BundleError when it has another bundle.
    """
    server = Server(url)
    try:
        if protocol.ROWS_EXTENSION not in server.facts.get("extensions", ()):
            return TritonEngine(bundle, server, without)
        if without:
            raise UsageError("--without does not apply to a bbt-accel server; omit it")
        return RemoteEngine(bundle, server)
    except BaseException:
        server.close()
        raise


class Server:
    """A server at `http://HOST:PORT[/BASE]`, with `/v2/models/NAME` appended to choose one of several models."""

    closed = False

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise UsageError(f"--url must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
        base, _, name = parts.path.rstrip("/").partition("/v2/models/")
        self.url, self.model, self.patience = url, name or None, patience()
        hub = gevent.get_hub()
        if KeyboardInterrupt not in hub.NOT_ERROR:  # gevent would print Ctrl-C instead of raising it
            hub.NOT_ERROR += (KeyboardInterrupt,)
        secure, host = parts.scheme == "https", parts.netloc + base.removesuffix("/v2")
        context = gevent.ssl.create_default_context if secure else None
        options = {"connection_timeout": 10.0, "network_timeout": TIMEOUT, "ssl": secure}
        try:
            self.client = triton.InferenceServerClient(host, **options, ssl_context_factory=context)
        except (ValueError, InferenceServerException) as error:
            raise UsageError(f"--url {url!r} is not an address ({error})") from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Its metadata. Raises what `ask` raises."""
        found: dict[str, Any] = self.ask(self.client.get_server_metadata)
        return found

    def ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a client call returns; it is tried again while the server cannot be reached or is not ready.

        Raises EngineError or ServerRefused.
        """
        if self.closed:
            raise EngineError(f"the connection to {self.url} is closed; load the engine again")
        token, waits, until = os.environ.get(protocol.TOKEN), chain(WAITS, repeat(WAITS[-1])), None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        while True:
            try:
                return call(*arguments, headers=headers, **options)
            except Exception as error:
                problem = self.problem(error)
                if not passes(error):
                    raise problem from None
                until, wait = until or time.monotonic() + self.patience, next(waits)
                if time.monotonic() + wait > until:
                    tried = f"tried for {self.patience:g} seconds; --resume continues a search"
                    problem.args = (f"{problem} ({tried})",)
                    raise problem from None
            time.sleep(wait)

    def problem(self, error: Exception) -> EngineError:
        """What a client's error means. Other errors than the client's are raised."""
        if isinstance(error, InferenceServerException):
            return ServerRefused.of(self.url, error)
        if passes(error):
            return EngineError(f"cannot reach {self.url} ({error}); is the server running?")
        if isinstance(error, TimeoutError):
            return EngineError(f"{self.url} did not respond within {TIMEOUT:g} seconds")
        if isinstance(error, (OSError, ValueError)):
            return EngineError(f"cannot query {self.url} ({error}); check --url")
        raise error

    def infer(
        self, model: str, arrays: Mapping[str, Any], rows: str | None = None, outputs: Sequence[str] | None = None
    ) -> Any:
        """The result of one request with these arrays, and a hash that refers to rows. outputs: all unless given."""
        inputs = [
            triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        parameters = None if rows is None else {protocol.ROWS: rows}
        wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        return self.ask(self.client.infer, model, inputs, outputs=wanted, parameters=parameters)

    def check(self, bundle: Bundle, model: str) -> dict[str, str]:
        """The parameters of a model's configuration, if any. Raises BundleError when they name another bundle."""
        try:
            parameters = self.ask(self.client.get_model_config, model).get("parameters") or {}
        except ServerRefused as error:
            if error.status not in (404, 405, 501, None):
                raise
            parameters = {}
        found = {name: str(entry.get("string_value", "")) for name, entry in parameters.items()}
        if found.get(protocol.DIGEST, bundle.digest) != bundle.digest:
            there = f"{found.get('backbone', 'unknown')}, {found[protocol.DIGEST][:12]}"
            why = f"{self.url} serves another bundle ({there}) than {bundle.path} ({bundle.digest[:12]})"
            raise BundleError(f"{why}; pass the server's bundle as --bundle")
        return found

    def versions(self) -> dict[str, str]:
        return {"url": self.url, "server": f"{self.facts.get('name')} {self.facts.get('version')}"}

    def close(self) -> None:
        self.closed = True
        self.client.close()


class ServerRefused(EngineError):
    """The server responded with an error; `status` is its HTTP status."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def of(cls, url: str, error: InferenceServerException) -> ServerRefused:
        status = status_of(error)
        hint = f"; set {protocol.TOKEN} to the server's token" if status in (401, 403) else ""
        reason = clipped((str(error.message()).strip() or "without a reason").splitlines()[0])
        return cls(f"{url} refused: {reason} (status {status or 'unknown'}){hint}", status)


def status_of(error: InferenceServerException) -> int | None:
    status = str(error.status() or "")
    return int(status) if status.isdecimal() else None


def passes(error: Exception) -> bool:
    """Whether an error may pass by itself: the server is not reached (502: by its proxy), or its model not ready."""
    if isinstance(error, InferenceServerException):
        status = status_of(error)
        loading = status in (400, 404) and NOT_READY.search(str(error.message()).lower())
        return status in (502, 503) or bool(loading)
    if isinstance(error, (ConnectionError, HTTPConnectionClosed)):
        return True
    return isinstance(error, OSError) and error.errno in UNREACHABLE


def patience() -> float:
    """Seconds for which requests are tried again. Raises UsageError for an environment variable that is no number."""
    given = os.environ.get(protocol.PATIENCE) or PATIENCE
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{protocol.PATIENCE} must be a number of seconds, not {given!r:.50}")
    return seconds


class RemoteEngine(Engine):
    """A bbt-accel server: rows are sent once, then only prompts."""

    name = "remote"

    def __init__(self, bundle: Bundle, server: Server) -> None:
        super().__init__(bundle)
        self.server = server
        self.facts = server.check(bundle, protocol.BACKBONE)
        self.max_batch = int(self.facts.get("max_batch", 2**31))  # rows times candidates, per request
        self.max_bytes = int(self.facts.get("max_request_bytes", 2**31))

    def bind(self, batch: Batch) -> RemoteBoundBatch:
        check_tokens(self.bundle, batch)
        return RemoteBoundBatch(self, batch)

    def versions(self) -> dict[str, str]:
        return self.server.versions() | {"engine": self.facts.get("engine", "unknown")}

    def close(self) -> None:
        self.server.close()


class RemoteBoundBatch(BoundBatch):
    """Rows that the server caches; they are sent again when it has dropped them."""

    def __init__(self, engine: RemoteEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine, self.rows = engine, batch.inputs()
        self.hash: str | None = None  # as the server returned it; None until it has the rows

    def infer(self, model: str, own: dict[str, Any], outputs: Sequence[str]) -> dict[str, Float32]:
        server, result = self.engine.server, None
        if self.hash is not None:
            try:
                result = server.infer(model, own, self.hash)
            except ServerRefused as error:
                if error.status != protocol.UNKNOWN_ROWS:
                    raise
        if result is None:
            result = server.infer(model, {**own, **self.rows})
            self.hash = str(result.get_response().get("parameters", {}).get(protocol.ROWS))
        found = {name: result.as_numpy(name) for name in outputs}
        for name, value in found.items():
            if value is None:
                raise EngineError(f"{server.url} responded without {name}")
        return {name: np.array(value, np.float32) for name, value in found.items()}

    def _label_logits(self, population: Population) -> Float32:
        if population.layer is None:
            return self.request(protocol.BACKBONE, "prompts", population, ["label_logits"])["label_logits"]
        other = {"stack": population.fixed, "layer": np.array([population.layer], np.int64)}
        return self.request(protocol.LAYER, "candidates", population, ["label_logits"], other)["label_logits"]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        return self.request(protocol.OUTPUTS, "prompts", population.whole(), ["label_logits", *STATES])

    def request(
        self, model: str, name: str, population: Population, outputs: Sequence[str], other: dict[str, Any] | None = None
    ) -> dict[str, Float32]:
        """Outputs of all candidates, as many per request as the server takes."""
        candidates, other = np.asarray(population.candidates), other or {}  # this engine does not project
        room = self.engine.max_bytes - HEAD - sum(array.nbytes for array in (*other.values(), *self.rows.values()))
        step = max(1, min(self.engine.max_batch // len(self.batch), room // candidates[:1].nbytes))
        parts = [candidates[i : i + step] for i in range(0, len(candidates), step)]
        found = [self.infer(model, {name: part, **other}, outputs) for part in parts]
        return {output: np.concatenate([each[output] for each in found]) for output in outputs}

    def layer_stds(self) -> Float32:
        return self.infer(protocol.STDS, {}, ["layer_stds"])["layer_stds"]


class TritonEngine(StagedEngine):
    """Any other server, with one model for each stage of the bundle (`bbt-accel triton` writes them).

    Every request carries all its tensors; buckets, chunks and bbtv2's cached layers stay on the client.
    """

    name = "remote"

    def __init__(self, bundle: Bundle, server: Server, without: frozenset[str]) -> None:
        super().__init__(bundle, without=without)
        if bundle.info.target == "trt":
            from bbt_accel.exporters.plans import profile_of

            self.limit(profile_of(bundle))
        self.server = server
        name = server.model or bundle.path.resolve().name
        self.models = {stage: protocol.stage_model(name, stage) for stage in bundle.info.stages}
        self.inputs, self.outputs = dict[str, list[str]](), dict[str, list[str]]()
        for stage, model in self.models.items():
            self.inputs[stage], self.outputs[stage] = self.tensors_of(stage, model)

    def tensors_of(self, stage: str, model: str) -> tuple[list[str], list[str]]:
        """Names of a model's inputs and outputs. BundleError for another bundle, or prompts of another shape."""
        self.server.check(self.bundle, model)
        metadata = self.server.ask(self.server.client.get_model_metadata, model)
        shapes = {tensor["name"]: [int(size) for size in tensor["shape"]] for tensor in metadata["inputs"]}
        found, wanted = shapes.get("prompts"), [-1, *self.bundle.info.prompt_shape[-2:]]
        if stage not in ("context", "embed") and found != wanted:
            takes = f"model {model} of {self.server.url} takes prompts {found}, not {wanted}"
            raise BundleError(f"{takes}; it belongs to another bundle")
        return list(shapes), [tensor["name"] for tensor in metadata["outputs"]]

    def run(self, stage: str, inputs: Arrays, skip: Collection[str] = ()) -> Arrays:
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self.inputs[stage]}
        wanted = [name for name in self.outputs[stage] if name not in skip]
        result = self.server.infer(self.models[stage], arrays, outputs=wanted)
        return {out["name"]: result.as_numpy(out["name"]) for out in result.get_response()["outputs"]}

    def versions(self) -> dict[str, str]:
        return self.server.versions()

    def close(self) -> None:
        super().close()
        self.server.close()
