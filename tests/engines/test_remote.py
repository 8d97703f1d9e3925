"""--engine remote: the same search as with the engine itself, against our server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("geventhttpclient")
pytest.importorskip("tritonclient")

from conftest import Export
from dummy_engine import DummyEngine
from search_parts import SETTINGS, search_bundle, task_file
from serving_parts import LIMITS, app, app_of, prompts, row_tensors, rows, rows_for, running

from bbt_accel import Population, load_engine, tune
from bbt_accel.core.bundle import Bundle
from bbt_accel.engines import client, remote
from bbt_accel.engines.client import Server
from bbt_accel.errors import BundleError, EngineError, UsageError
from bbt_accel.predict.inference import evaluate, predict_texts
from bbt_accel.search.run import Run
from bbt_accel.serve.app import make_app
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.protocol import HEADER_LENGTH


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAITS", (0.0,))
    monkeypatch.setenv("BBT_ACCEL_PATIENCE", "0.2")
    monkeypatch.delenv("BBT_ACCEL_TOKEN", raising=False)


@pytest.fixture(params=["bbt", "bbtv2"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle", request.param)


@pytest.fixture
def plain(tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle")


class Watched:
    """An app whose inference requests are noted: the names of their inputs, and the answer's
    status.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.requests: list[tuple[set[str], int]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/infer"):
            await self.inner(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        length = dict(scope["headers"]).get(HEADER_LENGTH.encode())
        head = json.loads(body[: int(length)] if length else body)
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return given.pop() if given else await receive()

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.requests.append(
                    ({tensor["name"] for tensor in head["inputs"]}, message["status"])
                )
            await send(message)

        await self.inner(scope, replay, note)


def tuned(bundle: Bundle, folder: Path, name: str, engine: str, **options: Any) -> Run:
    task = task_file(folder / "data")
    settings = SETTINGS | {"budget": 60}
    output = folder / name
    return tune(
        bundle,
        task,
        data=folder / "data",
        engine=engine,
        output=output,
        settings=settings,
        progress=False,
        **options,
    )


# Our server


def test_a_search_walks_the_same_path_as_with_the_engine_itself(
    bundle: Bundle, tmp_path: Path
) -> None:
    local = tuned(bundle, tmp_path, "local", "dummy")
    with running(app(bundle)) as url:
        far = tuned(bundle, tmp_path, "far", "remote", url=url)
        record = far.info.engine
        assert (record.name, record.versions["url"]) == ("remote", url)
        assert record.versions["server"].startswith("bbt-accel ")
        assert record.versions["engine"] == "dummy dummy 1"
        # a run may be somebody else's: its texts go to the server that the caller names, never to
        # that of the run
        for call in (
            lambda: evaluate(far.path),
            lambda: predict_texts(far.path, [{"text": "w1 w2"}]),
        ):
            with pytest.raises(
                UsageError, match=f"the search asked a server: pass --url {url} to send texts there"
            ):
                call()
        score, answers = (
            evaluate(far.path, url=url),
            predict_texts(far.path, [{"text": "w1 w2"}], url=url),
        )
    assert [g.losses for g in far.history] == [g.losses for g in local.history]
    assert far.prompt.tobytes() == local.prompt.tobytes()
    assert {**score, "engine": "dummy"} == evaluate(local.path)
    assert answers == predict_texts(local.path, [{"text": "w1 w2"}])


@pytest.mark.parametrize(
    ("name", "method", "engine"),
    [("roberta", "bbt", "ort"), ("roberta", "bbtv2", "ort"), ("bart", "bbt", "ort"), ("roberta",
    "bbtv2", "torch"),
     ("llama", "bbtv2", "ort")],
)  # fmt: skip
def test_a_real_backbone_gives_the_same_numbers(
    tiny: Export, name: str, method: str, engine: str
) -> None:
    pytest.importorskip("onnxruntime")
    bundle = tiny(name, method)
    found = rows_for(bundle)
    with load_engine(bundle, engine, threads=1) as local, running(app_of(local)) as url:  # noqa: SIM117
        with (
            load_engine(bundle, "remote", url=url) as far,
            local.bind(found) as near,
            far.bind(found) as there,
        ):
            population = prompts(bundle)
            np.testing.assert_array_equal(
                there.label_logits(population), near.label_logits(population)
            )
            outputs = near.outputs(population)
            for output, value in there.outputs(population).items():
                np.testing.assert_array_equal(value, outputs[output])
            if method == "bbtv2":
                np.testing.assert_array_equal(there.layer_stds(), near.layer_stds())
                for layer in range(bundle.info.n_layers):
                    stack, candidates = population[0], population[:, layer]
                    np.testing.assert_array_equal(
                        there.label_logits(Population(candidates, layer, stack)),
                        near.label_logits(Population(candidates, layer, stack)),
                    )


def test_rows_are_sent_once(plain: Bundle) -> None:
    watched = Watched(app(plain))
    with (
        running(watched) as url,
        load_engine(plain, "remote", url=url) as far,
        far.bind(rows()) as bound,
    ):
        for seed in range(3):
            bound.label_logits(prompts(plain, seed=seed))
    names = [names for names, _ in watched.requests]
    assert "input_ids" in names[0]
    assert names[1:] == [{"prompts"}] * 2


def test_rows_that_the_server_dropped_are_sent_again(plain: Bundle) -> None:
    watched = Watched(app(plain, Limits(2**20, 200, 30.0, cached_batches=1)))
    with (
        running(watched) as url,
        load_engine(plain, "remote", url=url) as far,
        DummyEngine(plain) as near,
    ):
        first, second = far.bind(rows(0)), far.bind(rows(1))
        for bound, seed in ((first, 0), (second, 1), (first, 0), (second, 1)):
            wanted = near.bind(rows(seed)).label_logits(prompts(plain))
            np.testing.assert_array_equal(bound.label_logits(prompts(plain)), wanted)
    assert [status for _, status in watched.requests] == [200, 200, 409, 200, 409, 200]


def test_a_population_is_split_to_the_servers_limits(bundle: Bundle) -> None:
    population = prompts(bundle, 11)
    wanted = DummyEngine(bundle).bind(rows()).label_logits(population)
    beside = sum(value.nbytes for value in row_tensors(rows()).values())
    small = remote.HEAD + beside + 3 * population[0].nbytes
    for limits in (Limits(2**20, 8 * 4, 30.0), Limits(small, 200, 30.0)):
        watched = Watched(app(bundle, limits))
        with (
            running(watched) as url,
            load_engine(bundle, "remote", url=url) as far,
            far.bind(rows()) as bound,
        ):
            np.testing.assert_array_equal(bound.label_logits(population), wanted)
        assert len(watched.requests) > 2
        assert {status for _, status in watched.requests} == {200}


def test_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = search_bundle(tmp_path / "other", bundle.info.method, precision="fp16")
    with (
        running(app(bundle)) as url,
        pytest.raises(BundleError, match=r"serves another bundle.*--bundle"),
    ):
        load_engine(other, "remote", url=url)


def test_the_token_comes_from_the_environment(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(app(plain, token="secret")) as url:
        with pytest.raises(EngineError, match=r"401.*set BBT_ACCEL_TOKEN"):
            load_engine(plain, "remote", url=url)
        monkeypatch.setenv("BBT_ACCEL_TOKEN", "secret")
        with load_engine(plain, "remote", url=url) as far, far.bind(rows()) as bound:
            assert bound.label_logits(prompts(plain)).shape == (5, 8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --url"),
        ({"url": "localhost:8000"}, "--url must be http"),
        ({"url": "http://"}, "--url must be http"),
        ({"url": "ftp://host"}, "--url must be http"),
        ({"url": "http://[::1:8000"}, "--url must be http"),
        ({"url": "http://host:99999"}, "--url must be http"),
        ({"url": "http://user:word@host"}, "--url must be http"),
        ({"url": "http://host", "device": "cuda"}, "--device and --threads are set on the server"),
        ({"url": "http://host", "threads": 2}, "--device and --threads are set on the server"),
    ],
)
def test_a_malformed_url_or_an_option_of_the_server_is_wrong_usage(
    plain: Bundle, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_engine(plain, "remote", **options)


def test_what_a_server_saves_cannot_be_switched_off_from_here(plain: Bundle) -> None:
    with running(app(plain)) as url, pytest.raises(UsageError, match="without"):
        load_engine(plain, "remote", url=url, without=["buckets"])


def test_a_url_is_for_the_remote_engine(plain: Bundle) -> None:
    with pytest.raises(UsageError, match="--url is for --engine remote"):
        load_engine(plain, "dummy", url="http://127.0.0.1:8000")


# Retries


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(app(search_bundle(tmp_path_factory.mktemp("server") / "bundle"))) as url:
        yield url


@pytest.fixture
def server(address: str) -> Iterator[Server]:
    with closing(Server(address)) as found:
        yield found


def test_an_engine_that_was_closed_gives_an_error_and_no_numbers(plain: Bundle) -> None:
    with running(app(plain)) as url:
        with load_engine(plain, "remote", url=url) as engine, engine.bind(rows()) as bound:
            pass
        with pytest.raises(EngineError, match=r"connection to .* is closed; load the engine again"):
            bound.label_logits(prompts(plain))


def failing(*errors: Exception) -> tuple[Callable[[dict[str, str]], str], list[int]]:
    """A call that raises these errors in turn and then answers; and the numbers of its attempts."""
    left, attempts = list(errors), []

    def call(headers: dict[str, str]) -> str:
        attempts.append(len(attempts))
        if left:
            raise left.pop(0)
        return "answer"

    return call, attempts


def refusal(status: str, message: str = "no") -> Exception:
    return client.InferenceServerException(message, status=status)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(), ConnectionResetError(), BrokenPipeError(), TimeoutError(),
        client.HTTPParseError("connection closed."), client.HTTPParseError("Incomplete response."),
        OSError(113, "No route to host"), socket.gaierror(socket.EAI_AGAIN, "x"), refusal("503"),
        refusal("502"),
        refusal("404", "Request for unknown model: 'bundle' has no available versions"),
        refusal("400", "model 'bundle' is not ready"),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(server: Server, error: Exception) -> None:
    call, attempts = failing(*[error] * 9)
    assert server.ask(call) == "answer"
    assert len(attempts) == 10


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(), "cannot reach .*is the server running"),
        (refusal("503"), "refused"),
    ],
)
def test_patience_ends(server: Server, error: Exception, kind: str, clock: list[float]) -> None:
    server.patience = 60.0
    call, _ = failing(*[error] * 1000)
    with pytest.raises(
        EngineError, match=rf"{kind}.*\(tried for 60 seconds; --resume continues a search\)$"
    ) as caught:
        server.ask(call)
    assert sum(clock) == 55.5  # the next wait would be longer than what is left of the minute
    assert clock[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    if isinstance(error, client.InferenceServerException):
        assert getattr(caught.value, "status", None) == 503


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits; time passes only in them."""
    waited: list[float] = []
    monkeypatch.setattr(client, "WAITS", (0.5, 1.0, 2.0, 4.0, 8.0))
    monkeypatch.setattr(
        client, "time", SimpleNamespace(sleep=waited.append, monotonic=lambda: sum(waited))
    )
    return waited


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"), OSError(5, "x"), refusal("500"), refusal("404", "there is no model 'x'"),
        refusal("400", "the request is malformed"), refusal("401"),
        client.HTTPParseError("Invalid method"),
        socket.gaierror(socket.EAI_NONAME, "x"),
    ],
)  # fmt: skip
def test_nothing_else_is_tried_again(server: Server, error: Exception) -> None:
    call, attempts = failing(error)
    refused = isinstance(error, client.InferenceServerException)
    with pytest.raises(
        EngineError,
        match=r"refused: .+ \(status \d+\)" if refused else "cannot query .*; check --url",
    ):
        server.ask(call)
    assert len(attempts) == 1


def test_a_response_that_takes_too_long_is_not_asked_for_again(
    server: Server, clock: list[float]
) -> None:
    attempts = []

    def call(headers: dict[str, str]) -> str:
        attempts.append(headers)
        clock.append(client.TIMEOUT)
        raise TimeoutError

    with pytest.raises(EngineError, match="did not respond within 600 seconds"):
        server.ask(call)
    assert len(attempts) == 1


@pytest.mark.parametrize("value", ["a minute", "-1", "inf", "nan"])
def test_a_patience_that_is_no_time_is_wrong_usage(
    plain: Bundle, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBT_ACCEL_PATIENCE", value)
    with pytest.raises(UsageError, match="BBT_ACCEL_PATIENCE must be a number of seconds"):
        load_engine(plain, "remote", url="http://127.0.0.1:1")


def test_a_server_that_came_back_goes_on_with_the_same_search(plain: Bundle) -> None:
    """It has lost its rows; the client sends them again."""
    with running(app(plain)) as url:
        far = load_engine(plain, "remote", url=url)
        bound = far.bind(rows())
        wanted = bound.label_logits(prompts(plain))
    with pytest.raises(EngineError, match="cannot reach"):
        bound.label_logits(prompts(plain))
    with on_port(app(plain), int(url.rpartition(":")[2])):
        np.testing.assert_array_equal(bound.label_logits(prompts(plain)), wanted)
    far.close()


@contextmanager
def on_port(application: Any, port: int) -> Iterator[str]:
    import serving_parts

    free = serving_parts.listen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_parts, "listen", lambda host, _: free(host, port))
        with running(application) as url:
            yield url


DYING = """
import os, sys
from bbt_accel.cli.commands import main
from dummy_engine import DummyBoundBatch
calls, computed = int(sys.argv[3]), DummyBoundBatch._label_logits
def label_logits(self, *given):
    global calls
    calls -= 1
    return computed(self, *given) if calls else os._exit(9)
DummyBoundBatch._label_logits = label_logits
main(["serve", sys.argv[1], "--engine", "dummy", "--port", sys.argv[2], "--json"])
"""


def test_a_search_outlives_its_server(
    plain: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose process dies in the middle of a call, and is started again."""
    monkeypatch.setattr(client, "WAITS", (0.1,))
    monkeypatch.setenv("BBT_ACCEL_PATIENCE", "60")

    def start(port: int, calls: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DYING, str(plain.path), str(port), str(calls)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(0, 3) as first, ThreadPoolExecutor(1) as pool:
        assert first.stdout is not None
        url = json.loads(first.stdout.readline())["url"]
        search = pool.submit(tuned, plain, tmp_path, "far", "remote", url=url)
        assert first.wait(60) == 9
        with start(int(url.rpartition(":")[2]), 0) as second:
            try:
                found = search.result(60)
            finally:
                second.kill()
    assert found.prompt.tobytes() == tuned(plain, tmp_path, "local", "dummy").prompt.tobytes()


# Any other server


def test_a_server_of_another_kind_is_refused(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bbt_accel.serve.app.EXTENSIONS", ["binary_tensor_data", "model_configuration"]
    )
    with running(make_app([], LIMITS)) as url:  # noqa: SIM117
        with pytest.raises(EngineError, match="is no bbt-accel server; start one with"):
            load_engine(plain, "remote", url=url)
