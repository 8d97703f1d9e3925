"""The server: its responses, what it refuses and how, and that it stays up."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Export
from dummy_engine import DummyBoundBatch, DummyEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_parts import SETTINGS, search_bundle, task_file
from serving_parts import (
    HEADER,
    LIMITS,
    app,
    app_of,
    from_binary,
    from_json,
    in_binary,
    in_json,
    local_client,
    prompts,
    row_tensors,
    rows,
    running,
)
from starlette.testclient import TestClient

from bbt_accel import load_engine, tune
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.population import Population
from bbt_accel.engines.base import BoundBatch
from bbt_accel.errors import BbtError, EngineError, RequestError, TaskError, UsageError
from bbt_accel.predict.inference import predict_texts
from bbt_accel.search.run import Run
from bbt_accel.serve.connection import Connection
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.models import RowModel, make_models
from bbt_accel.serve.server import listen, serve
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder

INFER = "/v2/models/backbone/infer"


@pytest.fixture(params=["bbt", "bbtv2"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return search_bundle(tmp_path / "bundle", request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return search_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture(scope="module")
def client(plain: Bundle) -> Iterator[TestClient]:
    with local_client(app(plain)) as client:
        yield client


def whole(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    """All tensors of a valid request."""
    return {"prompts": prompts(bundle), **row_tensors(rows()), **changes}


def wanted(bundle: Bundle) -> Any:
    with DummyEngine(bundle).bind(rows()) as bound:
        return bound.label_logits(prompts(bundle))


def assert_correct(client: TestClient, bundle: Bundle) -> None:
    np.testing.assert_array_equal(
        from_json(client.post(INFER, json=in_json(whole(bundle))))["label_logits"], wanted(bundle)
    )


# Responses


def test_health_and_metadata(client: TestClient, plain: Bundle) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").status_code == 200
    server = client.get("/v2").json()
    assert (server["name"], server["models"]) == ("bbt-accel", ["backbone", "backbone_outputs"])
    assert {"binary_tensor_data", "bbt_accel_rows"} <= set(server["extensions"])
    for path in ("/v2/models/backbone", "/v2/models/backbone/versions/1"):
        model = client.get(path).json()
        assert model["inputs"][0] == {"name": "prompts", "datatype": "FP32", "shape": [-1, 4, 3]}
        assert model["outputs"] == [
            {"name": "label_logits", "datatype": "FP32", "shape": [-1, -1, -1]}
        ]
        assert client.get(f"{path}/ready").json() == {"name": "backbone", "ready": True}
        assert (
            client.get(f"{path}/config").json()["parameters"]["bundle"]["string_value"]
            == plain.digest
        )
    assert client.post("/v2/repository/index").json()[0] == {
        "name": "backbone",
        "version": "1",
        "state": "READY",
    }


def test_json_and_binary_return_the_engines_numbers_bit_for_bit(bundle: Bundle) -> None:
    with local_client(app(bundle)) as client:
        assert_correct(client, bundle)
        body, headers = in_binary(whole(bundle))
        answer = client.post(INFER, content=body, headers=headers)
        np.testing.assert_array_equal(from_binary(answer)["label_logits"], wanted(bundle))


def test_nested_and_flat_data_are_the_same(client: TestClient, plain: Bundle) -> None:
    request = in_json(whole(plain))
    for tensor in request["inputs"]:
        tensor["data"] = np.array(tensor["data"]).reshape(-1).tolist()
    np.testing.assert_array_equal(
        from_json(client.post(INFER, json=request))["label_logits"], wanted(plain)
    )


def test_the_states_of_bbtv2_are_bounded_by_the_rows_with_their_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = search_bundle(tmp_path / "bundle", "bbtv2")
    given = row_tensors(rows().padded(10, bundle.info.special.pad))
    size = given["input_ids"].size
    monkeypatch.setattr(Limits, "tokens", size - 1)
    with local_client(app(bundle)) as client:
        refused(
            client.post("/v2/models/backbone_stds/infer", json=in_json(given)),
            413,
            f"columns exceed {size - 1}",
        )


def test_the_id_is_returned_and_outputs_may_be_chosen(client: TestClient, plain: Bundle) -> None:
    request = in_json(whole(plain)) | {"id": "42"}
    assert client.post(INFER, json=request).json()["id"] == "42"
    request["outputs"] = [{"name": "label_logits", "parameters": {"binary_data": True}}]
    np.testing.assert_array_equal(
        from_binary(client.post(INFER, json=request))["label_logits"], wanted(plain)
    )


def test_one_layer_of_bbtv2(tmp_path: Path) -> None:
    bundle = search_bundle(tmp_path / "bundle", "bbtv2")
    stack, candidates = prompts(bundle, 1)[0], prompts(bundle, 5, seed=1)[:, 0]
    own = {"stack": stack, "layer": np.array([1]), "candidates": candidates}
    with local_client(app(bundle)) as client, DummyEngine(bundle).bind(rows()) as bound:
        answer = client.post(
            "/v2/models/backbone_layer/infer", json=in_json(own | row_tensors(rows()))
        )
        np.testing.assert_array_equal(
            from_json(answer)["label_logits"], bound.label_logits(Population(candidates, 1, stack))
        )
        answer = client.post("/v2/models/backbone_stds/infer", json=in_json(row_tensors(rows())))
        np.testing.assert_array_equal(from_json(answer)["layer_stds"], bound.layer_stds())
        wrong = client.post(
            "/v2/models/backbone_layer/infer", json=in_json(own | {"layer": np.array([3])})
        )
        assert wrong.status_code == 400


# The row cache


def test_rows_are_referred_to_by_their_hash(client: TestClient, plain: Bundle) -> None:
    hash_ = client.post(INFER, json=in_json(whole(plain))).json()["parameters"]["rows"]
    again = client.post(INFER, json=in_json({"prompts": prompts(plain)}, rows=hash_))
    np.testing.assert_array_equal(from_json(again)["label_logits"], wanted(plain))
    assert again.json()["parameters"]["rows"] == hash_


def test_the_least_recently_used_rows_are_dropped_and_may_be_sent_again(plain: Bundle) -> None:
    with local_client(app(plain)) as client:

        def send(seed: int) -> str:
            request = in_json({"prompts": prompts(plain), **row_tensors(rows(seed))})
            return str(client.post(INFER, json=request).json()["parameters"]["rows"])

        def known(hash_: str) -> int:
            return int(
                client.post(
                    INFER, json=in_json({"prompts": prompts(plain)}, rows=hash_)
                ).status_code
            )

        hashes = [send(seed) for seed in range(3)]  # as many as are cached
        assert known(hashes[0]) == 200  # which makes the second the oldest
        send(3)
        assert [known(hash_) for hash_ in hashes] == [200, 409, 200]
        assert send(1) == hashes[1]
        assert known(hashes[1]) == 200


def test_a_hash_that_is_not_that_of_the_rows_is_refused(client: TestClient, plain: Bundle) -> None:
    answer = client.post(INFER, json=in_json(whole(plain), rows="0" * 64))
    assert answer.status_code == 400
    assert "hash" in answer.json()["error"]


# Invalid requests


def refused(answer: Any, status: int, text: str) -> None:
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert text in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert len(answer.json()["error"]) < 450


LONG = np.ones((8, 41), np.int64)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompts": None}, "prompts is missing"),
        ({"input_ids": None}, "input_ids is missing"),
        ({"prompts": np.zeros((5, 4, 2), np.float32)}, "shape [-1, 4, 3], not [5, 4, 2]"),
        ({"prompts": np.zeros((0, 4, 3), np.float32)}, "at least one"),
        ({"prompts": np.full((5, 4, 3), np.nan, np.float32)}, "finite"),
        ({"input_ids": np.full((8, 6), 100)}, "vocabulary"),
        ({"input_ids": np.full((8, 6), -1)}, "vocabulary"),
        ({"input_ids": np.ones((7, 6), np.int64)}, "a batch needs"),
        ({"input_ids": np.ones((0, 6), np.int64)}, "a batch needs"),
        ({"input_ids": LONG, "attention_mask": LONG}, "41 tokens"),
        ({"attention_mask": np.full((8, 6), 2)}, "attention_mask"),
        ({"attention_mask": np.zeros((8, 6), np.int64)}, "attention_mask"),
        ({"readout": np.full(8, 6)}, "readout"),
        ({"readout": np.full(8, -1)}, "readout"),
        ({"label_token_ids": np.zeros(0, np.int64)}, "label_token_ids"),
        ({"label_token_ids": np.array([5, 100])}, "vocabulary"),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_invalid_tensors_are_refused(
    client: TestClient, plain: Bundle, changes: dict[str, Any], text: str, binary: bool
) -> None:
    tensors = {name: value for name, value in whole(plain, **changes).items() if value is not None}
    if binary:
        body, headers = in_binary(tensors)
        answer = client.post(INFER, content=body, headers=headers)
    else:
        answer = client.post(INFER, content=json.dumps(in_json(tensors)))
    refused(answer, 400, text)
    assert_correct(client, plain)


def one(**changes: Any) -> bytes:
    tensor = {"name": "readout", "datatype": "INT64", "shape": [2], "data": [1, 2]} | changes
    return json.dumps({"inputs": [{k: v for k, v in tensor.items() if v is not None}]}).encode()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed"),
        (b'{"inputs": 3}', "malformed"),
        (b'{"inputs": [{}]}', "malformed"),
        (b'{"inputs": [], "parameters": {"rows": {}}}', "malformed"),
        (b"[" * 100_000, "malformed"),
        (one(shape=[-2]), "malformed"),
        (one(shape=[2.5]), "malformed"),
        (one(shape=["2"]), "malformed"),
        (one(name="nothing"), "there is no input 'nothing'"),
        (one(datatype="FP64"), "must be INT64, not FP64"),
        (one(shape=[1, 2]), "shape [-1]"),
        (one(shape=[3]), "2 elements, not those of [3]"),
        (one(shape=[2**70]), "a shape that is too large"),
        (one(shape=[2**62]), "a shape that is too large"),
        (one(shape=[0], data=[1]), "1 elements, not those of [0]"),
        (one(shape=[1] * 1000), "malformed"),
        (one(name="prompts", datatype="FP32", shape=[0, 2**62, 3], data=[]), "shape [-1, 4, 3]"),
        (one(name="input_ids", shape=[0, 2**62], data=[]), "a shape that is too large"),
        (one(name="input_ids", shape=[2**62, 0], data=[]), "a shape that is too large"),
        (one(name="x" * 20_000), "there is no input 'xxx"),
        (one(datatype="x" * 20_000), "must be INT64, not xxx"),
        (
            json.dumps({"inputs": [], "outputs": [{"name": "x" * 20_000}]}).encode(),
            "there is no output 'xxx",
        ),
        (json.dumps({"inputs": [{}] * 1_000_000}).encode()[: 2**20], "malformed"),
        (b'{"inputs": [' + b"{}, " * 200_000 + b"{}]}", "malformed"),
        (
            b'{"inputs": [{"name": "readout", "datatype": "INT64", "shape": [1], "data": [NaN]}]}',
            "INT64 numbers",
        ),
        (one(name="\ud800"), "there is no input"),
        (one(datatype="\ud800"), "must be INT64, not ?"),
        (one(data=[1, "x" * 100_000]), "INT64 numbers"),
        (one(data=[[[[1]]], 2]), "ragged or too deeply nested"),
        (one(data=[1, 2.5]), "INT64 numbers"),
        (one(data=["1", "2"]), "INT64 numbers"),
        (one(data=[1, None]), "INT64 numbers"),
        (one(data=[2**70, 1]), "INT64 numbers"),
        (one(data=[2**63, 1]), "INT64 numbers"),
        (one(data=[[1], [2, 3]]), "ragged"),
        (one(data=None), "needs data"),
        (one(parameters={"binary_data_size": 16}), "not both"),
        (one(data=None, parameters={"binary_data_size": 16}), "Inference-Header-Content-Length"),
        (one(data=None, parameters={"shared_memory_region": "x"}), "needs data"),
        (b'{"inputs": [], "outputs": [{"name": "x"}]}', "there is no output 'x'"),
        (json.dumps({"inputs": [json.loads(one())["inputs"][0]] * 2}).encode(), "given twice"),
    ],
)
def test_malformed_bodies_are_refused(
    client: TestClient, plain: Bundle, body: bytes, text: str
) -> None:
    refused(client.post(INFER, content=body), 400, text)
    assert_correct(client, plain)


@pytest.mark.parametrize(
    ("cut", "length", "text"),
    [(-1, None, "ends within input"), (None, "-1", "number"), (None, "x", "number"), (None, "²",
    "number"),
     (None, "99999999", "at most"), (None, "3", "malformed")],
)  # fmt: skip
def test_binary_data_of_the_wrong_length_is_refused(
    client: TestClient, plain: Bundle, cut: int | None, length: str | None, text: str
) -> None:
    body, headers = in_binary(whole(plain))
    value = (length or headers[HEADER]).encode()
    refused(client.post(INFER, content=body[:cut], headers={HEADER: value}), 400, text)
    refused(client.post(INFER, content=body + b"x", headers=headers), 400, "bytes")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""NaN and infinities too, which Python writes and JSON does not have."""


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """A place in a valid request, and another value for it."""
    places = ["inputs", "outputs", "parameters", "id"]
    places += [
        f"inputs.{i}{member}"
        for i in range(5)
        for member in ("", ".name", ".shape", ".datatype", ".data")
    ]
    places += ["inputs.0.data.0", "inputs.1.shape.0", "inputs.2.data.3.1", "inputs.0.parameters"]
    return draw(st.sampled_from(places)), draw(json_values)


