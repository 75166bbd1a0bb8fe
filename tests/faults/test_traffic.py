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
SENT, KILL = "a chunk is sent", "the worker is killed"


def observe(*passing: tuple[str, bytes] | str, owner: str = "a") -> Traffic:
    """Bytes between a worker and the store, one at a time, and what happens in between."""
    traffic, store, client = Traffic(), Connection(None, owner), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[client]))
    for event in passing:
        if event == SENT:
            client.notes = PendingChunk("s001")
        elif event == KILL:
            traffic.note_kill("a")
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
        # only what comes between the request and the kill counts
        ((COMMIT, WRITTEN, SENT), BEFORE_LOAD),
        ((SENT, LOAD, KILL, LOADED), BEFORE_LOAD),
        ((SENT, COMMIT, KILL, WRITTEN), COMMIT_SENT),
        # the worker had sent it before
        ((SENT, KILL, COMMIT), COMMIT_SENT),
    ],
)
def test_stage_of_a_killed_workers_chunk(passing: tuple[object, ...], expected: str) -> None:
    traffic = observe(*passing)
    if KILL not in passing:
        traffic.note_kill("a")
    assert list(traffic.count_stages("a")) == [expected]
    assert traffic.conflicts == (REFUSED in passing)


def test_connections_of_no_worker_are_ignored() -> None:
    assert observe(SENT, ("request", b"\x00 no command"), owner="").pending("a")


def test_frame_of_a_live_socket_is_pending_until_its_outcome_begins() -> None:
    traffic, socket = Traffic(), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[socket]))
    for passing in ("GET /v1/models/keeps-all/streams/s001/live HTTP/1.1", "frame", "frame"):
        traffic.watch_clients(socket, "request", passing.encode())
        assert [each.stream for each in traffic.pending("a")] == ["s001"] * (passing == "frame")
        traffic.watch_clients(socket, "reply", b"H")
        assert not traffic.pending("a")


def test_chunk_is_pending_until_its_reply_begins() -> None:
    traffic, chunk, read = Traffic(), Connection(None, "a"), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[chunk, read]))
    path = b" /v1/models/keeps-all/streams/s001"
    traffic.watch_clients(chunk, "request", b"POST" + path + b"/chunks HTTP/1.1\r\n")
    traffic.watch_clients(read, "request", b"GET" + path + b" HTTP/1.1\r\n")
    assert [(each.stream, each.stage) for each in traffic.pending("a")] == [("s001", BEFORE_LOAD)]
    traffic.note_kill("a")
    traffic.watch_clients(chunk, "reply", b"H")
    assert not traffic.count_stages("a")
    assert not traffic.pending("a")


def test_chunk_over_grpc_is_pending_until_headers_come() -> None:
    """Not until the first bytes come: the connection has frames of its own."""
    traffic, connection = Traffic(), Connection(None, "a")
    traffic.proxies.append(SimpleNamespace(owner="a", connections=[connection]))
    message = ModelInferRequest(model_name="keeps-all")
    message.parameters["sequence_id"].string_param = "s001"
    ping, window = frame(6, bytes(8)), frame(8, bytes(4))
    traffic.watch_clients(connection, "request", window + frame(1, b"path"))
    assert not traffic.pending("a")
    traffic.watch_clients(connection, "request", frame(0, message.SerializeToString()))
    traffic.watch_clients(connection, "reply", ping + window)
    assert [each.stream for each in traffic.pending("a")] == ["s001"]
    traffic.watch_clients(connection, "reply", ping + frame(1, b"status"))
    assert not traffic.pending("a")


def frame(kind: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3) + bytes([kind, 0]) + bytes(4) + payload
