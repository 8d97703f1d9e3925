"""The client of a server of the Open Inference Protocol: what it is asked, and when it is asked
again.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import chain, repeat
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.ssl
import geventhttpclient  # noqa: F401 - where it is missing, tritonclient.http raises RuntimeError
import tritonclient.http as triton
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from bbt_accel.core import inference_protocol as protocol
from bbt_accel.core.bundle import Bundle
from bbt_accel.errors import BundleError, EngineError, UsageError, clipped

CONNECTING = 10.0  # seconds to wait for a connection
TIMEOUT = 600.0  # seconds to wait for a response
PATIENCE = 60.0  # seconds for which a request is tried again, unless the environment says otherwise
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry; the last one again and again
UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}
NOT_READY = re.compile("not ready|no available versions|loading|unavailable")
"""What servers say with the status 400 or 404 of a model that is there and being loaded."""
TRUNCATED = re.compile("closed|incomplete")
"""What the HTTP parser says of a response that ends too early."""


class Server:
    """A server at `http://HOST:PORT[/BASE]`."""

    closed = False

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            wrong = (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or "@" in parts.netloc
                or parts.query
            )
            _ = parts.port  # ValueError for one that is no number, or too large
        except ValueError:
            wrong = True
        if wrong:
            raise UsageError(f"--url must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
        self.url, self.patience = url, patience()
        hub = gevent.get_hub()
        if (
            KeyboardInterrupt not in hub.NOT_ERROR
        ):  # gevent would print Ctrl-C instead of raising it
            hub.NOT_ERROR += (KeyboardInterrupt,)
        secure, host = parts.scheme == "https", parts.netloc + parts.path.rstrip("/")
        context = gevent.ssl.create_default_context if secure else None
        options = {"connection_timeout": CONNECTING, "network_timeout": TIMEOUT, "ssl": secure}
        try:
            self.client = triton.InferenceServerClient(host, **options, ssl_context_factory=context)
        except (ValueError, InferenceServerException) as error:
            raise UsageError(f"--url {url!r} is not an address ({error})") from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Its metadata. Raises what `described` raises."""
        return self.described(self.client.get_server_metadata)

    def described(self, call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """The JSON object that a client call returns. Raises what `ask` raises, and EngineError for
        anything else.
        """
        found = self.ask(call, *arguments)
        if not isinstance(found, dict):
            raise EngineError(
                f"{self.url} is no server of the Open Inference Protocol; check --url"
            )
        return found

    def ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a client call returns; it is tried again while the server cannot be reached or is
        not ready.

        Raises EngineError or ServerRefused.
        """
        if self.closed:
            raise EngineError(f"the connection to {self.url} is closed; load the engine again")
        token, waits, until = os.environ.get(protocol.TOKEN), chain(WAITS, repeat(WAITS[-1])), None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        while True:
            started = time.monotonic()
            try:
                return call(*arguments, headers=headers, **options)
            except Exception as caught:
                error = caught
                if isinstance(error, TimeoutError) and time.monotonic() - started < TIMEOUT:
                    error = ConnectionError(f"no connection within {CONNECTING:g} seconds")
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
        if isinstance(error, (OSError, ValueError, HTTPParseError)):
            return EngineError(f"cannot query {self.url} ({error}); check --url")
        raise error

    def infer(self, model: str, arrays: Mapping[str, Any], rows: str | None = None) -> Any:
        """The result of one request with these arrays, and a hash that refers to rows."""
        inputs = [
            triton.InferInput(
                name, list(array.shape), np_to_triton_dtype(array.dtype)
            ).set_data_from_numpy(array)
            for name, array in arrays.items()
        ]
        parameters = None if rows is None else {protocol.ROWS: rows}
        return self.ask(self.client.infer, model, inputs, parameters=parameters)

    def check(self, bundle: Bundle, model: str) -> dict[str, str]:
        """The parameters of a model's configuration, if any. Raises BundleError when they name
        another bundle.
        """
        try:
            parameters = self.described(self.client.get_model_config, model).get("parameters") or {}
        except ServerRefused as error:
            if error.status not in (404, 405, 501, None):
                raise
            parameters = {}
        entries = {name: entry for name, entry in parameters.items() if isinstance(entry, dict)}
        found = {name: str(entry.get("string_value", "")) for name, entry in entries.items()}
        if found.get(protocol.DIGEST, bundle.digest) != bundle.digest:
            there = f"{found.get('backbone', 'unknown')}, {found[protocol.DIGEST][:12]}"
            here = f"{bundle.path} ({bundle.digest[:12]})"
            raise BundleError(
                f"{self.url} serves another bundle ({there}) than {here}; pass that as --bundle"
            )
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
    """Whether an error may pass by itself: the server is not reached (502: by its proxy), or its
    model not ready.
    """
    if isinstance(error, InferenceServerException):
        status = status_of(error)
        loading = status in (400, 404) and NOT_READY.search(str(error.message()).lower())
        return status in (502, 503) or bool(loading)
    if isinstance(error, HTTPParseError):
        return TRUNCATED.search(str(error).lower()) is not None
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return isinstance(error, ConnectionError) or (
        isinstance(error, OSError) and error.errno in UNREACHABLE
    )


def patience() -> float:
    """Seconds for which requests are tried again. Raises UsageError for an environment variable
    that is no number.
    """
    given = os.environ.get(protocol.PATIENCE) or PATIENCE
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{protocol.PATIENCE} must be a number of seconds, not {given!r:.50}")
    return seconds