def put(value: Any, place: str, new: Any) -> None:
    *path, last = place.split(".")
    for step in path:
        value = value[int(step)] if isinstance(value, list) else value[step]
    value[int(last) if isinstance(value, list) else last] = new


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(damaged(), min_size=1, max_size=1))
def test_a_request_with_arbitrary_values_is_answered_or_refused(
    client: TestClient, plain: Bundle, damage: list[tuple[str, Any]]
) -> None:
    request = in_json(whole(plain))
    for place, new in damage:
        put(request, place, new)
    answer = client.post(INFER, content=json.dumps(request).encode())
    assert answer.status_code in (200, 400, 409, 413)
    assert ("error" in answer.json()) == (answer.status_code != 200)
    assert client.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    ("name", "mode"),
    [("roberta", "add"), ("bart", "add"), ("t5", "add"), ("gpt2", "add"), ("gpt2", "cat")],
)
def test_rows_that_a_backbone_cannot_process_are_refused_before_it_fails(
    tiny: Export, name: str, mode: str
) -> None:
    pytest.importorskip("onnxruntime")
    bundle = tiny(name, "bbt", mode)
    answered = []

    @settings(deadline=None, max_examples=60)
    @given(data=st.data(), count=st.integers(1, 3), length=st.integers(1, 9), last=st.booleans())
    def check(data: st.DataObject, count: int, length: int, last: bool) -> None:
        def numbers(least: int, most: int, *shape: int) -> Any:
            size = int(np.prod(shape))
            values = data.draw(st.lists(st.integers(least, most), min_size=size, max_size=size))
            return np.array(values, np.int64).reshape(shape)

        length = 9 if last else length
        tensors = {"prompts": prompts(bundle, 2), "input_ids": numbers(0, 12, count, length)}
        # One beyond the end, too; or the last token of the longest row, so that some requests are
        # answered.
        tensors["readout"] = np.full(count, length - 1) if last else numbers(0, length, count)
        tensors |= {
            "attention_mask": np.ones((count, length), np.int64),
            "label_token_ids": np.array([7, 8]),
        }
        if bundle.info.decodes and data.draw(st.booleans()):
            tensors["decoder_input_ids"] = numbers(0, 12, count, data.draw(st.integers(0, 3)))
        answer = client.post(INFER, json=in_json(tensors))
        assert answer.status_code in (200, 400), answer.json()
        if answer.status_code == 200:
            answered.append(length)
            assert np.isfinite(from_json(answer)["label_logits"]).all()

    with load_engine(bundle, "ort", threads=1) as engine, local_client(app_of(engine)) as client:
        check()
    assert answered


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), length=st.none() | st.integers(-1, 250))
def test_arbitrary_bytes_are_refused(client: TestClient, body: bytes, length: int | None) -> None:
    headers = {} if length is None else {HEADER: str(length)}
    assert client.post(INFER, content=body, headers=headers).status_code == 400


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_binary_requests_with_bytes_changed_are_answered_or_refused(
    client: TestClient, plain: Bundle, data: st.DataObject
) -> None:
    body, headers = in_binary(whole(plain))
    changed = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    answer = client.post(INFER, content=bytes(changed), headers=headers)
    assert answer.status_code in (200, 400, 409)


