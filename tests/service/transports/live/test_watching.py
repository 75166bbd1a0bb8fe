"""Watchers of a stream: outputs in order, gaps, ends; across workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
from msgspec.structs import replace

from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from service.access.caller import ANYONE
from service.core.errors import StoreUnavailable
from service.core.values import StreamKey
from service.pipeline import watching
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from service.transports.live import watching as sse
from tests.service.transports.live.sockets import live_application
from tests.service.transports.v1.harness import Harness, problem, rows
from tests.service.transports.v1.raw_http import HOST, port_of, serving
from tests.support.servers import RealServer, becomes
from tests.support.streams import encode_reply

OUTPUT = "last"
KEY = StreamKey("probe", "s")


class Events:
    """The events of one watch, as a browser reads them."""

    def __init__(self, response: httpx.Response):
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, int | None, Any]:
        """Name, id and data of the next event."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(60):
            async for line in self._lines:
                if not line and "event" in fields:
                    break
                if line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    fields[name] = value
        position = int(fields["id"]) if "id" in fields else None
        return fields["event"], position, orjson.loads(fields["data"])

    async def expect(self, name: str) -> dict[str, Any]:
        """The data of the next event, which has that name."""
        got, position, data = await self.next()
        assert got == name, data
        if name in ("outputs", "stream"):
            assert position is not None
        document: dict[str, Any] = data
        return document


@asynccontextmanager
async def watched(
    api: Harness, query: str = "", model: str = "probe", **headers: str
) -> AsyncIterator[Events]:
    """A watch of stream `s`."""
    path = f"/v1/models/{model}/streams/s/outputs{query}"
    async with api.client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Events(response)


@asynccontextmanager
async def following(
    api: Harness, watches: watching.Watches, interval_s: float = 3600
) -> AsyncIterator[AsyncIterator[watching.WatchEvent]]:
    """The events of a watch of stream `s` after the first one, one by one."""

    async def follow(watch: watching.Watch) -> AsyncIterator[watching.WatchEvent]:
        async for events in watch.follow(interval_s):
            for event in events:
                yield event

    async with watches.watch(ANYONE, KEY, None) as watch:
        events = follow(watch)
        assert isinstance(await anext(events), watching.Watched)
        yield events


async def until_idle(
    watch: watching.Watch, events: AsyncIterator[watching.WatchEvent]
) -> asyncio.Future[watching.WatchEvent]:
    """The next event, once a watch has read the stream again after its subscription."""
    waiting = asyncio.ensure_future(anext(events))
    await becomes(lambda: watch._turn is not None and not watch._must_read, "it waits")
    return waiting


@pytest.fixture
def watches(api: Harness) -> watching.Watches:
    """Watches without a transport."""
    return watching.Watches(api.store, api.store.outputs, api.counts)


async def send(api: Harness, steps: int, position: int | None = None) -> dict[str, Any]:
    """Send a chunk over HTTP."""
    body: dict[str, Any] = {"inputs": rows(steps, seed=steps).tolist()}
    response = await api.chunk(body if position is None else {**body, "position": position})
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def test_a_watcher_gets_the_outputs_that_others_get(api: Harness) -> None:
    await send(api, 3)
    async with watched(api) as events:
        stream = await events.expect("stream")
        assert stream["position"] == 3
        for steps in (2, 1, 4):
            reply = await send(api, steps)
            outputs = await events.expect("outputs")
            assert outputs["outputs"] == reply["outputs"]
            assert {outputs[each] == reply[each] for each in ("epoch", "position", "tag")} == {True}
            assert outputs["from"] == reply["position"] - steps


async def test_a_watch_may_begin_before_its_stream(api: Harness) -> None:
    async with watched(api) as events:
        stream = await events.expect("stream")
        assert stream["position"] == 0
        assert "epoch" not in stream
        await send(api, 2)
        created = await events.expect("stream")
        outputs = await events.expect("outputs")
        assert created["epoch"] == outputs["epoch"]
        assert outputs["from"] == 0


