"""The HTTP side of the server: paths, token, limits and error responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import bbt_accel
from bbt_accel.core.inference_protocol import ROWS_EXTENSION, TOKEN
from bbt_accel.errors import BbtError, DataError, RequestError, UsageError, clipped
from bbt_accel.io.tables import as_utf8
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.models import Model
from bbt_accel.serve.protocol import HEADER_LENGTH, read_request, write_response

EXTENSIONS = ["binary_tensor_data", "parameters", "model_configuration", ROWS_EXTENSION]
LAST_CALL = 3.0  # seconds for which the shutdown waits for a running call of the engine
LONGEST_ERROR = 400  # characters; what a request holds is repeated in part
log = logging.getLogger(__name__)


class Service:
    """The endpoints. Requests are parsed and models run in separate threads; health and metadata
    respond meanwhile.
    """

    def __init__(self, models: Sequence[Model], limits: Limits) -> None:
        self.models, self.limits = {model.name: model for model in models}, limits
        self.engine_thread = ThreadPoolExecutor(
            1, thread_name_prefix="engine"
        )  # no engine is thread-safe
        self.parsers = ThreadPoolExecutor(
            2, thread_name_prefix="parser"
        )  # few, because of the memory that each takes
        self.running = self.held = 0  # inference requests, and bytes of their bodies

    def routes(self) -> list[Route]:
        routes = [Route(f"/v2/health/{what}", self.healthy) for what in ("live", "ready")]
        routes += [Route(path, self.server) for path in ("/v2", "/v2/")]
        routes += [Route("/v2/repository/index", self.index, methods=["POST"])]
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(path, self.metadata),
                Route(f"{path}/ready", self.ready),
                Route(f"{path}/config", self.config),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return routes

    async def stop(self) -> bool:
        """Drop the requests that wait, and wait a while for the one that is computed; whether it
        has ended.
        """
        self.parsers.shutdown(wait=False, cancel_futures=True)
        ending = threading.Thread(
            target=partial(self.engine_thread.shutdown, cancel_futures=True), daemon=True
        )
        ending.start()
        await asyncio.to_thread(ending.join, LAST_CALL)
        return not ending.is_alive()

    async def healthy(self, request: Request) -> Response:
        return JSONResponse(
            {"live": True} if request.url.path.endswith("live") else {"ready": True}
        )

    async def server(self, request: Request) -> Response:
        facts = {"name": "bbt-accel", "version": bbt_accel.__version__, "extensions": EXTENSIONS}
        return JSONResponse(facts | {"models": list(self.models)})

    async def index(self, request: Request) -> Response:
        """The models, as Triton lists its repository."""
        return JSONResponse(
            [{"name": name, "version": "1", "state": "READY"} for name in self.models]
        )

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(self.model(request).metadata())

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"name": self.model(request).name, "ready": True})

    async def config(self, request: Request) -> Response:
        return JSONResponse(self.model(request).config())

    async def infer(self, request: Request) -> Response:
        model = self.model(request)
        if self.running >= self.limits.requests:
            raise RequestError(f"{self.running} requests are in progress; try again later", 503)
        self.running += 1
        request.state.held = 0
        try:
            return await self.infer_with(model, request)
        except asyncio.CancelledError:
            raise RequestError("the server is stopping", 503) from None
        finally:
            self.running -= 1
            self.held -= request.state.held

    async def infer_with(self, model: Model, request: Request) -> Response:
        async with self.timeout("the request took more than {} seconds to arrive", 408):
            body = await self.body(request)
        length = request.headers.get(HEADER_LENGTH)
        async with (
            waiting(request) as dropped,
            self.timeout("the server is busy: no result within {} seconds", 503),
        ):
            # When it is dropped, a running call ends where its model looks for that, one in the
            # queue at its turn.
            run = asyncio.get_running_loop().run_in_executor
            read = await run(self.parsers, read_request, body, length, model.inputs, model.outputs)
            del body
            outputs, parameters = await run(
                self.engine_thread, model.infer, read.tensors, read.parameters, dropped
            )
            written = (model.name, read, outputs, model.outputs, parameters)
            content, headers = await run(self.parsers, write_response, *written)
        return Response(content, headers=headers)

    def model(self, request: Request) -> Model:
        name, version = request.path_params["name"], request.path_params.get("version", "1")
        if name not in self.models or version != "1":
            listed = ", ".join(self.models)
            asked = f"{clipped(name, 80)!r} version {clipped(version, 20)}"
            raise RequestError(
                f"there is no model {asked}; models are {listed}, all version 1", 404
            )
        return self.models[name]

    async def body(self, request: Request) -> bytes:
        """The body, decompressed; refused before or during its arrival if it exceeds the limit."""
        limit, parts, size = self.limits.request_bytes, [], 0
        too_large = RequestError(
            f"the request is larger than {limit} bytes; send fewer candidates or rows", 413
        )
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        decompress = decompressor(request.headers.get("content-encoding", "identity"))
        async for part in self.stream(request):
            parts.append(decompress(part, limit + 1 - size))
            size += len(parts[-1])
            request.state.held = size
            self.held += len(parts[-1])
            if size > limit:
                raise too_large
            if self.held > self.limits.bodies * limit:
                raise RequestError(
                    f"the server holds {self.held - size} bytes of other requests; try again later",
                    503,
                )
        decompress(b"", 0)
        return b"".join(parts)

    async def stream(self, request: Request) -> AsyncIterator[bytes]:
        """The parts of the body as they arrive, none of them later than the limit."""
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout(self.limits.idle):
                    part = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise RequestError(
                    f"the request stopped for {self.limits.idle:g} seconds", 408
                ) from None
            yield part

    @asynccontextmanager
    async def timeout(self, message: str, status: int) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.timeout):
                yield
        except TimeoutError:
            raise RequestError(message.format(f"{self.limits.timeout:g}"), status) from None


@asynccontextmanager
async def waiting(request: Request) -> AsyncIterator[threading.Event]:
    """An event that is set when the client of a request, whose body is read, disconnects; and when
    the block ends.
    """
    dropped = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        dropped.set()

    watching = asyncio.create_task(watch())
    try:
        yield dropped
    finally:
        watching.cancel()
        dropped.set()


class Token:
    """Requires `Authorization: Bearer TOKEN` of every request except health checks."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and not scope["path"].startswith("/v2/health/"):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.expected):
                app = JSONResponse(
                    {"error": "a valid bearer token is required"},
                    401,
                    {"www-authenticate": "Bearer"},
                )
        await app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host by this name or address; False for a name that may
    have any address.
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower().removesuffix(".") == "localhost"