def test_unknown_paths_methods_and_encodings_are_refused(client: TestClient) -> None:
    refused(client.get("/v2/models/other"), 404, "there is no model 'other'")
    refused(client.post("/v2/models/other/infer", content=b"{}"), 404, "there is no model")
    refused(client.get("/v2/models/backbone/versions/2"), 404, "version 2")
    refused(client.get("/v3"), 404, "Not Found")
    refused(client.get(INFER), 405, "Method Not Allowed")
    refused(
        client.post(INFER, content=b"{}", headers={"Content-Encoding": "br"}),
        415,
        "content encoding br",
    )
    refused(client.get(f"/v2/models/{'x' * 20_000}"), 404, "there is no model 'xxx")


def test_a_long_text_among_numbers_is_refused_at_once(client: TestClient) -> None:
    """An array of both would have as many places of the text's length as there are numbers."""
    body = one(shape=[100_001], data=[1] * 100_000 + ["x" * 300_000])
    tracemalloc.start()
    refused(client.post(INFER, content=body), 400, "INT64 numbers")
    assert tracemalloc.get_traced_memory()[1] < 40 * len(body)
    tracemalloc.stop()


def test_many_malformed_parameters_are_refused_at_once(client: TestClient) -> None:
    """A list of all their problems would have a hundred times the size of the body."""
    body = json.dumps({"inputs": [], "parameters": dict.fromkeys(map(str, range(20_000)))}).encode()
    tracemalloc.start()
    refused(client.post(INFER, content=body), 400, "more than 64 parameters")
    assert tracemalloc.get_traced_memory()[1] < 40 * len(body)
    tracemalloc.stop()