async def test_a_reconnected_watcher_gets_the_last_chunk_or_a_gap(api: Harness) -> None:
    first = await send(api, 2)
    second = await send(api, 3)
    async with watched(api, **{"last-event-id": "2"}) as events:
        await events.expect("stream")
        assert (await events.expect("outputs"))["outputs"] == second["outputs"]
    async with watched(api, "?from=0") as events:
        await events.expect("stream")
        assert await events.expect("gap") == {"from": 0, "to": first["position"]}
        assert (await events.expect("outputs"))["from"] == 2
    api.store.states.forget_replies()
    async with watched(api, "?from=1", **{"last-event-id": "4"}) as events:
        assert (await events.next())[1] == 4
        assert await events.expect("gap") == {"from": 4, "to": 5}
    async with watched(api, "?from=5") as events:
        await events.expect("stream")
        await send(api, 1)
        assert (await events.expect("outputs"))["from"] == 5


async def test_a_position_of_another_epoch_does_not_hide_outputs(api: Harness) -> None:
    await send(api, 2)
    async with watched(api, "?from=100") as events:
        assert (await events.next())[1] == 2
        await send(api, 1)
        assert (await events.expect("outputs"))["from"] == 2


async def test_the_last_step_alone_may_be_watched(api: Harness) -> None:
    async with watched(api, "?return_sequences=false") as events:
        await events.expect("stream")
        reply = await send(api, 3)
        await events.expect("stream")
        outputs = await events.expect("outputs")
    assert outputs["outputs"][OUTPUT] == reply["outputs"][OUTPUT][-1]


async def test_a_watch_ends_when_its_stream_is_deleted(api: Harness) -> None:
    await send(api, 3)
    async with watched(api) as events:
        await events.expect("stream")
        assert (await api.client.delete("/v1/models/probe/streams/s")).status_code == 204
        assert await events.expect("end") == {"reason": "deleted"}


async def test_a_watch_ends_when_the_service_drains(api: Harness) -> None:
    async with watched(api) as events:
        await events.expect("stream")
        api.app.state.watches.drain()
        assert await events.expect("end") == {"reason": "draining"}
    path = "/v1/models/probe/streams/s/outputs"
    problem(await api.client.get(path), 503, "shutting_down")


async def test_a_stream_that_is_replaced_is_watched_in_its_new_epoch(api: Harness) -> None:
    await send(api, 3)
    snapshot = (await api.client.get("/v1/models/probe/streams/s/state")).json()
    async with watched(api) as events:
        before = await events.expect("stream")
        restored = await api.client.put(
            "/v1/models/probe/streams/s/state", json=snapshot, headers={"if-match": "*"}
        )
        assert restored.status_code == 200
        reply = await send(api, 2)
        after = await events.expect("stream")
        assert after["epoch"] != before["epoch"]
        assert await events.expect("gap") == {"from": 0, "to": 3}
        assert (await events.expect("outputs"))["outputs"] == reply["outputs"]


