"""What a store tells its operator: counts of streams, reconnects, round trips, availability."""

from __future__ import annotations

import math
import time

import pytest

from service.core.errors import StoreRefused
from service.store.base import Store
from service.store.capabilities import LIVE_S
from service.store.redis.commands import PendingCommand
from service.store.redis.stream_count import SAMPLE_KEYS
from tests.support.cluster import Cluster
from tests.support.servers import RealServer, emptied, opened, until_async
from tests.support.streams import Commit, Streams, committed, key

HEADER_BYTES = 96
FLOATS, INTS = 6, 2
STATE_BYTES = HEADER_BYTES + 4 * FLOATS + 8 * INTS


def creation(streams: Streams, name: str, model: str, age_s: float = 0.0) -> Commit:
    """The first chunk of a stream, so long ago."""
    new = streams.first(floats=FLOATS, ints=INTS)
    new = new._replace(updated_ms=round((time.time() - age_s) * 1000))
    return Commit(key(name, model), None, new, streams.reply(new))


async def test_few_streams_are_counted_exactly(
    every_store: RealServer | Cluster, streams: Streams
) -> None:
    emptied(every_store)
    async with opened(every_store.url) as store, opened(every_store.url, namespace="two") as other:
        old_s = LIVE_S + 60
        commits = [creation(streams, f"s{n}", "flights", old_s * (n < 4)) for n in range(30)]
        await committed(store, *commits, *(creation(streams, f"s{n}", "post") for n in range(7)))
        await committed(other, *(creation(streams, f"s{n}", "flights") for n in range(5)))
        await store.delete(key("s29"))
        counts = await store.monitor.count_streams()
        assert counts == {"flights": (29, 25, 29 * STATE_BYTES), "post": (7, 7, 7 * STATE_BYTES)}


async def test_many_streams_are_estimated_from_a_sample(
    store: Store, server: RealServer, streams: Streams
) -> None:
    sizes = {"flights": 2400, "post": 600}
    for model, size in sizes.items():
        every = [creation(streams, f"s{n}", model) for n in range(size)]
        for at in range(0, size, 200):
            await committed(store, *every[at : at + 200])
    with server.client() as client:
        keys = client.dbsize()
        client.config_resetstat()
        counts = await store.monitor.count_streams()
        calls = {name: each["calls"] for name, each in client.info("commandstats").items()}
    assert keys > 2 * sum(sizes.values())
    assert calls["cmdstat_randomkey"] == SAMPLE_KEYS
    assert calls["cmdstat_getrange"] <= SAMPLE_KEYS
    assert "cmdstat_scan" not in calls
    for model, size in sizes.items():
        share = size / keys
        deviation = keys * math.sqrt(share * (1 - share) / SAMPLE_KEYS)
        streams_counted, live, state_bytes = counts[model]
        assert abs(streams_counted - size) < 5 * deviation
        assert live == pytest.approx(streams_counted)
        assert state_bytes == pytest.approx(streams_counted * STATE_BYTES)


async def test_count_without_permission_is_refused(server: RealServer) -> None:
    with server.client() as client:
        rules = ("on", ">pass", "~*", "&*", "+@all", "-dbsize")
        client.execute_command("ACL", "SETUSER", "carry", *rules)
        try:
            async with opened(server.url.replace("unix://", "unix://carry:pass@")) as store:
                with pytest.raises(StoreRefused, match="dbsize"):
                    await store.monitor.count_streams()
        finally:
            client.acl_deluser("carry")


async def test_reconnects_and_round_trips_are_counted(
    own_server: RealServer, streams: Streams
) -> None:
    async with opened(own_server.url, store_wait_s=10) as store:
        first, telemetry = streams.creation(key("a")), store.monitor.telemetry
        telemetry.round_trips_s.clear()
        before_s = time.monotonic()
        await committed(store, first)
        after_s = time.monotonic()
        assert telemetry.reconnects == 0
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (True, 1, 0)
        assert len(telemetry.round_trips_s) == 1
        assert 0 < telemetry.round_trips_s[0] <= after_s - before_s
        own_server.kill()

        assert not (await store.monitor.check()).ok
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (False, 0, 1)
        own_server.start()
        await committed(store, streams.next(first))
        assert telemetry.reconnects == 1

        async def is_timed_again() -> bool:
            return len(telemetry.round_trips_s) > 1

        await until_async(is_timed_again, "the round trip after the reconnect")
        assert (await store.monitor.check()).ok
        assert (telemetry.is_up, telemetry.servers_up, telemetry.servers_down) == (True, 1, 0)


async def test_an_error_reply_ends_the_timing_of_its_command(
    server: RealServer, streams: Streams
) -> None:
    async with opened(server.url) as store:
        (rejected,) = await store._router.execute(PendingCommand.of("GET"))
        assert isinstance(rejected, StoreRefused)
        store.monitor.telemetry.round_trips_s.clear()
        await committed(store, streams.creation(key("a")))
        assert len(store.monitor.telemetry.round_trips_s) == 1