def compressed(encoding: str, body: bytes) -> bytes:
    return gzip.compress(body) if encoding == "gzip" else zlib.compress(body)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP"])
def test_compressed_bodies(client: TestClient, plain: Bundle, encoding: str) -> None:
    body, headers = in_binary(whole(plain))
    answer = client.post(
        INFER,
        content=compressed(encoding.lower(), body),
        headers=headers | {"Content-Encoding": encoding},
    )
    np.testing.assert_array_equal(from_binary(answer)["label_logits"], wanted(plain))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", ["none", "cut", "empty", "more", "other"])
def test_damaged_compression_is_refused(client: TestClient, encoding: str, damage: str) -> None:
    good = compressed(encoding, b"{}")
    body = {
        "none": b"{}",
        "cut": good[:-2],
        "empty": b"",
        "more": good + b"x",
        "other": b"\x1f\x8b" * 9,
    }[damage]
    refused(
        client.post(INFER, content=body, headers={"Content-Encoding": encoding}),
        400,
        f"is not {encoding} data",
    )


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_is_bounded_after_decompression(client: TestClient, encoding: str) -> None:
    bomb = compressed(encoding, b" " * 300 * 2**20)
    assert len(bomb) < LIMITS.request_bytes
    tracemalloc.start()
    refused(client.post(INFER, content=bomb, headers={"Content-Encoding": encoding}), 413, "larger")
    assert tracemalloc.get_traced_memory()[1] < 8 * LIMITS.request_bytes
    tracemalloc.stop()


# Limits


def test_a_body_that_is_too_large_is_refused(plain: Bundle) -> None:
    body, headers = in_binary(whole(plain))
    limits = Limits(len(body), LIMITS.batch, LIMITS.timeout)
    with local_client(app(plain, limits)) as client:
        assert client.post(INFER, content=body, headers=headers).status_code == 200
        refused(client.post(INFER, content=body + b" ", headers=headers), 413, "larger")
        in_parts = client.post(
            INFER, content=iter([body, b" "]), headers=headers
        )  # chunked: no length is announced
        refused(in_parts, 413, "larger")
        assert_correct_binary(client, plain)


def assert_correct_binary(client: TestClient, bundle: Bundle) -> None:
    body, headers = in_binary(whole(bundle))
    np.testing.assert_array_equal(
        from_binary(client.post(INFER, content=body, headers=headers))["label_logits"],
        wanted(bundle),
    )


def test_a_batch_that_is_too_large_is_refused(plain: Bundle) -> None:
    with local_client(app(plain)) as client:
        for population, status in ((25, 200), (26, 413)):  # of 8 rows; the limit is 200
            answer = client.post(
                INFER, json=in_json(whole(plain, prompts=prompts(plain, population)))
            )
            assert answer.status_code == status


def test_what_a_request_would_make_of_memory_is_refused_before_it_is_bound(plain: Bundle) -> None:
    small = replace(LIMITS, batch=40, words=30)
    with local_client(app(plain, small)) as client:
        found = row_tensors(rows(count=41))
        refused(
            client.post(INFER, json=in_json({"prompts": prompts(plain, 1), **found})),
            413,
            "41 rows exceed 40",
        )
        words = np.zeros(31, np.int64)
        refused(
            client.post(INFER, json=in_json(whole(plain, label_token_ids=words))),
            413,
            "31 label words exceed 30",
        )
    long = Bundle(plain.path, plain.info.model_copy(update={"max_length": 600}))
    with local_client(app(long, replace(LIMITS, batch=4))) as client:
        last = np.zeros((4, 100), np.int64)
        last[:, -1] = 1  # one token in each row, behind 99 that are computed as well
        given = {"input_ids": np.ones_like(last), "attention_mask": last, "readout": np.full(4, 99)}
        given |= {"prompts": prompts(plain, 1), "label_token_ids": np.array([5, 6])}
        refused(client.post(INFER, json=in_json(given)), 413, "400 tokens exceed 256")
    few = replace(LIMITS, batch=1000)
    with local_client(app(plain, few)) as client:
        many = whole(plain, prompts=prompts(plain, 100), label_token_ids=np.zeros(2000, np.int64))
        body, headers = in_binary(many)
        refused(
            client.post(INFER, content=body, headers=headers),
            413,
            "8 rows times 2000 label words exceed",
        )