async def test_a_watcher_is_told_of_a_rewind_at_once(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    """It would notice by itself only when it reads the stream again, after its interval."""
    history = HistorySpec(events=8)
    async with live_application(pipeline_server, models, history=history) as api:
        await send(api, 3)
        await send(api, 2)
        watches = watching.Watches(api.store, api.store.outputs, api.counts)
        async with following(api, watches, interval_s=3600) as events:
            [watch] = watches._watches
            waiting = await until_idle(watch, events)
            path = "/v1/models/probe/streams/s/rewind"
            rewound = (await api.client.post(path, json={"position": 4})).json()
            async with asyncio.timeout(60):
                watched = await waiting
            assert isinstance(watched, watching.Watched)
            assert watched.head is not None
            assert watched.head.epoch.hex() == rewound["epoch"]
            assert await anext(events) == watching.Gap(0, 4)
            await send(api, 2, position=4)
            outputs = await anext(events)
            assert isinstance(outputs, watching.Outputs)
            assert (outputs.start, outputs.head.position) == (4, 6)


async def test_a_slow_watcher_gets_a_gap_and_continues(
    api: Harness, watches: watching.Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_BUFFERED", 3)
    async with following(api, watches) as slow, following(api, watches) as events:
        await send(api, 2)
        assert isinstance(await anext(events), watching.Watched)
        starts = [(await anext(events)).start]
        for _ in range(7):
            await send(api, 2)
            starts.append((await anext(events)).start)
        got = [await anext(slow) for _ in range(5)]
    assert starts == [*range(0, 16, 2)]
    assert isinstance(got[0], watching.Watched)
    assert got[1] == watching.Gap(0, 10)
    assert [each.start for each in got[2:]] == [10, 12, 14]


async def test_watchers_that_do_not_read_take_bounded_memory_and_get_a_gap(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_BUFFERED", 8)
    monkeypatch.setattr(sse, "WRITE_BYTES", 1024)
    chunks = 60
    async with serving(api) as server, AsyncExitStack() as stack:
        clients = []
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (HOST, port_of(server)))
            await loop.sock_sendall(
                client, b"GET /v1/models/probe/streams/s/outputs HTTP/1.1\r\nHost: carry\r\n\r\n"
            )
            clients.append(client)
        await becomes(lambda: api.counts.seen["watchers"] == 3, "the watches")
        served = [each.transport for each in server.server_state.connections]
        for transport in served:
            of_server = transport.get_extra_info("socket")
            of_server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            transport.set_write_buffer_limits(high=4096)
        for _ in range(chunks):
            await send(api, 20)
        assert max(each.get_write_buffer_size() for each in served) <= 4096 + sse.WRITE_BYTES
        got = b""
        async with asyncio.timeout(60):
            while b'"position":%d' % (20 * chunks) not in got:
                got += await loop.sock_recv(clients[0], 2**16)
    assert b"event: gap" in got
    assert api.counts.seen["watchers"] == 0


async def test_outputs_that_do_not_fit_the_buffer_are_taken_from_the_stored_reply(
    api: Harness, watches: watching.Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_BUFFERED_BYTES", 1)
    async with following(api, watches) as events:
        await send(api, 2)
        assert isinstance(await anext(events), watching.Watched)
        assert (await anext(events)).start == 0


async def test_what_the_channel_lost_is_noticed_when_the_watch_is_idle(
    api: Harness, watches: watching.Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(api, 1)
    async with following(api, watches, 0.05) as events:
        while not isinstance(await anext(events), watching.Idle):
            pass
        monkeypatch.setattr(type(api.store.outputs), "publish", lambda *_: None)
        await send(api, 2)
        await send(api, 3)
        got = []
        while len(got) < 2:
            event = await anext(events)
            if not isinstance(event, watching.Idle):
                got.append(event)
    assert got[0] == watching.Gap(1, 3)
    assert got[1].start == 3


async def test_outputs_are_delivered_once_and_in_order_however_they_are_published(
    api: Harness, watches: watching.Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers publish late, or again after a lost reply."""
    published: list[Any] = []
    waits: list[float] = []

    class Waiting:
        """The watch waits for an earlier output until all are received, however long that takes."""

        async def sleep(self, seconds: float) -> None:
            waits.append(seconds)
            await becomes(lambda: watch._buffer.end == 4, "the outputs")

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

    monkeypatch.setattr(watching, "asyncio", Waiting())
    publish = type(api.store.outputs).publish
    monkeypatch.setattr(type(api.store.outputs), "publish", lambda _, *m: published.append(m))
    await send(api, 1)
    async with following(api, watches) as events:
        [watch] = watches._watches
        waiting = await until_idle(watch, events)
        for steps in (2, 3, 4):
            await send(api, steps)
        first, second, last = published
        publish(api.store.outputs, *second)
        await becomes(lambda: waits or waiting.done(), "the early output")
        for message in (first, second, first):
            publish(api.store.outputs, *message)
        got = [await waiting, await anext(events)]
        publish(api.store.outputs, *last)
        got.append(await anext(events))
    assert {type(each) for each in got} == {watching.Outputs}
    assert [each.start for each in got] == [1, 3, 6]


async def test_watchers_get_what_another_worker_commits(
    api: Harness, pipeline_server: RealServer
) -> None:
    other = RedisStore(StoreSettings(pipeline_server.url, store_wait_s=60))
    await other.start()
    await other.outputs.start()
    try:
        async with watched(api) as events:
            await events.expect("stream")
            await becomes(lambda: KEY in other.outputs.watched, "the announcement")
            await send(api, 2)
            await events.expect("stream")
            await events.expect("outputs")
            stored, reply = await other.load_with_reply(KEY)
            assert stored is not None
            assert reply is not None
            later = reply._replace(head=replace(reply.head, position=4))
            other.outputs.publish(KEY, 2, encode_reply(later), stored.fingerprint)
            assert (await events.expect("outputs"))["position"] == 4
    finally:
        await other.outputs.close()
        await other.close()


async def test_outputs_are_published_for_watched_streams_only(
    api: Harness, pipeline_server: RealServer
) -> None:
    with pipeline_server.client() as client, client.pubsub() as listener:
        listener.psubscribe("*outputs:*")
        await send(api, 2)
        async with watched(api) as events:
            await events.expect("stream")
            await api.chunk({"inputs": rows(2).tolist()}, stream="other")
            await api.client.delete("/v1/models/probe/streams/other")
            await send(api, 2)
            await events.expect("outputs")
        client.publish("last:outputs:", b"")
        messages = iter(lambda: listener.get_message(timeout=60)["channel"], b"last:outputs:")
        topics = {*messages}
    assert topics == {b"*outputs:*", b"carry:outputs:probe:s"}


async def test_an_announcement_expires(api: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = api.store.outputs
    # a write to a client that disconnected ends its watch
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.05)
    async with watched(api) as events:
        await events.expect("stream")
        assert KEY in channel.watched
    await becomes(lambda: not api.counts.seen["watchers"], "the end of the watch")
    channel.watched = dict.fromkeys(channel.watched, 0.0)
    channel._forget_expired()
    assert not channel.watched


async def test_the_document_of_the_api_describes_watching(api: Harness) -> None:
    document = (await api.client.get("/openapi.json")).json()
    operation = document["paths"][sse.ROUTE]["get"]
    assert list(operation["responses"]["200"]["content"]) == ["text/event-stream"]
    names = {each["name"] for each in operation["parameters"]}
    assert names >= {"model", "stream", "from", "Last-Event-ID", "return_sequences"}


async def test_wrong_parameters_are_problems(api: Harness) -> None:
    for query in ("?from=-1", "?from=x", "?from=9223372036854775808", "?x=1"):
        path = f"/v1/models/probe/streams/s/outputs{query}"
        problem(await api.client.get(path), 422, "invalid_input")


async def test_a_watch_needs_the_store(api: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.store.outputs, "_wait_s", 0.05)
    monkeypatch.setattr(api.store.outputs, "_on_subscribed", lambda _: None)
    path = "/v1/models/probe/streams/s/outputs"
    problem(await api.client.get(path), 503, "store_unavailable")


async def test_a_store_that_fails_ends_the_watch(api: Harness, watches: watching.Watches) -> None:
    await send(api, 2)
    async with following(api, watches, 0.01) as events:
        api.store.load_with_reply = _unavailable
        while isinstance(event := await anext(events), watching.Idle):
            pass
    assert event == watching.Ended("store_unavailable")


async def _unavailable(*_: object) -> None:
    raise StoreUnavailable("no answer")


async def test_a_client_that_disconnects_before_the_first_event_leaves_no_watch(
    api: Harness,
) -> None:
    path = "/v1/models/probe/streams/s/outputs"
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "", "client": None,
        "server": ("x", 80),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(3600)

    async with asyncio.timeout(60):
        await api.app(scope, receive, send)
    assert not api.counts.seen["watchers"]
