"""The watch of topics on real servers: new entries are noticed, and whatever else ends a watch."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.store.topics import TopicKeys
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, becomes, emptied, opened, real_server

NAMES = [f"carry{{p{number:04d}}}:in:probe" for number in range(20)]
"""Topics of several partitions, which on a cluster are on several servers."""

REJECTED = ["client|tracking", "xread"]


def keys_of(name: str) -> TopicKeys:
    return TopicKeys.of(name, f"{name}:out", f"{name}:dead", "readers")


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    """An empty one of each kind."""
    return emptied(every_store)


async def watch(store: Any, name: str, after: bytes = b"0-0") -> asyncio.Future[bool]:
    """Watch a topic, as soon as the connection to its server is open."""
    notification: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    await becomes(lambda: store.topics.watch(keys_of(name), after, notification), "a watch")
    return notification


async def test_an_entry_that_is_added_later_is_noticed(server: RealServer | Cluster) -> None:
    async with opened(server.url) as store, asyncio.timeout(60):
        with server.client() as client:
            for name in NAMES:
                last = client.xadd(name, {"event": "1"})
                notification = await watch(store, name, last)
                client.xadd(name, {"event": "2"})
                await notification


async def test_the_last_id_is_that_of_the_last_entry(server: RealServer | Cluster) -> None:
    async with opened(server.url) as store:
        with server.client() as client:
            assert await store.topics.last_id(keys_of(NAMES[0])) == b"0-0"
            client.xadd(NAMES[0], {"event": "1"})
            last = client.xadd(NAMES[0], {"event": "2"})
            assert await store.topics.last_id(keys_of(NAMES[0])) == last


async def test_one_connection_watches_all_topics_of_a_server(server: RealServer | Cluster) -> None:
    async with opened(server.url) as store, asyncio.timeout(60):
        with server.client() as client:
            lasts = {name: client.xadd(name, {"event": "1"}) for name in NAMES}
            watches = {name: await watch(store, name, last) for name, last in lasts.items()}
            for name in NAMES[::2]:
                client.xadd(name, {"event": "2"})
            await asyncio.gather(*[watches[name] for name in NAMES[::2]])
            assert not any(watches[name].done() for name in NAMES[1::2])


async def test_an_entry_that_is_there_already_is_noticed(server: RealServer | Cluster) -> None:
    async with opened(server.url) as store, asyncio.timeout(60):
        with server.client() as client:
            first = client.xadd(NAMES[0], {"event": "1"})
            client.xadd(NAMES[0], {"event": "2"})
            assert await (await watch(store, NAMES[0], first)) is True


async def test_a_broken_connection_ends_all_watches_and_is_opened_again() -> None:
    with real_server("valkey") as server, server.client() as client:
        async with opened(server.url) as store, asyncio.timeout(60):
            watches = [await watch(store, name) for name in NAMES]
            client.client_kill_filter(_type="normal", skipme=True)
            assert not any(await asyncio.gather(*watches))
            last = client.xadd(NAMES[0], {"event": "1"})
            notification = await watch(store, NAMES[0], last)
            client.xadd(NAMES[0], {"event": "2"})
            await notification


@pytest.mark.parametrize("command", REJECTED)
async def test_a_server_that_does_not_permit_it_is_reported(
    command: str,
) -> None:
    with real_server("valkey") as server, server.client() as client, capture_logs() as lines:
        client.execute_command("ACL", "SETUSER", "default", f"-{command}")
        async with opened(server.url) as store, asyncio.timeout(60):
            ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

            def is_reported() -> bool:
                store.topics.watch(keys_of(NAMES[0]), b"0-0", ended)
                found = [each for each in lines if each["event"] == "topics_not_watched"]
                return any(command in each["reason"] for each in found)

            await becomes(is_reported, "the report")
            assert not store.topics.watch(keys_of(NAMES[0]), b"0-0", ended)
