"""The stage of a chunk, derived from traffic that arrives byte by byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.faults.traffic import (
    BEFORE_LOAD,
    COMMIT_SENT,
    COMPUTING,
    REPLY_UNSENT,
    ClientTraffic,
    PendingChunk,
    StoreTimes,
    StoreTraffic,
    count_stages,
    stage,
)

STATE, REPLY = "carry{p0017}:s:keeps-all:s001", "carry{p0017}:r:keeps-all:s001"


def connection(number: int = 1, owner: str = "a") -> SimpleNamespace:
    return SimpleNamespace(number=number, notes=None, proxy=SimpleNamespace(owner=owner))


def command(*parts: str) -> bytes:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part.encode()) for part in parts)
    return b"*%d\r\n" % len(parts) + body


LOAD = command("MGET", STATE)
COMMIT = command("EVALSHA", "sha", "2", STATE, REPLY, "0", "600000", "", "state", "reply")
DELETE = command("EVALSHA", "sha", "2", STATE, REPLY, "", "tombstone", "600000")
LOADED = b"*1\r\n$-1\r\n"
WRITTEN, REFUSED = b"*1\r\n*1\r\n:1\r\n", b"*1\r\n*2\r\n:0\r\n$1\r\nx\r\n"


def seen(*passing: tuple[str, bytes], owner: str = "a") -> tuple[StoreTraffic, StoreTimes]:
    traffic, one = StoreTraffic(lambda connection: connection.proxy.owner), connection(owner=owner)
    for direction, data in passing:
        for byte in range(len(data)):
            traffic.passing(one, direction, data[byte : byte + 1])
    return traffic, traffic.store_times(owner, "s001")


@pytest.mark.parametrize(
    ("passing", "expected"),
    [
        ((), BEFORE_LOAD),
        ((("request", LOAD),), BEFORE_LOAD),
        ((("request", LOAD), ("reply", LOADED)), COMPUTING),
        ((("request", LOAD), ("reply", LOADED), ("request", COMMIT)), COMMIT_SENT),
        ((("request", COMMIT),), COMMIT_SENT),
        ((("request", COMMIT), ("reply", WRITTEN)), REPLY_UNSENT),
        ((("request", COMMIT), ("reply", REFUSED)), BEFORE_LOAD),
        ((("request", COMMIT), ("reply", b"-NOSCRIPT no\r\n")), BEFORE_LOAD),
        ((("request", DELETE), ("reply", b"*1\r\n:1\r\n")), BEFORE_LOAD),
    ],
)
def test_stages(passing: tuple[tuple[str, bytes], ...], expected: str) -> None:
    traffic, store_times = seen(*passing)
    killed_s = float("inf")
    assert stage(PendingChunk("s001", since_s=1e-9), store_times, killed_s) == expected
    assert traffic.conflicts == (("reply", REFUSED) in passing)


def test_traffic_before_the_request_does_not_count() -> None:
    _, store_times = seen(("request", COMMIT), ("reply", WRITTEN))
    assert (
        stage(PendingChunk("s001", since_s=store_times.written_s + 1), store_times, float("inf"))
        == BEFORE_LOAD
    )


def test_commit_answered_after_the_kill_counts_as_sent() -> None:
    _, store_times = seen(("request", COMMIT), ("reply", WRITTEN))
    assert (
        stage(PendingChunk("s001", since_s=1e-9), store_times, store_times.written_s - 1e-9)
        == COMMIT_SENT
    )


def test_connections_of_no_worker_are_ignored() -> None:
    traffic, store_times = seen(("request", b"\x00 no command"), owner="")
    assert store_times == StoreTimes()
    assert not traffic.is_workers(connection(owner=""))


def test_chunk_is_pending_until_its_reply_begins() -> None:
    traffic = ClientTraffic()
    traffic.passing(
        connection(1), "request", b"POST /v1/models/keeps-all/streams/s001/chunks HTTP/1.1\r\n"
    )
    traffic.passing(connection(2), "request", b"GET /v1/models/keeps-all/streams/s001 HTTP/1.1\r\n")
    (pending,) = traffic.in_flight("a")
    assert pending.stream == "s001"
    traffic.passing(connection(1), "reply", b"H")
    assert pending.begun
    assert not traffic.in_flight("a")
    store, _ = seen(("request", COMMIT))
    assert not count_stages(store, "a", [pending], float("inf"))
