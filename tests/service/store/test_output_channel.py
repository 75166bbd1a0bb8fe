"""The channel of outputs between the workers of a store, on each kind of store."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from service.core.errors import StoreRefused
from service.store.base import Conflicted, Store
from service.store.capabilities import PublishedOutput
from service.store.redis import connections, output_channel
from service.store.redis.output_channel import RedisOutputChannel
from service.store.redis.redis_store import open_router
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, becomes, emptied, until_async
from tests.support.streams import (
    OpenStore,
    Streams,
    columns,
    committed,
    encode_reply,
    key,
    same_reply,
)


class Recorder:
    """Records what a receiver gets."""

    def __init__(self) -> None:
        self.outputs: list[PublishedOutput] = []
        self.reads = 0

    def receive(self, output: PublishedOutput) -> None:
        self.outputs.append(output)

    def resynchronize(self) -> None:
        self.reads += 1


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


@pytest.fixture
async def stores(open_on: OpenStore) -> list[Store]:
    """Two workers of one store."""
    workers = [await open_on(), await open_on()]
    for worker in workers:
        await worker.outputs.start()
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.outputs.close()


async def test_workers_publish_what_they_commit_to_watched_streams(
    stores: list[Store], streams: Streams
) -> None:
    watching, committing = stores
    first, other = streams.creation(key("a:b")), streams.creation(key("other"))
    recorder = Recorder()
    await watching.outputs.subscribe(first.key, recorder)
    await becomes(lambda: first.key in committing.outputs.watched, "the announcement")
    await committed(committing, first, other)
    assert isinstance((await committing.commit(columns(first)))[0], Conflicted)
    second = streams.next(first)
    await committed(watching, second)
    await becomes(lambda: len(recorder.outputs) == 2, "two outputs")
    for output, commit in zip(recorder.outputs, (first, second), strict=True):
        assert output.key == first.key
        assert output.start == commit.new.last.start
        assert output.fingerprint == commit.new.fingerprint
        assert same_reply(output.reply, commit.reply)
    await committing.delete(first.key)
    await becomes(lambda: len(recorder.outputs) == 3, "the deletion")
    assert recorder.outputs[2] == PublishedOutput(first.key, 0, None, b"")
    watching.outputs.unsubscribe(first.key, recorder)
    await committed(committing, streams.creation(key("third")))
    assert len(recorder.outputs) == 3


@pytest.fixture
def announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcements are not repeated."""
    monkeypatch.setattr(output_channel, "ANNOUNCE_INTERVAL_S", 3600.0)


async def test_a_stream_is_watched_again_at_once_after_its_last_watch_ended(
    announced_once: None, stores: list[Store], streams: Streams
) -> None:
    watching, committing = stores
    first, recorder = streams.creation(key("a")), Recorder()
    for _ in range(3):
        async with asyncio.timeout(60):
            await watching.outputs.subscribe(first.key, recorder)
        watching.outputs.unsubscribe(first.key, recorder)
    await watching.outputs.subscribe(first.key, recorder)
    await becomes(lambda: first.key in committing.outputs.watched, "the announcement")
    await committed(committing, first)
    await becomes(lambda: recorder.outputs, "an output")


async def test_a_worker_that_starts_later_learns_what_is_watched(
    stores: list[Store], open_on: OpenStore, streams: Streams
) -> None:
    await stores[0].outputs.subscribe(key("a"), Recorder())
    late = await open_on()
    await late.outputs.start()
    try:
        await becomes(lambda: key("a") in late.outputs.watched, "the announcement")
    finally:
        await late.outputs.close()


async def test_a_broken_connection_is_replaced_and_its_streams_are_read(
    stores: list[Store], streams: Streams
) -> None:
    channel = stores[0].outputs
    assert isinstance(channel, RedisOutputChannel)
    recorder = Recorder()
    await channel.subscribe(key("a"), recorder)
    before = channel._pubsub
    reads = recorder.reads
    before.connection._writer.transport.abort()
    await becomes(lambda: channel._pubsub not in (None, before), "another connection")
    await becomes(lambda: recorder.reads > reads, "a request to read the stream")
    await becomes(lambda: key("a") in stores[1].outputs.watched, "the announcement")
    await committed(stores[1], streams.creation(key("a")))
    await becomes(lambda: recorder.outputs, "an output")


async def test_a_broken_connection_is_replaced_if_a_publication_loses_its_cancellation(
    open_on: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Python 3.12, if it completes at the same time."""
    publish_all, cancellations = RedisOutputChannel._publish_all, list[None]()

    async def publish_and_go_on(channel: RedisOutputChannel, client: Any) -> None:
        try:
            await publish_all(channel, client)
        except asyncio.CancelledError:
            cancellations.append(None)
            await asyncio.Event().wait()

    monkeypatch.setattr(connections, "CANCEL_S", 0.01)
    monkeypatch.setattr(RedisOutputChannel, "_publish_all", publish_and_go_on)
    channel = (await open_on()).outputs
    assert isinstance(channel, RedisOutputChannel)
    await channel.start()
    try:
        await channel.subscribe(key("a"), Recorder())
        before = channel._pubsub
        before.connection._writer.transport.abort()
        await becomes(lambda: channel._pubsub not in (None, before), "another connection")
        assert cancellations
    finally:
        await channel.close()


@pytest.mark.parametrize("missing", ["-subscribe", "-publish", "resetchannels"])
async def test_permission_error_names_the_commands_that_watching_needs(
    pipeline_server: RealServer, missing: str
) -> None:
    with pipeline_server.client() as admin:
        everything = ("on", "nopass", "~*", "&*", "+@all")
        admin.execute_command("ACL", "SETUSER", "watcher", *everything, missing)
        path = pipeline_server.url.partition("://")[2]
        settings = StoreSettings(f"unix://watcher:any@{path}", store_wait_s=30)
        channel = RedisOutputChannel(open_router(settings))
        await channel.start()
        try:
            for recorder in (Recorder(), Recorder()):
                with pytest.raises(StoreRefused, match="SUBSCRIBE, UNSUBSCRIBE and PUBLISH"):
                    async with asyncio.timeout(60):
                        await channel.subscribe(key("a"), recorder)
                channel.unsubscribe(key("a"), recorder)
            admin.execute_command("ACL", "SETUSER", "watcher", *everything)

            async def is_permitted() -> bool:
                with suppress(StoreRefused):
                    await channel.subscribe(key("a"), Recorder())
                    return True
                return False

            await until_async(is_permitted, "the permission")
        finally:
            await channel.close()
            admin.execute_command("ACL", "DELUSER", "watcher")


async def test_publications_beyond_the_bound_are_dropped(
    stores: list[Store], streams: Streams
) -> None:
    channel = stores[0].outputs
    assert isinstance(channel, RedisOutputChannel)
    first = streams.creation(key("a"))
    channel.watched[first.key] = float("inf")
    for _ in range(5000):
        channel.publish(first.key, 0, encode_reply(first.reply), first.new.fingerprint)
    assert len(channel._unsent) == 1024
    await asyncio.wait_for(committed(stores[0], first), 60)