def test_without_a_token_no_other_name_than_localhost_is_answered(plain: Bundle) -> None:
    for host, status in {
        "localhost": 200, "localhost:8000": 200, "127.0.0.1:8000": 200, "[::1]:8000": 200,
        "127.9.9.9": 200,
        "LOCALHOST": 200, "localhost.:8000": 200,
        "evil.example": 403, "evil.example:8000": 403, "localhost.evil.example": 403, "": 403,
        "[": 403,
        "10.0.0.1": 403,
    }.items():  # fmt: skip
        with local_client(app(plain)) as client:
            answer = client.get("/v2", headers={"host": host})
            assert (host, answer.status_code) == (host, status)
        with local_client(app(plain, token="secret")) as client:
            assert (
                client.get(
                    "/v2", headers={"host": host, "authorization": "Bearer secret"}
                ).status_code
                == 200
            )


def test_without_a_token_no_page_of_another_host_is_answered(plain: Bundle) -> None:
    """A browser sends it with the Host of this machine, and the page's own as its Origin."""
    with local_client(app(plain)) as client:
        for origin, status in {
            "http://localhost:8000": 200, "http://127.0.0.1": 200, "https://evil.example": 403,
            "null": 403,
        }.items():  # fmt: skip
            assert client.get("/v2", headers={"origin": origin}).status_code == status


class Waiting(DummyBoundBatch):
    entered, go = threading.Event(), threading.Event()

    def _label_logits(self, population: Population) -> Any:
        self.entered.set()
        assert self.go.wait(30)
        return super()._label_logits(population)


class WaitingEngine(DummyEngine):
    def bind(self, batch: Any) -> DummyBoundBatch:
        return Waiting(self.bundle, batch)


@pytest.fixture
def gates() -> Iterator[type[Waiting]]:
    Waiting.entered.clear()
    Waiting.go.clear()
    yield Waiting
    Waiting.go.set()


