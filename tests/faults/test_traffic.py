"""The stage of a chunk, derived from traffic that arrives byte by byte."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.proxy import Connection
from tests.faults.traffic import (
    BEFORE_LOAD,
    COMMIT_SENT,
    COMPUTING,
    REPLY_UNSENT,
    PendingChunk,
    Traffic,
)

STATE, REPLY = "carry{p0017}:s:keeps-all:s001", "carry{p0017}:r:keeps-all:s001"


def command(*parts: str) -> bytes:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part.encode()) for part in parts)
    return b"*%d\r\n" % len(parts) + body


LOAD = command("MGET", STATE)
COMMIT = command("EVALSHA", "sha", "2", STATE, REPLY, "0", "600000", "", "state", "reply")
DELETE = command("EVALSHA", "sha", "2", STATE, REPLY, "", "tombstone", "600000")
LOADED = b"*1\r\n$-1\r\n"
WRITTEN, REFUSED = b"*1\r\n*1\r\n:1\r\n", b"*1\r\n*2\r\n:0\r\n$1\r\nx\r\n"


LATER_S = float("inf")


def observe(*passing: tuple[str, bytes], owner: str = "a") -> Traffic:
    """Bytes between a worker and the store, one at a time."""
    traffic, one = Traffic(), Connection(None, owner)
    for direction, data in passing:
        for byte in data:
            traffic.watch_store(one, direction, bytes([byte]))
    return traffic


def stages(traffic: Traffic, since_s: float = 1e-9, killed_s: float = LATER_S) -> list[str]:
    """The stage of a chunk that was pending since a moment."""
    return list(traffic.count_stages("a", [PendingChunk("s001", since_s)], killed_s))


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
    traffic = observe(*passing)
    assert stages(traffic) == [expected]
    assert traffic.conflicts == (("reply", REFUSED) in passing)


def test_only_traffic_between_request_and_kill_counts() -> None:
    traffic = observe(("request", COMMIT), ("reply", WRITTEN))
    written_s = traffic.times["a", "s001"][REPLY_UNSENT]
    assert stages(traffic, since_s=written_s + 1) == [BEFORE_LOAD]
    assert stages(traffic, killed_s=written_s - 1e-9) == [COMMIT_SENT]


def test_connections_of_no_worker_are_ignored() -> None:
    assert not observe(("request", b"\x00 no command"), owner="").times


def test_chunk_is_pending_until_its_reply_begins() -> None:
    traffic, chunk, read = Traffic(), Connection(None, "a"), Connection(None, "a")
    path = b" /v1/models/keeps-all/streams/s001"
    traffic.watch_clients(chunk, "request", b"POST" + path + b"/chunks HTTP/1.1\r\n")
    traffic.watch_clients(read, "request", b"GET" + path + b" HTTP/1.1\r\n")
    pending = chunk.notes
    assert (pending.stream, read.notes) == ("s001", None)
    traffic.watch_clients(chunk, "reply", b"H")
    assert chunk.notes is None
    assert traffic.count_stages("a", [pending], LATER_S) == Counter()
