"""Usage of keys with quotas: counted by the store, for all processes together."""

from __future__ import annotations

import asyncio

import pytest

from service.store.base import Committed, Conflicted, Store
from service.store.capabilities import Quota, Registration
from service.store.settings import StoreSettings
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied
from tests.support.streams import OpenStore, Streams, absence, columns, committed, key

KEY = "0123456789ab"


@pytest.fixture
def server(every_store: RealServer | Cluster) -> RealServer | Cluster:
    return emptied(every_store)


async def register(store: Store, quota: Quota, *streams: str, size: int = 100) -> Registration:
    return await store.usage.register(KEY, [(key(name), size) for name in streams], quota)


async def test_streams_are_accepted_up_to_the_quota_and_then_only_known_ones(
    store: Store,
) -> None:
    quota = Quota(2, None)
    assert await register(store, quota, "a", "b", "c") == ([True, True, False], 2, 200)
    assert await register(store, quota, "c", "b", "a") == ([False, True, True], 2, 200)
    (registered, unknown) = await store.usage.find_registrations(KEY, [key("a"), key("unknown")])
    assert not unknown
    await store.usage.release(KEY, [(key("a"), registered), (key("unknown"), unknown)])
    assert await register(store, quota, "c") == ([True], 2, 200)
    # another key has a quota of its own
    other = await store.usage.register("f" * 12, [(key("d"), 1)], quota)
    assert other == ([True], 1, 1)


async def test_bytes_are_accepted_up_to_the_quota(store: Store) -> None:
    quota = Quota(None, 250)
    assert await register(store, quota, "a", "b", "c") == ([True, True, False], 2, 200)
    assert await register(store, quota, "d", size=51) == ([False], 2, 200)
    assert await register(store, quota, "e", size=50) == ([True], 3, 250)
    large = 2**52
    assert await register(store, Quota(None, 2**53), "f", size=large) == ([True], 4, 250 + large)


async def test_concurrent_processes_do_not_exceed_a_quota_together(open_on: OpenStore) -> None:
    stores = [await open_on() for _ in range(2)]
    quota = Quota(7, None)
    calls = [register(stores[index % 2], quota, f"s{index}") for index in range(20)]
    accepted = [result.accepted[0] for result in await asyncio.gather(*calls)]
    assert accepted.count(True) == 7


async def test_release_keeps_a_stream_that_was_registered_again(store: Store) -> None:
    await register(store, Quota(2, 1000), "a")
    (before,) = await store.usage.find_registrations(KEY, [key("a")])
    # a larger state replaces the smaller one in the count
    assert await register(store, Quota(2, 1000), "a", size=900) == ([True], 1, 900)
    assert await register(store, Quota(2, 1000), "a", size=1001) == ([False], 1, 900)
    await store.usage.release(KEY, [(key("a"), before)])
    assert await register(store, Quota(2, 1000), "b", size=200) == ([False], 1, 900)
    (after,) = await store.usage.find_registrations(KEY, [key("a")])
    await store.usage.release(KEY, [(key("a"), after)])
    assert await register(store, Quota(2, 1000), "b", size=200) == ([True], 1, 200)


async def test_reconcile_keeps_the_streams_that_exist(store: Store, streams: Streams) -> None:
    names = ["live", "deleted", *(f"gone{index}" for index in range(600))]
    await register(store, Quota(None, None), *names, size=10)
    live, deleted = streams.creation(key("live")), streams.creation(key("deleted"))
    await committed(store, live, deleted)
    assert await store.delete(key("deleted")) == Committed()
    await store.usage.reconcile(KEY)
    quota = Quota(2, None)
    assert await register(store, quota, "live", "new", "deleted", size=10) == (
        [True, True, False],
        2,
        20,
    )


@pytest.mark.parametrize("was_deleted", [False, True])
async def test_commits_behind_a_removed_registration_create_nothing(
    store: Store, streams: Streams, *, was_deleted: bool
) -> None:
    """A stream is never created without being counted."""
    name = key("s")
    if was_deleted:
        await store.delete(name)
    creation = streams.creation(name)._replace(expected=await absence(store, name))
    await register(store, Quota(1, None), "s")
    await store.usage.reconcile(KEY)
    assert await store.usage.find_registrations(KEY, [name]) == [b""]
    assert await store.commit(columns(creation)) == [Conflicted(None)]
    again = creation._replace(expected=await absence(store, name))
    await register(store, Quota(1, None), "s")
    await committed(store, again)
    await store.usage.reconcile(KEY)
    assert await register(store, Quota(1, None), "t") == ([False], 1, 100)


async def test_registrations_of_earlier_versions_are_read(
    store: Store, server: RealServer | Cluster
) -> None:
    """Their value ends with the time of the registration."""
    name = StoreSettings(server.url).keys.stream_usage(KEY)
    with server.client() as client:
        client.hset(name, mapping={"flights:a": "100:1700000000", "total": "100"})
    assert await register(store, Quota(1, None), "b") == ([False], 1, 100)
    await store.usage.reconcile(KEY)
    assert await register(store, Quota(1, None), "b") == ([True], 1, 100)
