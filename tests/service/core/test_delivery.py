"""The idempotency table, row by row; digest and tag against their definitions."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.events.columns import canonical_bytes
from models.events.schema import EventSchema
from models.spec.state import State
from service.core.delivery import (
    Process,
    Replay,
    Resolution,
    always_starts,
    chunk_digest,
    evaluate_chunk,
    is_continuation,
    next_tag,
    resolve_conflict,
    resolve_duplicate,
    start_epoch,
)
from service.core.errors import (
    AlreadyApplied,
    EpochMismatch,
    InputKindMismatch,
    PositionAhead,
    PositionBehind,
    StateChanged,
    StreamFinal,
)
from service.core.values import (
    Chunk,
    Feed,
    LastChunk,
    Precondition,
    Steps,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
)
from tests.support.streams import applied
from tests.support.strict_events import columns_from_events

EPOCH, OTHER_EPOCH = b"\x01" * 8, b"\x02" * 8
FINGERPRINT = b"\x03" * 16
KEY = StreamKey("flights", "EWR-UA")
SCHEMA = EventSchema.model_validate({"fields": [{"kind": "boolean", "name": "late"}]})
COLUMNS = columns_from_events(SCHEMA, [{"late": True}])


def rows(count: int, seed: int = 0) -> Steps:
    values = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    return Steps(Feed.INPUTS, count, rows=values)


def chunk(position: int | None = None, count: int = 4, seed: int = 0, **more: Any) -> Chunk:
    steps = rows(count, seed)
    return Chunk(KEY, steps, chunk_digest(None, steps), position=position, **more)


def after(last: Chunk, base: StreamState | None = None) -> StreamState:
    state = State(np.ones(5, np.float32), np.zeros(0, np.int64))
    new = applied(last, base, state, fingerprint=FINGERPRINT, now_ms=7)
    return new if base else new._replace(head=replace(new.head, epoch=EPOCH))


FIRST, SECOND, APPEND = chunk(0), chunk(4, seed=1), chunk(None)
STREAM = after(FIRST)
BEGIN = chunk(0, seed=7, starts_over=True)
AFTER_BEGIN = after(BEGIN)
RESTORED = start_epoch(STREAM, fingerprint=FINGERPRINT, now_ms=9)
AT_0 = start_epoch(STREAM, fingerprint=FINGERPRINT, now_ms=9, position=0)
ANY, STALE = Precondition(any_state=True), Precondition(("other",))
CURRENT = Precondition((STREAM.head.etag, "other"))
EVENTS = Chunk(
    KEY, Steps(Feed.EVENTS, 1, COLUMNS), chunk_digest(SCHEMA, Steps(Feed.EVENTS, 1, COLUMNS)), 4
)


@pytest.mark.parametrize(
    ("sent", "stored", "expected"),
    [
        # a new stream
        (APPEND, None, Process(None)),
        (FIRST, None, Process(None)),
        # the next chunk, and an append
        (SECOND, STREAM, Process(STREAM)),
        (APPEND, STREAM, Process(STREAM)),
        (replace(SECOND, epoch=EPOCH), STREAM, Process(STREAM)),
        (replace(SECOND, precondition=CURRENT), STREAM, Process(STREAM)),
        # a retry of the last chunk, which comes before If-Match; an append is none
        (FIRST, STREAM, Replay(STREAM)),
        (replace(FIRST, precondition=STALE), STREAM, Replay(STREAM)),
        (APPEND, after(APPEND), Process(after(APPEND))),
        # a start over: from the initial state, whatever is stored
        (BEGIN, None, Process(None)),
        (BEGIN, STREAM, Process(None)),
        (BEGIN, STREAM._replace(feed=Feed.EVENTS), Process(None)),
        (replace(BEGIN, position=None), STREAM, Process(None)),
        (replace(BEGIN, epoch=EPOCH), STREAM, Process(None)),
        (BEGIN, AFTER_BEGIN, Replay(AFTER_BEGIN)),
        (replace(BEGIN, position=None), AFTER_BEGIN, Process(None)),
        # no retry: the chunk continued a restored state
        (BEGIN, after(BEGIN, AT_0), Process(None)),
    ],
)
def test_chunk_is_processed_or_replayed(
    sent: Chunk, stored: StreamState | None, expected: Process | Replay
) -> None:
    evaluation = evaluate_chunk(sent, stored)
    assert type(evaluation) is type(expected)
    if isinstance(evaluation, Process) and isinstance(expected, Process):
        assert (evaluation.base is None) == (expected.base is None)
    for closed in (False, True):
        if sent.starts_over or isinstance(expected, Replay):
            assert type(evaluate_chunk(sent, stored, closed=closed)) is type(expected)


@pytest.mark.parametrize(
    ("sent", "stored", "error", "position"),
    [
        (chunk(9), None, PositionAhead, 0),
        (chunk(5), STREAM, PositionAhead, 4),
        (chunk(0, seed=1), STREAM, PositionBehind, 4),
        (FIRST, after(SECOND, STREAM), PositionBehind, 8),
        (FIRST, RESTORED, PositionBehind, 4),
        (chunk(0, epoch=OTHER_EPOCH), None, EpochMismatch, 0),
        (chunk(0, epoch=OTHER_EPOCH), STREAM, EpochMismatch, 4),
        (replace(BEGIN, epoch=OTHER_EPOCH), None, EpochMismatch, 0),
        (replace(BEGIN, epoch=OTHER_EPOCH), STREAM, EpochMismatch, 4),
        (replace(SECOND, precondition=STALE), STREAM, StateChanged, 4),
        (replace(APPEND, precondition=ANY), None, StateChanged, 0),
        (replace(BEGIN, precondition=STALE), STREAM, StateChanged, 4),
        (EVENTS, STREAM, InputKindMismatch, 4),
    ],
)
def test_chunk_is_rejected_with_the_stream_head(
    sent: Chunk, stored: StreamState | None, error: type[Exception], position: int
) -> None:
    with pytest.raises(error) as caught:
        evaluate_chunk(sent, stored)
    facts: Any = caught.value.facts  # type: ignore[attr-defined]
    assert (facts["stream"], facts["position"]) == (KEY.stream, position)
    assert facts["tag"] == (None if stored is None else stored.head.tag.hex())
    if error in (PositionAhead, PositionBehind):
        assert (facts["expected"], facts["got"]) == (position, sent.position)


def test_closed_stream_rejects_further_chunks() -> None:
    with pytest.raises(StreamFinal):
        evaluate_chunk(SECOND, STREAM, closed=True)


def test_digest_and_tag_match_their_definition() -> None:
    steps = rows(4)
    assert steps.rows is not None
    count = (4).to_bytes(8, "little")
    rows_bytes = steps.rows.astype("<f4").tobytes()

    def sha256(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    expected = sha256(b"I", count, rows_bytes)
    assert chunk_digest(None, steps) == expected
    assert chunk_digest(None, steps, b"a" * 16) == sha256(b"I", count, rows_bytes, b"a" * 16)
    optioned = replace(steps, resets=(1, 3), false_alarms_per_day=0.5)
    options = b"A" + struct.pack("<d", 0.5) + b"R" + struct.pack("<QQQ", 2, 1, 3)
    assert chunk_digest(None, optioned, final=True) == sha256(options, b"i", count, rows_bytes)
    events = sha256(b"E", (1).to_bytes(8, "little"), canonical_bytes(SCHEMA, COLUMNS))
    assert EVENTS.digest == events
    chained = hashlib.sha256(b"\x05" * 16 + struct.pack("<Q", 12) + expected).digest()[:16]
    assert next_tag(b"\x05" * 16, 12, expected) == chained


def test_applied_chunk_changes_position_tag_and_last_chunk() -> None:
    second = chunk(4, count=3, seed=1)
    moved = after(second, STREAM)
    assert moved.head == StreamHead(EPOCH, next_tag(STREAM.head.tag, 4, second.digest), 7)
    assert moved.last == LastChunk(4, second.digest[:16])
    assert (RESTORED.head.position, RESTORED.head.tag, RESTORED.last) == (4, bytes(16), None)
    assert RESTORED.head.epoch != EPOCH


@pytest.mark.parametrize(
    ("options", "continues"),
    [
        ({}, True),
        ({"position": 4, "epoch": EPOCH, "precondition": CURRENT}, True),
        ({"precondition": ANY}, True),
        ({"position": 3}, False),
        ({"epoch": OTHER_EPOCH}, False),
        ({"precondition": STALE}, False),
        ({"starts_over": True}, False),
        ({"starts_over": True, "precondition": CURRENT}, False),
    ],
)
def test_chunk_certainly_continues_a_cached_state(options: dict[str, Any], continues: bool) -> None:
    assert is_continuation(chunk(**options), STREAM.head, STREAM.feed) == continues
    assert not is_continuation(chunk(**options), STREAM.head, Feed.EVENTS)


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({"starts_over": True}, True),
        ({}, False),
        ({"starts_over": True, "position": 0}, False),
        ({"starts_over": True, "epoch": EPOCH}, False),
        ({"starts_over": True, "precondition": ANY}, False),
    ],
)
def test_chunk_starts_its_stream_over_whatever_is_stored(
    options: dict[str, Any], starts: bool
) -> None:
    assert always_starts(replace(APPEND, **options)) == starts


@pytest.mark.parametrize(
    ("sent", "current", "resolution"),
    [
        (SECOND, STREAM.head, Resolution.STORED_REPLY),
        (APPEND, STREAM.head, Resolution.OWN_REPLY),
        (SECOND, AFTER_BEGIN.head, Resolution.RE_EVALUATE),
        (APPEND, None, Resolution.RE_EVALUATE),
    ],
)
def test_version_conflict_is_resolved_by_the_current_head(
    sent: Chunk, current: StreamHead | None, resolution: Resolution
) -> None:
    assert resolve_conflict(sent, STREAM.head, current) is resolution


def test_retry_is_answered_by_the_reply_of_its_own_chunk() -> None:
    outputs = np.zeros((4, 1), np.float32)
    kept, other = StoredReply(STREAM.head, outputs), StoredReply(AFTER_BEGIN.head, outputs)
    assert resolve_duplicate(FIRST, STREAM, kept, None) is Resolution.STORED_REPLY
    assert resolve_duplicate(FIRST, STREAM, other, STREAM.head) is Resolution.OWN_REPLY
    assert resolve_duplicate(SECOND, STREAM, kept, None) is Resolution.RE_EVALUATE
    for no_reply in (None, other):
        with pytest.raises(AlreadyApplied):
            resolve_duplicate(FIRST, STREAM, no_reply, AFTER_BEGIN.head)
