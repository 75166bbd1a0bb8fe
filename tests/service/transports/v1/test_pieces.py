"""Long replies: written in pieces that are the whole, at the pace of their reader."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.artifact import Artifact
from service.codec import pieces as module
from service.codec.media import Media, encode_json
from service.codec.pieces import (
    LONG_VALUES,
    PIECE_VALUES,
    CountedList,
    count_values,
    encode_pieces,
)
from service.codec.settings import RequestSettings
from service.server.settings import ConnectionSettings
from service.transports.v1.replies import LongAnswer, reply
from tests.service.transports.v1.harness import harness, rows
from tests.service.transports.v1.raw_http import PATH, PREDICT, check, port_of, request, serving
from tests.service.transports.v1.test_connections import connected
from tests.support.servers import RealServer, becomes

LIMITS = RequestSettings(max_chunk_steps=20_000, max_predict_steps=200_000, max_body_bytes=2**24)
STEPS = 300


def values(*shape: int) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


DOCUMENTS: dict[str, Any] = {
    "nothing": {},
    "one value": {"a": 1},
    "long rows": {"before": 1, "outputs": {"a": values(3, 50_000), "b": np.float32(2)}, "after": 2},
    "many rows": {"outputs": {"a": values(4096, 3), "b": values(9000)}},
    "axes": {"a": values(2731, 3, 2), "empty": values(0, 3)},
    "an empty array": {"a": values(9000), "b": values(3000, 0)},
    "results": [{"status": 200, "reply": {"outputs": values(n % 7 * 300)}} for n in range(100)],
    "counted results": {
        "model": "m",
        "results": CountedList(
            [{"reply": {"outputs": values(n % 7 * 300)}} for n in range(100)],
            [n % 7 * 300 for n in range(100)],
        ),
    },
    "names": {"streams": [f"s-{n}" for n in range(70_000)], "cursor": None},
    "one of many": [[], values(9000), "x", {"a": [None, True, 1.5, 2**40]}, values(17)],
    "members": {f"m{n}": values(600) for n in range(20)},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_encoded_pieces_join_to_the_whole_document(name: str) -> None:
    document = DOCUMENTS[name]
    written = list(encode_pieces(document))
    assert b"".join(written) == encode_json(document)
    longest = 25 * PIECE_VALUES
    assert max(map(len, written)) <= longest


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=20)
    ),
    max_leaves=60,
)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 20))
def test_any_document_is_encoded_in_pieces_of_any_size(document: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "PIECE_VALUES", size)
        assert b"".join(encode_pieces(document)) == encode_json(document)


def test_only_long_json_is_encoded_in_pieces() -> None:
    counted = DOCUMENTS["counted results"]["results"]
    assert count_values({"r": counted}) == count_values({"r": list(counted)})
    assert count_values({"a": values(10, 3), "b": [1, {"c": "x"}]}) == 30 + 1 + 1 + 1 + 1 + 1
    short, long = values(LONG_VALUES - 1), values(LONG_VALUES)
    assert not isinstance(reply(Media.JSON, {"a": short}), LongAnswer)
    assert isinstance(reply(Media.JSON, {"a": long}), LongAnswer)
    assert not isinstance(reply(Media.MSGPACK, {"a": long}), LongAnswer)


@pytest.mark.parametrize("address", [f"{PATH.format('s')}", "/v1/models/probe/predict"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_long_reply_equals_the_short_replies(
    pipeline_server: RealServer,
    models: Mapping[str, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    version: str,
) -> None:
    """Over a real connection, by the fast path's address too."""
    for name in (
        "service.transports.v1.replies.LONG_VALUES",
        "service.transports.v1.fast_path.LONG_VALUES",
    ):
        monkeypatch.setattr(name, 200)
    monkeypatch.setattr(module, "PIECE_VALUES", 50)
    monkeypatch.setattr("service.transports.v1.replies.WRITE_BYTES", 500)
    inputs = rows(STEPS)
    body: dict[str, Any] = {"inputs": inputs.tobytes()}
    if address.endswith("predict"):
        body = {"sequences": [body]}
    sent = request(
        ormsgpack.packb(body),
        "Content-Type: application/msgpack",
        "Accept: application/json",
        first=f"POST {address} HTTP/{version}",
    )
    async with harness(pipeline_server, models, limits=LIMITS) as api:
        async with serving(api) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(sent)
            writer.write_eof()
            head, _, received = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
        whole = await api.client.post(
            "/v1/models/probe/predict",
            content=ormsgpack.packb({"sequences": [{"inputs": inputs.tobytes()}]}),
            headers={"content-type": "application/msgpack", "accept": "application/json"},
        )
    chunked = b"transfer-encoding: chunked" in head
    assert chunked == (version == "1.1")
    content = _unchunked(received) if chunked else received
    document = orjson.loads(content)
    [expected] = whole.json()["predictions"]
    got = document["predictions"][0] if "predictions" in document else document
    np.testing.assert_array_equal(
        np.float32(next(iter(got["outputs"].values()))),
        np.float32(next(iter(expected["outputs"].values()))),
    )


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        parts.append(body[:count])
        body = body[count + 2 :]
    return b"".join(parts)


async def test_a_reply_is_encoded_only_as_the_client_reads(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    """Unsent values count as buffered by the connection; a disconnect ends the reply."""
    sequences = [{"inputs": rows(STEPS).tobytes()}] * 30
    body = ormsgpack.packb({"sequences": sequences})
    headers = ("Content-Type: application/msgpack", "Accept: application/json")
    sent = request(body, *headers, first=PREDICT)
    async with harness(pipeline_server, models, limits=LIMITS) as api, connected(api) as client:
        connection = client.connection
        client.writer.write(sent)
        await becomes(lambda: connection.flow.write_paused, "a reply that is not read")
        kept_bytes = connection._unsent.kept_bytes
        assert kept_bytes > 4 * 30 * STEPS
        assert connection.transport.get_write_buffer_size() < 512 * 1024
        assert connection.unsent_bytes > kept_bytes

        now_s = asyncio.get_running_loop().time()
        check(client.connections, now_s)
        progress = connection.progress
        await client.reader.readexactly(100_000)
        await becomes(
            lambda: connection.progress > progress and connection.flow.write_paused, "more"
        )
        check(client.connections, now_s + ConnectionSettings().send_timeout_s + 1)
        assert not connection.transport.is_closing(), "it is read, if slowly"
        client.writer.transport.abort()
        await becomes(lambda: not connection._unsent.kept_bytes, "nothing kept")


async def test_encoding_a_long_reply_yields_the_event_loop() -> None:
    answer = reply(Media.JSON, {"a": values(100 * PIECE_VALUES)})
    turns = written = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: Any) -> None:
        nonlocal written
        written += len(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    counting = asyncio.create_task(count())
    await answer({"type": "http", "http_version": "1.1"}, receive, send)
    counting.cancel()
    assert turns >= 100
    assert written > 100 * PIECE_VALUES
