"""Deadlines of requests (`Carry-Timeout`, its default and its cap), and disconnected clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import orjson
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import Caller
from service.core.errors import Overloaded
from service.core.values import StreamKey
from service.transports.common.disconnects import WATCH_AFTER_S
from tests.service.transports.v1.harness import LIMITS, Harness, harness, problem, rows
from tests.service.transports.v1.raw_http import converse, port_of, request, serving
from tests.support.clock import SHORT_S, ManualClock
from tests.support.servers import RealServer, becomes

BODY = {"position": 0, "inputs": rows(2).tolist()}
SHORT = {"carry-timeout": str(SHORT_S)}
LONG = {"carry-timeout": "120"}

T = TypeVar("T")


async def expire_while_held(api: Harness, clock: ManualClock, answer: Coroutine[Any, Any, T]) -> T:
    """The reply to a request whose deadline passes while the store holds its stream back."""
    api.store.held = held = asyncio.Event()
    before = api.store.holds
    waiting = asyncio.create_task(answer)

    await becomes(lambda: api.store.holds > before, "the store")
    clock.expire()
    answered = await waiting
    held.set()
    return answered


@pytest.mark.parametrize(
    "value", ["0", "0.000", "-1", "+1", "1e3", "inf", "nan", "1,5", "1 2", "٣", "five", "9" * 40]
)
async def test_an_invalid_timeout_is_rejected(api: Harness, value: str) -> None:
    for path, body in (
        ("streams/s/chunks", BODY),
        ("chunks", {"chunks": [{"stream": "s", **BODY}]}),
        ("predict", {"sequences": [{"inputs": BODY["inputs"]}]}),
    ):
        response = await api.client.post(
            f"/v1/models/probe/{path}",
            json=body,
            headers=[(b"carry-timeout", value.encode())],
        )
        document = problem(response, 422, "invalid_input")
        assert document["at"] == "Carry-Timeout"
        assert "seconds" in document["expected"]
    assert api.position() is None


@pytest.mark.parametrize("value", ["61", "62.5", "060.25", "63.", "999999999"])
async def test_decimal_seconds_are_accepted(api: Harness, value: str) -> None:
    response = await api.chunk(BODY, headers={"carry-timeout": value})
    assert response.status_code == 200


async def test_a_chunk_that_did_not_start_in_time_changes_nothing(
    api: Harness, clock: ManualClock
) -> None:
    response = await expire_while_held(api, clock, api.chunk(BODY, headers=SHORT))
    document = problem(response, 504, "deadline_exceeded")
    assert document["retryable"] is True
    assert int(response.headers["retry-after"]) >= 1
    assert (await api.chunk(BODY, headers=LONG)).json()["replayed"] is False


@pytest.mark.parametrize("position", [0, None])
async def test_a_deadline_during_a_commit_gives_outcome_unknown(
    api: Harness, clock: ManualClock, position: int | None
) -> None:
    """Only a request with a position may be retried, and the error says so."""
    await api.chunk(BODY)
    body = {"inputs": BODY["inputs"]}
    if position is not None:
        body["position"] = 2
    response = await expire_while_held(api, clock, api.chunk(body, headers=SHORT))
    document = problem(response, 503, "outcome_unknown")
    assert document["retryable"] is (position is not None)
    assert ("retry-after" in response.headers) == (position is not None)
    assert api.position() == 4
    if position is not None:
        assert (await api.chunk(body)).json()["replayed"] is True


async def test_items_time_out_independently(api: Harness, clock: ManualClock) -> None:
    """The first is being committed; the next one of its stream waits for it."""
    await api.chunk(BODY, stream="known")
    body = {
        "chunks": [
            {"stream": "known", "position": 2, "inputs": BODY["inputs"]},
            {"stream": "known", "position": 4, "inputs": BODY["inputs"]},
        ]
    }
    posting = api.client.post("/v1/models/probe/chunks", json=body, headers=SHORT)
    response = await expire_while_held(api, clock, posting)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [(each["status"], each["error"]["code"]) for each in results] == [
        (503, "outcome_unknown"),
        (424, "previous_failed"),
    ]
    again = (await api.client.post("/v1/models/probe/chunks", json=body)).json()["results"]
    assert [each["reply"]["replayed"] for each in again] == [True, False]


async def test_predictions_have_a_deadline(api: Harness) -> None:
    response = await api.client.post(
        "/v1/models/probe/predict",
        json={"sequences": [{"inputs": BODY["inputs"]}]},
        headers={"carry-timeout": "0.000000001"},
    )
    problem(response, 504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("limits", "headers"),
    [(replace(LIMITS, timeout_s=SHORT_S), {}), (replace(LIMITS, max_timeout_s=SHORT_S), LONG)],
    ids=["default", "cap"],
)
async def test_settings_define_the_default_and_the_cap(
    pipeline_server: RealServer,
    models: Mapping[str, Artifact],
    clock: ManualClock,
    limits: Any,
    headers: Any,
) -> None:
    async with harness(pipeline_server, models, limits=limits) as api:
        response = await expire_while_held(api, clock, api.chunk(BODY, headers=headers))
        problem(response, 504, "deadline_exceeded")
        async with serving(api) as server:
            lines = [f"{name}: {value}" for name, value in headers.items()]
            sent = request(orjson.dumps(BODY), *lines)
            [reply] = await expire_while_held(api, clock, converse(port_of(server), sent))
        assert reply.startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")


async def test_load_shedding_does_not_decode_the_body(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fast path, once the request is complete; the connection stays open."""
    asked: list[tuple[StreamKey, float]] = []

    def rejection(caller: Caller, model: str, key: StreamKey, left_s: float) -> Overloaded | None:
        asked.append((key, left_s))
        return Overloaded("too much", retry_after_s=2.5) if left_s == 7 else None

    monkeypatch.setattr(api.pipeline, "check_admission", rejection)
    async with serving(api) as server:
        parts = [request(b"not even JSON", "Carry-Timeout: 7"), request(orjson.dumps(BODY))]
        refused, answered = await converse(port_of(server), *parts, answers=2)
    head, body = refused.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"retry-after: 3\r\n" in head
    document = orjson.loads(body)
    assert (document["code"], document["retryable"]) == ("overloaded", True)
    assert document["retry_after_s"] == 2.5
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
    assert [(key.model, left_s) for key, left_s in asked] == [("probe", 7), ("probe", 30)]
    assert api.counts.seen["overloaded"] == 1


