"""The stage of a chunk, derived from traffic that arrives byte by byte."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from tests.faults.traffic import (
    BEFORE_LOAD,
    COMMIT_SENT,
    COMPUTING,
    REPLY_UNSENT,
    PendingChunk,
    Traffic,
)
from tests.support.proxy import Connection

STATE, REPLY = "carry{p0017}:s:keeps-all:s001", "carry{p0017}:r:keeps-all:s001"


def command(*parts: str) -> tuple[str, bytes]:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part.encode()) for part in parts)
    return "request", b"*%d\r\n" % len(parts) + body


LOAD = command("MGET", STATE)
COMMIT = command("EVALSHA", "sha", "2", STATE, REPLY, "0", "600000", "", "state", "reply")
DELETE = command("EVALSHA", "sha", "2", STATE, REPLY, "", "tombstone", "600000")
LOADED, DELETED = ("reply", b"*1\r\n$-1\r\n"), ("reply", b"*1\r\n:1\r\n")
WRITTEN, REFUSED = ("reply", b"*1\r\n*1\r\n:1\r\n"), ("reply", b"*1\r\n*2\r\n:0\r\n$1\r\nx\r\n")
FAILED = ("reply", b"-NOSCRIPT no\r\n")
SENT = "a chunk is sent"


def observe(*passing: tuple[str, bytes] | str, owner: str = "a") -> Traffic:
    """Bytes between a worker and the store, one at a time, and a chunk that is sent in between."""
    traffic, store, client = Traffic(), Connection(None, owner), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[client]))
    for event in passing:
        if event == SENT:
            client.notes = PendingChunk("s001")
        else:
            for byte in event[1]:
                traffic.watch_store(store, event[0], bytes([byte]))
    return traffic


@pytest.mark.parametrize(
    ("passing", "expected"),
    [
        ((SENT,), BEFORE_LOAD),
        ((SENT, LOAD), BEFORE_LOAD),
        ((SENT, LOAD, LOADED), COMPUTING),
        ((SENT, LOAD, LOADED, COMMIT), COMMIT_SENT),
        ((SENT, COMMIT), COMMIT_SENT),
        ((SENT, COMMIT, WRITTEN), REPLY_UNSENT),
        ((SENT, COMMIT, REFUSED), BEFORE_LOAD),
        ((SENT, COMMIT, FAILED), BEFORE_LOAD),
        ((SENT, DELETE, DELETED), BEFORE_LOAD),
        ((SENT, COMMIT, WRITTEN, LOAD, LOADED), REPLY_UNSENT),
        # only what comes after the request counts
        ((COMMIT, WRITTEN, SENT), BEFORE_LOAD),
    ],
)
def test_stage_of_a_pending_chunk(passing: tuple[object, ...], expected: str) -> None:
    traffic = observe(*passing)
    assert [chunk.stage for chunk in traffic.pending("a")] == [expected]
    assert traffic.conflicts == (REFUSED in passing)


def test_connections_of_no_worker_are_ignored() -> None:
    assert observe(SENT, ("request", b"\x00 no command"), owner="").pending("a")


def frame(kind: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3) + bytes([kind, 0]) + bytes(4) + payload


MESSAGE = ModelInferRequest(model_name="keeps-all")
MESSAGE.parameters["sequence_id"].string_param = "s001"
PATH, PING = b" /v1/models/keeps-all/streams/s001", frame(6, bytes(8))
IN_FLIGHT = {
    "a chunk over HTTP": ((b"POST" + PATH + b"/chunks HTTP/1.1",), b"H", True),
    "another request": ((b"GET" + PATH + b" HTTP/1.1",), b"H", False),
    "the opening of a live socket": ((b"GET" + PATH + b"/live HTTP/1.1",), b"H", False),
    "a frame of a live socket": ((b"GET" + PATH + b"/live HTTP/1.1", b"frame"), b"H", True),
    "a call over gRPC": ((PING + frame(1, b"path"),), frame(1, b"status"), False),
    "its message": ((frame(0, MESSAGE.SerializeToString()),), PING + frame(1, b"status"), True),
}
"""What a client sends, the beginning of the reply, and whether a chunk is pending in between."""


@pytest.mark.parametrize(("sent", "reply", "is_pending"), IN_FLIGHT.values(), ids=IN_FLIGHT)
def test_chunk_is_pending_until_its_reply_begins(
    sent: tuple[bytes, ...], reply: bytes, is_pending: bool
) -> None:
    traffic, connection = Traffic(), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[connection]))
    for data in sent:
        traffic.watch_clients(connection, "request", data)
    if reply.startswith(PING):
        # a frame of the connection itself is no reply
        traffic.watch_clients(connection, "reply", PING)
    assert [chunk.stream for chunk in traffic.pending("a")] == ["s001"] * is_pending
    traffic.watch_clients(connection, "reply", reply)
    assert not traffic.pending("a")
