"""The formula of `carry capacity` is compared with the memory of real servers."""

from __future__ import annotations

import pytest
from click.testing import Result
from typer.testing import CliRunner

from carry.cli import app
from service.commands.capacity_formula import (
    cache_bytes,
    history_bytes,
    primaries,
    stored_bytes,
    workers,
)
from service.pipeline.state_cache import StateCache
from service.store.codec import encode_state
from service.store.layout import HEADER_BYTES
from service.store.settings import StoreSettings
from tests.support.servers import KINDS, real_server
from tests.support.streams import Streams, cached, encode_reply, key

ERROR = 0.10
"""Share by which the formula may differ from the memory, as the documentation says."""

COUNT, PAGE, STEPS, OUTPUTS = 5_000, 500, 4, 3


@pytest.mark.parametrize("kind", KINDS)
def test_formula_is_within_its_error_of_the_memory_of_a_server(kind: str) -> None:
    streams = Streams()
    with real_server(kind, "--appendonly", "no") as server, server.client() as client:
        keys = StoreSettings(server.url).keys
        for floats, ints, idle_ttl_ms in ((16, 0, None), (300, 7, None), (300, 7, 10**9)):
            client.execute_command("FLUSHALL", "SYNC")
            before = client.info("memory")["used_memory"]
            for first in range(0, COUNT, PAGE):
                # without the script of a commit, whose interpreter also takes memory
                pipeline = client.pipeline(transaction=False)
                for number in range(first, first + PAGE):
                    commit = streams.creation(key(f"device{number:08}"), floats=floats, ints=ints)
                    state_key, reply_key = keys.pair(commit.key)
                    pipeline.set(reply_key, encode_reply(commit.reply), px=600_000)
                    pipeline.set(state_key, encode_state(commit.new), px=idle_ttl_ms)
                pipeline.execute()
            used = client.info("memory")["used_memory"] - before
            computed = stored_bytes(
                kind,
                streams=COUNT,
                state_bytes=4 * floats + 8 * ints,
                key_bytes=len(keys.state(commit.key)),
                reply_bytes=4 * STEPS * OUTPUTS,
                replies=COUNT,
                idle_ttl=idle_ttl_ms is not None,
            )
            assert computed == pytest.approx(used, rel=ERROR)


@pytest.mark.parametrize("kind", KINDS)
def test_formula_of_a_history_is_within_its_error_of_the_memory_of_a_server(kind: str) -> None:
    with real_server(kind, "--appendonly", "no") as server, server.client() as client:
        keys, count = StoreSettings(server.url).keys, 300
        for entries, entry_bytes, snapshots, floats in (
            (65, 93, 8, 256),
            (257, 93, 8, 256),
            (17, 1053, 8, 256),
            (33, 60, 4, 50),
            (9, 2_000, 2, 700),
        ):
            client.execute_command("FLUSHALL", "SYNC")
            before = client.info("memory")["used_memory"]
            pipeline = client.pipeline(transaction=False)
            for number in range(count):
                *_, events, states = keys.all_of(key(f"device{number:08}"))
                pipeline.rpush(events, *[b"e%0*d" % (entry_bytes - 1, at) for at in range(entries)])
                state = bytes(HEADER_BYTES + 4 * floats)
                for position in range(snapshots):
                    pipeline.hset(states, b"s" + position.to_bytes(8, "little"), state)
                pipeline.hset(states, "head", bytes(24 + 16 * snapshots))
            pipeline.execute()
            used = client.info("memory")["used_memory"] - before
            computed = history_bytes(
                kind,
                key_bytes=len(events),
                entries=entries,
                entry_bytes=entry_bytes,
                snapshots=snapshots,
                state_bytes=4 * floats,
            )
            assert count * computed == pytest.approx(used, rel=ERROR)


def test_a_cache_of_the_computed_size_holds_every_state() -> None:
    cache, streams = StateCache(cache_bytes(100, 4 * 50 + 8 * 2)), Streams()
    for number in range(100):
        cache.put(key(f"s{number}"), cached(streams.first(floats=50, ints=2)))
    assert cache.get(key("s0")) is not None
    cache.put(key("one more"), cached(streams.first(floats=50, ints=2)))
    assert cache.get(key("s0")) is None
    assert cache.get(key("s1")) is not None


def test_processes_are_planned_at_half_their_peak_throughput() -> None:
    assert [workers(rate) for rate in (0, 3_500, 3_600, 35_500)] == [1, 1, 2, 10]
    assert workers(3_600, 10_000) == 1
    # twice the data must fit, and 17,500 chunks a second each
    assert [primaries(data, 16, 0) for data in (8, 9, 80)] == [1, 2, 10]
    assert primaries(1, 16, 70_000) == 4


def test_command_prints_what_streams_need() -> None:
    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["capacity", *words])

    done = run("flights", "--streams", "1000000", "--rate", "100000")
    assert done.exit_code == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["raw state"].strip() == "1,568 bytes"
    assert "bytes a stream" in rows["valkey: data"]
    assert rows["workers"].strip().startswith("2, each on a core, for 6,250 chunks/s")
    missing = run("none", "--streams", "1")
    assert missing.exit_code == 1
    assert missing.stderr.startswith("carry: expected one of the models ['flights', 'rivers']")
    assert run("flights", "--streams", "0").exit_code == 2
