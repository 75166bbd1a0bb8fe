"""The stages of chunks, derived from traffic."""

import numpy as np
import pytest

from service.core.values import FIRST_TAG, StreamHead, Tombstone
from service.store.codec import encode_state, encode_tombstone
from tests.faults.traffic import BEFORE_LOAD, COMMIT_SENT, COMPUTING, REPLY_UNSENT, Traffic
from tests.support.proxy import Connection
from tests.support.streams import Streams
from tests.support.v2_messages import infer_request

pytestmark = pytest.mark.harness

KEYS = b"carry{p0017}:s:keeps-all:s001", b"carry{p0017}:r:keeps-all:s001"
STATE = encode_state(Streams().first())
TOMBSTONE = encode_tombstone(Tombstone(StreamHead(bytes(8), FIRST_TAG, 0)))


def command(*parts: bytes) -> tuple[str, bytes]:
    body = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return "request", b"*%d\r\n%b" % (len(parts), body)


LOAD, OTHER = command(b"MGET", KEYS[0]), command(b"GET", b"carry:epoch")
COMMIT = command(b"EVALSHA", b"sha", b"2", *KEYS, b"0", b"600000", b"", STATE, b"reply")
DELETE = command(b"EVALSHA", b"sha", b"2", *KEYS, b"", TOMBSTONE, b"600000")
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
    ],
)
def test_stages_follow_from_commands_and_answers(
    passing: tuple[tuple[str, bytes], ...], stages: list[str]
) -> None:
    traffic, store, seen = Traffic(), Connection(None, "a"), []
    traffic.hook = lambda worker, stage: seen.append(stage)
    for direction, data in passing:
        traffic.watch_store(store, direction, data)
    assert seen == stages
    assert traffic.conflicts == (REFUSED in passing)
    assert traffic.has_pending_commit(store) == (passing[-1] == COMMIT)


MESSAGE = infer_request("keeps-all", np.zeros((1, 3)), "s001")
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