class DisconnectingClient:
    """An ASGI client that may disconnect after its request, or a part of it, is sent."""

    def __init__(self, body: bytes = orjson.dumps(BODY), *, is_complete: bool = True) -> None:
        self.sent: list[Any] = []
        self.disconnects = asyncio.Event()
        self._message: dict[str, Any] | None = {
            "type": "http.request",
            "body": body,
            "more_body": not is_complete,
        }

    async def receive(self) -> dict[str, Any]:
        if self._message is not None:
            message, self._message = self._message, None
            return message
        await self.disconnects.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def scope(self) -> dict[str, Any]:
        path = "/v1/models/probe/streams/s/chunks"
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("carry", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
        }


async def test_a_waiting_chunk_of_a_disconnected_client_is_dropped(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    """On the slow path: its chunk waits behind a batch whose commit is delayed."""
    async with harness(pipeline_server, models, batches_in_flight=1) as api:
        api.store.held = asyncio.Event()
        first = asyncio.create_task(api.chunk(BODY, stream="first"))
        await becomes(lambda: api.store.holds > 0, "a batch")
        client = DisconnectingClient()
        serving_client = asyncio.create_task(api.app(client.scope(), client.receive, client.send))
        await becomes(lambda: api.pipeline.queue_depths()["probe"] == 1, "a chunk that waits")
        client.disconnects.set()
        await serving_client
        assert client.sent == []
        api.store.held.set()
        assert (await first).status_code == 200
        assert (await api.chunk(BODY, stream="after")).status_code == 200
        assert api.position() is None


async def test_a_watched_request_is_answered(api: Harness) -> None:
    api.store.held = asyncio.Event()
    client = DisconnectingClient()
    serving_client = asyncio.create_task(api.app(client.scope(), client.receive, client.send))
    _, waiting = await asyncio.wait({serving_client}, timeout=2 * WATCH_AFTER_S)
    assert waiting
    api.store.held.set()
    await serving_client
    assert client.sent[0]["status"] == 200
    assert api.position() == 2


async def test_a_client_that_disconnects_while_sending_changes_nothing(api: Harness) -> None:
    client = DisconnectingClient(b'{"inputs":', is_complete=False)
    client.disconnects.set()
    await api.app(client.scope(), client.receive, client.send)
    assert client.sent == []
    assert api.position() is None
