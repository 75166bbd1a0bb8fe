"""How far a chunk had come is told from what passed, byte by byte as it came."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.faults.sight import (
    BEFORE_LOAD,
    COMMIT_SENT,
    COMPUTING,
    REPLY_UNSENT,
    ClientSight,
    Owed,
    StoreSight,
    Work,
    count_stages,
    stage,
)

STATE, REPLY = "carry{p0017}:s:keeps-all:s001", "carry{p0017}:r:keeps-all:s001"


def link(number: int = 1, owner: str = "a") -> SimpleNamespace:
    return SimpleNamespace(number=number, notes=None, path=SimpleNamespace(owner=owner))


def command(*parts: str) -> bytes:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part.encode()) for part in parts)
    return b"*%d\r\n" % len(parts) + body


LOAD = command("MGET", STATE)
COMMIT = command("EVALSHA", "sha", "2", STATE, REPLY, "0", "600000", "", "state", "reply")
DELETE = command("EVALSHA", "sha", "2", STATE, REPLY, "", "tombstone", "600000")
LOADED = b"*1\r\n$-1\r\n"
WRITTEN, REFUSED = b"*1\r\n*1\r\n:1\r\n", b"*1\r\n*2\r\n:0\r\n$1\r\nx\r\n"


def seen(*passing: tuple[str, bytes], owner: str = "a") -> tuple[StoreSight, Work]:
    sight, one = StoreSight(lambda link: link.path.owner), link(owner=owner)
    for direction, data in passing:
        for byte in range(len(data)):
            sight.passing(one, direction, data[byte : byte + 1])
    return sight, sight.work(owner, "s001")


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
    sight, work = seen(*passing)
    killed_s = float("inf")
    assert stage(Owed("s001", since_s=1e-9), work, killed_s) == expected
    assert sight.conflicts == (("reply", REFUSED) in passing)


def test_what_came_before_the_request_does_not_count() -> None:
    _, work = seen(("request", COMMIT), ("reply", WRITTEN))
    assert stage(Owed("s001", since_s=work.written_s + 1), work, float("inf")) == BEFORE_LOAD


def test_an_answer_after_the_kill_finds_the_commit_sent() -> None:
    _, work = seen(("request", COMMIT), ("reply", WRITTEN))
    assert stage(Owed("s001", since_s=1e-9), work, work.written_s - 1e-9) == COMMIT_SENT


def test_connections_of_nobody_are_not_looked_at() -> None:
    sight, work = seen(("request", b"\x00 no command"), owner="")
    assert work == Work()
    assert not sight.is_workers(link(owner=""))


def test_a_chunk_is_owed_until_its_reply_begins() -> None:
    sight = ClientSight()
    sight.passing(link(1), "request", b"POST /v1/models/keeps-all/streams/s001/chunks HTTP/1.1\r\n")
    sight.passing(link(2), "request", b"GET /v1/models/keeps-all/streams/s001 HTTP/1.1\r\n")
    (owed,) = sight.in_flight("a")
    assert owed.stream == "s001"
    sight.passing(link(1), "reply", b"H")
    assert owed.begun
    assert not sight.in_flight("a")
    store, _ = seen(("request", COMMIT))
    assert not count_stages(store, "a", [owed], float("inf"))
