"""The stages of chunks, derived from traffic that arrives byte by byte."""

from __future__ import annotations

import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest

from tests.faults.traffic import BEFORE_LOAD, COMMIT_SENT, COMPUTING, REPLY_UNSENT, Traffic
from tests.support.proxy import Connection

STATE, REPLY = "carry{p0017}:s:keeps-all:s001", "carry{p0017}:r:keeps-all:s001"


def command(*parts: str) -> tuple[str, bytes]:
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part.encode()) for part in parts)
    return "request", b"*%d\r\n" % len(parts) + body


LOAD, OTHER = command("MGET", STATE), command("GET", "carry:epoch")
COMMIT = command("EVALSHA", "sha", "2", STATE, REPLY, "0", "600000", "", "state", "reply")
DELETE = command("EVALSHA", "sha", "2", STATE, REPLY, "", "tombstone", "600000")
LOADED, DELETED = ("reply", b"*1\r\n$-1\r\n"), ("reply", b"*1\r\n:1\r\n")
WRITTEN, REFUSED = ("reply", b"*1\r\n*1\r\n:1\r\n"), ("reply", b"*1\r\n*2\r\n:0\r\n$1\r\nx\r\n")
FAILED = ("reply", b"-NOSCRIPT no\r\n")


@pytest.mark.parametrize(
    ("passing", "stages"),
    [
        ((LOAD, LOADED), [COMPUTING]),
        ((LOAD, FAILED), []),
        ((OTHER, LOADED), []),
        ((COMMIT, WRITTEN), [COMMIT_SENT, REPLY_UNSENT]),
        ((COMMIT, REFUSED), [COMMIT_SENT]),
        ((COMMIT, FAILED, COMMIT), [COMMIT_SENT, COMMIT_SENT]),
        ((DELETE, DELETED), []),
        ((LOAD, COMMIT, LOADED, WRITTEN), [COMMIT_SENT, COMPUTING, REPLY_UNSENT]),
    ],
)
def test_stages_follow_from_commands_and_answers(
    passing: tuple[tuple[str, bytes], ...], stages: list[str]
) -> None:
    traffic, store, seen = Traffic(), Connection(None, "a"), []
    traffic.hook = lambda worker, stage: seen.append(stage)
    for direction, data in passing:
        for byte in data:
            traffic.watch_store(store, direction, bytes([byte]))
    assert seen == stages
    assert traffic.conflicts == (REFUSED in passing)
    assert traffic.has_pending_commit(store) == (passing[-1] == COMMIT)


def test_connections_of_no_worker_are_ignored() -> None:
    Traffic().watch_store(Connection(None, ""), "request", b"\x00 no command")


MESSAGE = ModelInferRequest(model_name="keeps-all")
MESSAGE.parameters["sequence_id"].string_param = "s001"
PATH = b" /v1/models/keeps-all/streams/s001"


@pytest.mark.parametrize(
    ("sent", "chunks"),
    [
        ([b"POST" + PATH + b"/chunks HTTP/1.1"], 1),
        ([b"POST /v2/models/keeps-all/infer HTTP/1.1"], 1),
        ([b"GET" + PATH + b" HTTP/1.1"], 0),
        ([b"GET" + PATH + b"/live HTTP/1.1", b"frame", b"frame"], 2),
        ([b"headers of a call", b"frame" + MESSAGE.SerializeToString()], 1),
    ],
)
def test_chunk_begins_with_its_request_frame_or_message(sent: list[bytes], chunks: int) -> None:
    traffic, connection, seen = Traffic(), Connection(None, "a"), []
    traffic.hook = lambda worker, stage: seen.append((worker, stage))
    for data in sent:
        traffic.watch_clients(connection, "request", data)
        traffic.watch_clients(connection, "reply", data)
    assert seen == [("a", BEFORE_LOAD)] * chunks
