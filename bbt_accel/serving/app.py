"""The HTTP side of the server: paths, token, limits and error responses."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import bbt_accel
from bbt_accel.errors import BbtError, DataError, RequestError, UsageError
from bbt_accel.inference_protocol import ROWS_EXTENSION
from bbt_accel.serving import Limits
from bbt_accel.serving.models import Model
from bbt_accel.serving.protocol import HEADER_LENGTH, read_request, write_response

EXTENSIONS = ["binary_tensor_data", "parameters", "model_configuration", ROWS_EXTENSION]
log = logging.getLogger(__name__)


class Service:
    """The endpoints. Models run in one separate thread, so that health and metadata respond meanwhile."""

    def __init__(self, models: Sequence[Model], limits: Limits) -> None:
        self.models, self.limits = {model.name: model for model in models}, limits
        self.engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # no engine is thread-safe

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

    async def healthy(self, request: Request) -> Response:
        return JSONResponse({"live": True} if request.url.path.endswith("live") else {"ready": True})

    async def server(self, request: Request) -> Response:
        facts = {"name": "bbt-accel", "version": bbt_accel.__version__, "extensions": EXTENSIONS}
        return JSONResponse(facts | {"models": list(self.models)})

    async def index(self, request: Request) -> Response:
        """The models, as Triton lists its repository."""
        return JSONResponse([{"name": name, "version": "1", "state": "READY"} for name in self.models])

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(self.model(request).metadata())

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"name": self.model(request).name, "ready": True})

    async def config(self, request: Request) -> Response:
        return JSONResponse(self.model(request).config())

    async def infer(self, request: Request) -> Response:
        model = self.model(request)
        async with self.timeout("the request took more than {} seconds to arrive", 408):
            body = await self.body(request)
        length = request.headers.get(HEADER_LENGTH)
        read = await run_in_threadpool(read_request, body, length, model.inputs, model.outputs)
        del body
        async with self.timeout("the engine is busy: no result within {} seconds", 503):
            loop = asyncio.get_running_loop()
            computed = loop.run_in_executor(self.engine_thread, model.infer, read.tensors, read.parameters)
            outputs, parameters = await computed  # at the timeout a running call continues, a waiting one is dropped
        content, headers = await run_in_threadpool(write_response, model.name, read, outputs, model.outputs, parameters)
        return Response(content, headers=headers)

    def model(self, request: Request) -> Model:
        name, version = request.path_params["name"], request.path_params.get("version", "1")
        if name not in self.models or version != "1":
            listed = ", ".join(self.models)
            raise RequestError(f"there is no model {name!r} version {version}; models are {listed}, all version 1", 404)
        return self.models[name]

    async def body(self, request: Request) -> bytes:
        """The body, refused before or during its arrival if it exceeds the limit."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"content encoding {encoding} is not supported; send the body uncompressed", 415)
        limit, parts, size = self.limits.request_bytes, [], 0
        too_large = RequestError(f"the request is larger than {limit} bytes; send fewer candidates or rows", 413)
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise too_large
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    @asynccontextmanager
    async def timeout(self, message: str, status: int) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.timeout):
                yield
        except TimeoutError:
            raise RequestError(message.format(f"{self.limits.timeout:g}"), status) from None


class Token:
    """Requires `Authorization: Bearer TOKEN` of every request except health checks."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and not scope["path"].startswith("/v2/health/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                app = JSONResponse({"error": "a valid bearer token is required"}, 401, {"www-authenticate": "Bearer"})
        await app(scope, receive, send)


def make_app(models: Sequence[Model], limits: Limits, token: str | None = None) -> Starlette:
    """The ASGI application. The caller closes the engine after its shutdown."""
    service = Service(models, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.engine_thread.shutdown(wait=True, cancel_futures=True)

    return Starlette(
        routes=service.routes(),
        lifespan=lifespan,
        middleware=[Middleware(Token, token=token)] if token else [],
        exception_handlers={BbtError: refuse, HTTPException: refuse, ClientDisconnect: refuse, Exception: fail},
    )


async def refuse(request: Request, error: Exception) -> Response:
    """The protocol's error response: 400 for the client's errors, unless they have a status of their own."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    status = error.status if isinstance(error, RequestError) else 500
    if isinstance(error, (DataError, UsageError, ClientDisconnect)):
        status = 400
    if status == 500:
        log.error("%s: %s", request.url.path, error)
    return JSONResponse({"error": str(error) or "the client disconnected"}, status)


async def fail(request: Request, error: Exception) -> Response:
    """An internal error; Starlette raises it again for the log."""
    return JSONResponse({"error": "internal error; the server's log has the traceback"}, 500)