def ask(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def test_health_and_metadata_respond_while_the_engine_computes(
    plain: Bundle, gates: type[Waiting]
) -> None:
    body = json.dumps(in_json(whole(plain))).encode()
    answers: list[Any] = []
    with running(app_of(WaitingEngine(plain))) as url:
        busy = threading.Thread(target=lambda: answers.append(ask(url, "POST", INFER, body)))
        busy.start()
        assert gates.entered.wait(30)
        assert ask(url, "GET", "/v2/health/live") == (200, {"live": True})
        assert ask(url, "GET", "/v2/models/backbone")[0] == 200
        gates.go.set()
        busy.join(30)
    assert answers[0][0] == 200


def test_waiting_longer_than_the_limit_is_503_and_the_server_stays_up(
    plain: Bundle, gates: type[Waiting]
) -> None:
    body = json.dumps(in_json(whole(plain))).encode()
    with running(app_of(WaitingEngine(plain), Limits(2**20, 200, timeout=0.3))) as url:
        status, answer = ask(url, "POST", INFER, body)
        assert status == 503
        assert "0.3 seconds" in answer["error"]
        assert ask(url, "POST", INFER, body)[0] == 503
        gates.go.set()
    with running(app_of(WaitingEngine(plain))) as url:
        assert ask(url, "POST", INFER, body)[0] == 200


def test_a_request_is_dropped_when_its_client_disconnects(
    plain: Bundle, gates: type[Waiting], monkeypatch: pytest.MonkeyPatch
) -> None:
    events, infer = list[threading.Event](), RowModel.infer

    def watched(self: RowModel, tensors: Any, parameters: Any, dropped: threading.Event) -> Any:
        events.append(dropped)
        return infer(self, tensors, parameters, dropped)

    monkeypatch.setattr(RowModel, "infer", watched)
    with running(app_of(WaitingEngine(plain))) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("POST", INFER, json.dumps(in_json(whole(plain))).encode())
        assert gates.entered.wait(30)
        assert not events[0].is_set()
        connection.close()
        assert events[0].wait(30)
        gates.go.set()
        assert ask(url, "GET", "/v2/health/ready")[0] == 200


def test_a_client_that_sends_less_than_announced_is_408(plain: Bundle) -> None:
    with running(app(plain, Limits(2**20, 200, timeout=0.3))) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", "100")
        connection.endheaders()
        connection.send(b"{")
        assert connection.getresponse().status == 408
        connection.close()
        assert ask(url, "GET", "/v2/health/ready")[0] == 200


def connections(url: str, count: int, sent: bytes = b"") -> list[socket.socket]:
    """Their buffers do not grow, so that what is not read stays with the server."""
    host, port = url.removeprefix("http://").split(":")
    found = [socket.socket() for _ in range(count)]
    for connection in found:
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
        connection.connect((host, int(port)))
        connection.sendall(sent)
    return found


def closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection, waiting for it."""
    with suppress(ConnectionError):
        while connection.recv(2**16):
            pass
    return True


HEADERS = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode()


@pytest.mark.parametrize("sent", [b"", b"GET /v2/hea", HEADERS, HEADERS + b"{"])
def test_silent_connections_block_nobody_and_are_closed_after_a_while(
    plain: Bundle, sent: bytes
) -> None:
    limits = replace(LIMITS, idle=0.5)
    with running(app(plain, limits), limits) as url:
        silent = connections(url, 70, sent)
        assert ask(url, "GET", "/v2/health/live") == (200, {"live": True})
        begun = time.monotonic()
        assert all(map(closed, silent))
        assert time.monotonic() - begun < 10


def test_a_connection_is_kept_between_requests_as_long_as_it_was_asked_for(plain: Bundle) -> None:
    """Longer than a proxy keeps it, which would otherwise send a request to a connection that is
    being closed.
    """
    limits = replace(LIMITS, idle=0.2, keep_alive=1.0)
    with running(app(plain, limits), limits) as url:
        begun = time.monotonic()
        [kept] = connections(url, 1, b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(2**16)
        assert closed(kept)
        assert time.monotonic() - begun > 0.9


def test_a_client_that_reads_nothing_and_asks_again_is_closed_after_a_while(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, pause = threading.Event(), Connection.pause_writing
    lost, lose = threading.Event(), Connection.connection_lost
    monkeypatch.setattr(Connection, "pause_writing", lambda self: (pause(self), paused.set()))
    monkeypatch.setattr(
        Connection, "connection_lost", lambda self, error: (lose(self, error), lost.set())
    )
    limits = replace(LIMITS, idle=0.5, batch=1000)
    body = json.dumps(
        in_json(whole(plain, prompts=prompts(plain, 100), label_token_ids=np.full(1000, 5)))
    ).encode()
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    with running(app(plain, limits), limits) as url:
        [deaf] = connections(
            url, 1, head + body
        )  # to which the answer is more than any buffer takes
        assert paused.wait(20)
        deaf.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert lost.wait(10)


@pytest.mark.parametrize("timeout", [30.0, 2.0])
def test_a_slow_client_gets_a_response_to_its_end_within_the_timeout(
    plain: Bundle, timeout: float
) -> None:
    limits = replace(LIMITS, idle=1.0, batch=1000, timeout=timeout)
    body = json.dumps(
        in_json(whole(plain, prompts=prompts(plain, 50), label_token_ids=np.full(1000, 5)))
    ).encode()
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
        f"{len(body)}\r\n\r\n"
    )
    with running(app(plain, limits), limits) as url:
        [slow] = connections(url, 1, head.encode() + body)
        begun, pieces = time.monotonic(), list[bytes]()
        with suppress(ConnectionError):
            while piece := slow.recv(2**19, socket.MSG_WAITALL):
                pieces.append(piece)
                select.select([], [], [], 0.3)
    taken, (found, _, content) = time.monotonic() - begun, b"".join(pieces).partition(b"\r\n\r\n")
    wanted = int(re.search(rb"content-length: (\d+)", found)[1])  # type: ignore[index]
    assert taken > 2.0
    assert (len(content) == wanted) == (timeout == 30.0)


def test_a_header_in_drops_does_not_keep_a_connection(plain: Bundle) -> None:
    limits = replace(LIMITS, idle=1.0)
    with running(app(plain, limits), limits) as url:
        [slow] = connections(url, 1, b"GET /v2 HTTP/1.1\r\n")
        slow.settimeout(0.2)
        for _ in range(50):
            try:
                slow.sendall(b"X: y\r\n")
                if slow.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection is still open after 10 seconds")


def test_beyond_the_limit_the_connection_that_waits_longest_is_closed(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bbt_accel.serve.connection.MAX_CONNECTIONS", 5)
    with running(app(plain)) as url:
        silent = connections(url, 5)
        assert ask(url, "GET", "/v2/health/live")[0] == 200
        assert closed(silent[0])


def answer_without(status: int, url: str, body: bytes) -> tuple[int, Any]:
    """The first answer with another status, asking until then."""
    end = time.monotonic() + 30
    while (answer := ask(url, "POST", INFER, body))[0] == status:
        if time.monotonic() > end:
            pytest.fail(f"the status is still {status} after 30 seconds")
    return answer


def test_further_requests_than_the_limit_are_refused_and_health_is_not(plain: Bundle) -> None:
    limits = replace(LIMITS, requests=3, idle=30.0)
    with running(app(plain, limits), limits) as url:
        slow = connections(url, 3, HEADERS)
        status, answer = ask(url, "POST", INFER, b"{}")
        assert (status, answer["error"]) == (503, "3 requests are in progress; try again later")
        assert ask(url, "GET", "/v2/health/ready")[0] == 200
        for connection in slow:
            connection.close()
        assert answer_without(503, url, b"{}")[0] == 400  # when the server has noticed


def test_the_bodies_of_all_requests_are_bounded_together(plain: Bundle) -> None:
    body = json.dumps(in_json(whole(plain))).encode()
    size = len(body) + 1
    limits = replace(LIMITS, request_bytes=size, bodies=2, idle=30.0)
    header = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()
    with running(app(plain, limits), limits) as url:
        large = connections(url, 2, header + b" " * (size - 1))
        status, answer = answer_without(200, url, body)  # when all of theirs has arrived
        assert status == 503
        assert "bytes of other requests; try again later" in answer["error"]
        for connection in large:
            connection.close()
        assert answer_without(503, url, body)[0] == 200  # when the server has noticed


# Failures of the engine


@pytest.mark.parametrize(
    ("error", "text"),
    [(EngineError("out of memory"), "out of memory"), (ValueError("odd"), "internal error")],
)
def test_a_failed_forward_pass_is_500_and_the_server_stays_up(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    with local_client(app(plain), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:

            def fail(bound: BoundBatch, population: Population) -> Any:
                raise error

            patch.setattr(DummyBoundBatch, "_label_logits", fail)
            refused(client.post(INFER, json=in_json(whole(plain))), 500, text)
        assert_correct(client, plain)


def test_logits_that_are_not_finite_are_returned_as_binary_data_only(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        DummyBoundBatch, "_label_logits", lambda *_: np.full((5, 8, 2), np.nan, np.float32)
    )
    with local_client(app(plain)) as client:
        refused(client.post(INFER, json=in_json(whole(plain))), 400, "not finite")
        body, headers = in_binary(whole(plain))
        assert np.isnan(
            from_binary(client.post(INFER, content=body, headers=headers))["label_logits"]
        ).all()


# The token


def test_every_request_except_health_needs_the_token(plain: Bundle) -> None:
    with local_client(app(plain, token="secret")) as client:
        for given_header in (
            None,
            "secret",
            "Bearer wrong",
            "Bearer secret2",
            "Basic secret",
            "Bearer \u00e9",
        ):
            headers = (
                {} if given_header is None else {"Authorization": given_header.encode("latin-1")}
            )
            for method, path in (
                ("GET", "/v2"),
                ("GET", "/v2/models/backbone"),
                ("POST", INFER),
                ("GET", "/x"),
            ):
                answer = client.request(method, path, headers=headers)
                refused(answer, 401, "token")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/v2/health/live").status_code == 200
        for scheme in ("Bearer", "bearer"):
            assert (
                client.get("/v2", headers={"Authorization": f"{scheme} secret"}).status_code == 200
            )


# A tuned prompt


@pytest.fixture
def run(bundle: Bundle, tmp_path: Path) -> Run:
    task = task_file(tmp_path / "data")
    task.write_text(
        task.read_text().replace("n_classes = 2", 'classes = ["0", "1"]')
    )  # other than the label words
    return tune(
        bundle,
        task,
        data=tmp_path / "data",
        engine="dummy",
        output=tmp_path / "run",
        settings=SETTINGS,
        progress=False,
    )


def test_a_classifier_ends_between_batches_once_nobody_waits(run: Run) -> None:
    with DummyEngine(run.open_bundle()) as engine:
        model, dropped = make_models(engine, LIMITS, run)[-1], threading.Event()
        texts = {"text": np.array(["w1 w2"] * 130, object)}
        assert len(model.infer(texts, {}, dropped)[0]["label"]) == 130
        dropped.set()
        with pytest.raises(RequestError, match="nobody waits") as caught:
            model.infer(texts, {}, dropped)
        assert caught.value.status == 503


def test_a_backbone_ends_between_candidates_once_nobody_waits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DummyEngine(bundle) as engine:
        model, gone, there = make_models(engine, LIMITS)[0], threading.Event(), threading.Event()
        at_once, _ = model.infer(whole(bundle), {}, there)
        monkeypatch.setattr("bbt_accel.serve.models.STEP", 1)
        one_by_one, _ = model.infer(whole(bundle), {}, there)
        np.testing.assert_array_equal(one_by_one["label_logits"], at_once["label_logits"])

        def compute(*given: Any) -> dict[str, np.ndarray]:
            gone.set()
            return {"label_logits": np.zeros((1, 8, 2), np.float32)}

        monkeypatch.setattr(model, "compute", compute)
        with pytest.raises(RequestError, match="nobody waits"):
            model.infer(whole(bundle), {}, gone)


def test_hidden_states_count_as_what_a_request_returns(plain: Bundle) -> None:
    wide = Bundle(plain.path, plain.info.model_copy(update={"hidden_size": 10_000}))
    with DummyEngine(plain) as engine:
        engine.bundle = wide
        given = whole(plain)
        with pytest.raises(
            RequestError, match=r"rows times \d+ logits and states exceed 204800; send fewer"
        ):
            make_models(engine, LIMITS)[1].infer(given, {}, threading.Event())


def test_a_run_is_served_with_another_bundle(run: Run, tmp_path: Path) -> None:
    former = run.open_bundle().path
    shutil.move(former, tmp_path / "elsewhere")
    with pytest.raises(BbtError, match="is not a bundle"):
        start(run.path)

    class Listening(Exception):
        pass

    def ready(url: str, models: list[str]) -> None:
        assert models[-1] == "classifier"
        raise Listening

    with pytest.raises(Listening):
        serve(
            run.path,
            bundle=tmp_path / "elsewhere",
            engine="dummy",
            port=0,
            limits=LIMITS,
            ready=ready,
        )
    with pytest.raises(UsageError, match="is a bundle itself; --bundle is for a run"):
        start(tmp_path / "elsewhere", bundle=former)


def test_the_classifier_returns_what_predict_returns(run: Run) -> None:
    texts = np.array([f"w{i} w{i + 1}" for i in range(70)], object)
    answers = predict_texts(run.path, [{"text": text} for text in texts])
    with local_client(app(run.open_bundle(), run=run)) as client:
        assert client.get("/v2").json()["models"][-1] == "classifier"
        for body, headers in (
            (json.dumps(in_json({"text": texts})).encode(), {}),
            in_binary({"text": texts}, binary_data_output=False),
        ):
            if headers:  # binary texts in, JSON out
                head, blob = body[: int(headers[HEADER])], body[int(headers[HEADER]) :]
                head = head.replace(b'"binary_data_output": true', b'"binary_data_output": false')
                body, headers = head + blob, {HEADER: str(len(head))}
            found = from_json(
                client.post("/v2/models/classifier/infer", content=body, headers=headers)
            )
            assert found["label"].tolist() == [answer["label"] for answer in answers]
            assert found["word"].tolist() == [answer["word"] for answer in answers]
            assert found["class"].tolist() == [answer["class"] for answer in answers]
            for row, answer in zip(found["probabilities"], answers, strict=True):
                assert row.tolist() == pytest.approx(
                    list(answer["probabilities"].values()), rel=1e-6
                )


@pytest.mark.parametrize(
    ("tensors", "status", "text"),
    [
        ({}, 400, "text is missing"),
        ({"sentence": np.array(["a"], object)}, 400, "there is no input 'sentence'"),
        ({"text": np.array([], object)}, 400, "at least one"),
        ({"text": np.array([1], object)}, 400, "texts"),
        ({"text": np.array(["a"] * 201, object)}, 413, "201 texts"),
    ],
)
def test_invalid_texts_are_refused(
    run: Run, tensors: dict[str, Any], status: int, text: str
) -> None:
    with local_client(app(run.open_bundle(), run=run)) as client:
        refused(client.post("/v2/models/classifier/infer", json=in_json(tensors)), status, text)


def test_rows_are_no_longer_than_the_server_allows(run: Run) -> None:
    """Attention takes memory with the square of their length."""
    bundle = run.open_bundle()
    given = row_tensors(rows().padded(20, bundle.info.special.pad)) | {"prompts": prompts(bundle)}
    words = [f"w{i}" for i in range(30)]
    limits = replace(LIMITS, row_tokens=16)
    longest = Encoder(bundle, run.task, max_tokens=16)
    assert longest.encode([Row({"text": " ".join(words)})]).input_ids.shape == (1, 16)
    with local_client(app(bundle, limits, run=run)) as client:
        refused(
            client.post(INFER, json=in_json(given)),
            400,
            "rows have 20 tokens, serve --set row_tokens allows at most 16",
        )
        texts = np.array([" ".join(words), " ".join(words[:16])], object)
        found = from_json(client.post("/v2/models/classifier/infer", json=in_json({"text": texts})))
        np.testing.assert_array_equal(*found["probabilities"])
    with pytest.raises(TaskError, match=r"exceeds the 3 tokens of row_tokens by \d+"):
        make_models(DummyEngine(bundle), replace(LIMITS, row_tokens=3), run)


def test_a_column_of_texts_is_the_same_as_a_list(run: Run) -> None:
    """Other clients of the protocol send [N, 1]."""
    texts = np.array([f"w{i} w{i + 1}" for i in range(5)], object)
    with local_client(app(run.open_bundle(), run=run)) as client:
        path = "/v2/models/classifier/infer"
        answers = [
            client.post(path, json=in_json({"text": given})).json()
            for given in (texts, texts[:, None])
        ]
        flat = in_json({"text": texts[:, None]})
        flat["inputs"][0]["data"] = texts.tolist()
        answers.append(client.post(path, json=flat).json())
        body, headers = in_binary({"text": texts[:, None]})
        head, blob = body[: int(headers[HEADER])], body[int(headers[HEADER]) :]
        head = head.replace(b'"binary_data_output": true', b'"binary_data_output": false')
        answers.append(
            client.post(path, content=head + blob, headers={HEADER: str(len(head))}).json()
        )
        assert answers[0]["outputs"][0]["shape"] == [5]
        assert all(answer == answers[0] for answer in answers)
        refused(
            client.post(path, json=in_json({"text": texts.reshape(1, 5)})),
            400,
            "must have the shape [-1]",
        )


@pytest.mark.parametrize(
    "blob", [b"\x01", b"\x05\0\0\0abc", b"\x01\0\0\0\xff", b"\x01\0\0\0a\x01\0\0\0b"]
)
def test_malformed_binary_texts_are_refused(run: Run, blob: bytes) -> None:
    tensor = {
        "name": "text",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": {"binary_data_size": len(blob)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    with local_client(app(run.open_bundle(), run=run)) as client:
        answer = client.post(
            "/v2/models/classifier/infer", content=head + blob, headers={HEADER: str(len(head))}
        )
        refused(answer, 400, "text")


# The command


def start(path: Path, **options: Any) -> None:
    serve(path, engine="dummy", port=0, limits=LIMITS, ready=lambda url, models: None, **options)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", "::"])
def test_a_public_address_needs_a_token(
    plain: Bundle, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BBT_ACCEL_TOKEN", raising=False)
    with pytest.raises(UsageError, match="BBT_ACCEL_TOKEN"):
        start(plain.path, host=host)


def test_a_port_in_use(plain: Bundle) -> None:
    with (
        running(app(plain)) as url,
        pytest.raises(BbtError, match=r"cannot listen on 127.0.0.1:.*another --port"),
    ):
        serve(
            plain.path,
            engine="dummy",
            port=int(url.rpartition(":")[2]),
            limits=LIMITS,
            ready=lambda url, models: None,
        )


def test_responses_do_not_wait_for_an_acknowledgement() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert (
                accepted.proto == socket.IPPROTO_TCP
            )  # which asyncio asks for before it sets TCP_NODELAY
        assert client.getpeername() == listener.getsockname()


SERVE = """
import sys
from bbt_accel.serve.limits import Limits
from bbt_accel.serve.server import serve
limits = Limits(2**20, 200, 30.0)
serve(sys.argv[1], engine="dummy", port=0, limits=limits, ready=lambda *a: print(a[0], flush=True))
print("closed")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_shuts_the_server_down(plain: Bundle) -> None:
    command = [sys.executable, "-c", SERVE, str(plain.path)]
    environment = {**os.environ, "BBT_ACCEL_TOKEN": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert ask(url, "GET", "/v2/health/live")[0] == 200  # it has its signal handlers now
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "closed\n", "")


COMPUTING = """
import sys, time
from bbt_accel.cli.commands import main
from dummy_engine import DummyBoundBatch
from bbt_accel.serve import app
from bbt_accel.serve import server
whole = server.configuration
def configuration(*given):
    found = whole(*given)
    found.timeout_graceful_shutdown = 1
    return found
server.configuration = configuration
DummyBoundBatch._label_logits = lambda *_: (print("computing", flush=True), time.sleep(300))
app.LAST_CALL = 0.5
main(["serve", sys.argv[1], "--engine", "dummy", "--port", "0", "--json"])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_sigterm_ends_a_server_that_computes_within_seconds(plain: Bundle) -> None:
    environment = {**os.environ, "BBT_ACCEL_TOKEN": ""}
    command = [sys.executable, "-c", COMPUTING, str(plain.path)]
    body = json.dumps(in_json(whole(plain))).encode()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            answers: list[Any] = []
            clients = [
                threading.Thread(target=lambda: answers.append(ask(url, "POST", INFER, body)))
                for _ in range(2)
            ]
            for client in clients:
                client.start()
            assert process.stdout.readline() == "computing\n"
            begun = time.monotonic()
            process.terminate()
            _, err = process.communicate(timeout=30)
            for client in clients:
                client.join(30)
        finally:
            process.kill()
    assert time.monotonic() - begun < 15
    assert process.returncode == 0
    assert "Traceback" not in err
    assert answers == [(503, {"error": "the server is stopping"})] * 2