class Loopback:
    """Without a token, refuses requests to a name of another machine, which a web page could make
    resolve to this one, and those with the Origin of a page of another machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            for name in (b"host", b"origin"):
                given = headers.get(name, b"localhost").decode("latin-1")
                if not is_loopback(re.sub(r"^https?://|:\d*\Z", "", given).strip("[]")):
                    error = (
                        "without a token the server answers to localhost alone, not to "
                        f"{clipped(given, 80)!r}"
                    )
                    app = JSONResponse({"error": f"{error}; set {TOKEN}"}, 403)
        await app(scope, receive, send)


def decompressor(encoding: str) -> Callable[[bytes, int], bytes]:
    """A function from the next part of a body, and the most bytes wanted, to decompressed bytes.

    Called without a part at the end, it raises RequestError for a body that is not whole. Raises
    RequestError for an encoding other than identity, gzip and deflate.
    """
    name = encoding.strip().lower()
    if name == "identity":
        return lambda part, most: part
    if name not in ("gzip", "deflate"):
        known = "send the body as gzip, deflate or uncompressed"
        raise RequestError(
            f"content encoding {clipped(encoding, 40)} is not supported; {known}", 415
        )
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16 if name == "gzip" else zlib.MAX_WBITS)

    def decompress(part: bytes, most: int) -> bytes:
        try:
            found = stream.decompress(part, most) if part else b""
        except zlib.error as error:
            raise RequestError(f"the body is not {name} data ({error})") from None
        if stream.unused_data or (not part and not stream.eof):
            raise RequestError(f"the body is not {name} data, whole and alone")
        return found

    return decompress


def make_app(models: Sequence[Model], limits: Limits, token: str | None = None) -> Starlette:
    """The ASGI application.

    After its shutdown `state.stopped` tells whether the caller may close the engine, which may
    still compute.
    """
    service = Service(models, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        app.state.stopped = await service.stop()

    app = Starlette(
        routes=service.routes(),
        lifespan=lifespan,
        middleware=[Middleware(Token, token=token) if token else Middleware(Loopback)],
        exception_handlers={
            BbtError: refuse,
            HTTPException: refuse,
            ClientDisconnect: refuse,
            Exception: fail,
        },
    )
    app.state.stopped = False  # and so it stays where a second Ctrl-C skips the shutdown
    return app


async def refuse(request: Request, error: Exception) -> Response:
    """The protocol's error response: 400 for the client's errors, unless they have a status of
    their own.
    """
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    status = error.status if isinstance(error, RequestError) else 500
    if isinstance(error, (DataError, UsageError, ClientDisconnect)):
        status = 400
    if status == 500:
        log.error("%s: %s", request.url.path, error)
    text = as_utf8(clipped(str(error), LONGEST_ERROR))
    return JSONResponse({"error": text or "the client disconnected"}, status)


async def fail(request: Request, error: Exception) -> Response:
    """An internal error; Starlette raises it again for the log."""
    return JSONResponse({"error": "internal error; the server's log has the traceback"}, 500)
