"""The idempotency table, row by row; digest and tag against their definitions."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from models.events.schema import EventSchema
from models.spec.state import State
from service.core.delivery import (
    Process,
    Replay,
    chunk_digest,
    evaluate_chunk,
    is_continuation,
    next_tag,
    start_epoch,
)
from service.core.errors import (
    EpochMismatch,
    InputKindMismatch,
    PositionAhead,
    PositionBehind,
    StateChanged,
)
from service.core.values import (
    Chunk,
    Feed,
    LastChunk,
    Precondition,
    Steps,
    StreamHead,
    StreamKey,
    StreamState,
)
from tests.support.streams import applied
from tests.support.strict_events import columns_from_events

EPOCH, OTHER_EPOCH = b"\x01" * 8, b"\x02" * 8
FINGERPRINT = b"\x03" * 16
KEY = StreamKey("flights", "EWR-UA")


def rows(count: int, seed: int = 0) -> Steps:
    values = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    return Steps(Feed.INPUTS, count, rows=values)


def chunk(position: int | None = None, count: int = 4, seed: int = 0, **more: Any) -> Chunk:
    steps = rows(count, seed)
    return Chunk(KEY, steps, chunk_digest(None, steps), position=position, **more)


def continues(candidate: Chunk) -> bool:
    return is_continuation(candidate, STREAM.head, STREAM.feed)


def after(last: Chunk, base: StreamState | None = None) -> StreamState:
    state = State(np.ones(5, np.float32), np.zeros(0, np.int64))
    new = applied(last, base, state, fingerprint=FINGERPRINT, now_ms=7)
    return new if base else new._replace(head=replace(new.head, epoch=EPOCH))


FIRST = chunk(0)
STREAM = after(FIRST)


def test_first_chunk_creates_a_stream_without_position_or_at_0() -> None:
    assert evaluate_chunk(chunk(None), None) == Process(None)
    assert evaluate_chunk(chunk(0), None) == Process(None)


def test_missing_stream_expects_position_0() -> None:
    with pytest.raises(PositionAhead) as caught:
        evaluate_chunk(chunk(9), None)
    assert caught.value.facts["expected"] == 0
    assert caught.value.facts["got"] == 9


def test_next_chunk_and_append_continue_the_stream() -> None:
    assert evaluate_chunk(chunk(4, seed=1), STREAM) == Process(STREAM)
    assert evaluate_chunk(chunk(None), STREAM) == Process(STREAM)


def test_retry_of_the_last_chunk_is_replayed() -> None:
    assert evaluate_chunk(FIRST, STREAM) == Replay(STREAM)


def test_equal_append_is_never_replayed() -> None:
    steps = rows(4)
    append = Chunk(KEY, steps, chunk_digest(None, steps, b"n" * 16))
    stream = after(append)
    assert evaluate_chunk(append, stream) == Process(stream)


def test_other_events_at_the_last_start_are_position_behind() -> None:
    with pytest.raises(PositionBehind) as caught:
        evaluate_chunk(chunk(0, seed=1), STREAM)
    assert caught.value.facts["expected"] == 4


def test_chunk_before_the_last_is_position_behind() -> None:
    second = after(chunk(4, seed=1), STREAM)
    with pytest.raises(PositionBehind) as caught:
        evaluate_chunk(FIRST, second)
    assert caught.value.facts["expected"] == 8
    assert caught.value.facts["tag"] == second.head.tag.hex()


def test_gap_is_position_ahead() -> None:
    with pytest.raises(PositionAhead) as caught:
        evaluate_chunk(chunk(5), STREAM)
    assert caught.value.facts["expected"] == 4


@pytest.mark.parametrize("found", [None, STREAM])
def test_epoch_mismatch_takes_precedence(found: StreamState | None) -> None:
    with pytest.raises(EpochMismatch):
        evaluate_chunk(chunk(0, epoch=OTHER_EPOCH), found)
    assert evaluate_chunk(chunk(4, epoch=EPOCH), STREAM) == Process(STREAM)


def test_replay_takes_precedence_over_if_match() -> None:
    stale = Precondition((StreamHead(EPOCH, b"\x09" * 16, 0).etag,))
    assert evaluate_chunk(chunk(0, precondition=stale), STREAM) == Replay(STREAM)
    with pytest.raises(StateChanged):
        evaluate_chunk(chunk(4, seed=1, precondition=stale), STREAM)
    with pytest.raises(StateChanged):
        evaluate_chunk(chunk(None, precondition=Precondition(any_state=True)), None)
    current = Precondition((STREAM.head.etag,))
    assert evaluate_chunk(chunk(4, seed=1, precondition=current), STREAM) == Process(STREAM)


def test_stream_keeps_its_kind_of_input() -> None:
    schema = EventSchema.model_validate({"fields": [{"kind": "boolean", "name": "late"}]})
    columns = columns_from_events(schema, [{"late": True}])
    steps = Steps(Feed.EVENTS, 1, columns=columns)
    with pytest.raises(InputKindMismatch):
        evaluate_chunk(Chunk(KEY, steps, chunk_digest(schema, steps), position=4), STREAM)


def test_digest_and_tag_match_their_definition() -> None:
    steps = rows(4)
    assert steps.rows is not None
    kind_and_count = b"I" + (4).to_bytes(8, "little")
    expected = hashlib.sha256(kind_and_count + steps.rows.astype("<f4").tobytes()).digest()
    assert chunk_digest(None, steps) == expected
    chained = hashlib.sha256(b"\x05" * 16 + struct.pack("<Q", 12) + expected).digest()[:16]
    assert next_tag(b"\x05" * 16, 12, expected) == chained
    assert chunk_digest(None, steps, b"a" * 16) != chunk_digest(None, steps, b"b" * 16)


def test_applied_chunk_changes_position_tag_and_last_chunk() -> None:
    second = chunk(4, count=3, seed=1)
    moved = after(second, STREAM)
    assert moved.head == StreamHead(EPOCH, next_tag(STREAM.head.tag, 4, second.digest), 7)
    assert moved.last == LastChunk(4, second.digest[:16])


def test_restored_stream_starts_an_epoch_without_last_chunk() -> None:
    restarted = start_epoch(STREAM, fingerprint=FINGERPRINT, now_ms=9)
    assert restarted.head.position == 4
    assert restarted.head.epoch != EPOCH
    assert restarted.head.tag == bytes(16)
    assert restarted.last is None
    with pytest.raises(PositionBehind):
        evaluate_chunk(FIRST, restarted)


def test_start_over_applies_from_the_zero_state_whatever_is_stored() -> None:
    for stored in (None, STREAM, STREAM._replace(feed=Feed.EVENTS)):
        for position in (None, 0):
            begin = chunk(position, seed=7, starts_over=True)
            assert evaluate_chunk(begin, stored) == Process(None)
    assert evaluate_chunk(chunk(0, seed=7, starts_over=True), STREAM, closed=True) == Process(None)


def test_retry_of_a_start_over_is_replayed() -> None:
    begin = chunk(0, seed=7, starts_over=True)
    stream = after(begin)
    assert evaluate_chunk(begin, stream) == Replay(stream)
    assert evaluate_chunk(replace(begin, epoch=OTHER_EPOCH), stream) == Replay(stream)


def test_start_over_is_no_retry_of_a_chunk_that_continued_a_state() -> None:
    begin = chunk(0, seed=7, starts_over=True)
    restored = start_epoch(STREAM, fingerprint=FINGERPRINT, now_ms=7, position=0)
    assert evaluate_chunk(begin, after(begin, restored)) == Process(None)
    without_position = chunk(None, seed=7, starts_over=True)
    assert evaluate_chunk(without_position, after(begin)) == Process(None)


def test_start_over_with_an_epoch_ends_that_epoch_only() -> None:
    assert evaluate_chunk(chunk(0, starts_over=True, seed=1, epoch=EPOCH), STREAM) == Process(None)
    for stored in (None, STREAM):
        with pytest.raises(EpochMismatch):
            evaluate_chunk(chunk(0, starts_over=True, seed=1, epoch=OTHER_EPOCH), stored)


def test_chunk_continues_a_cached_state_if_its_precondition_holds() -> None:
    current = Precondition((STREAM.head.etag, "other"))
    assert continues(chunk(None, precondition=current))
    assert is_continuation(
        chunk(None, precondition=Precondition(any_state=True)), STREAM.head, STREAM.feed
    )
    assert not is_continuation(
        chunk(None, precondition=Precondition(("other",))), STREAM.head, STREAM.feed
    )
    assert not is_continuation(
        chunk(None, precondition=current, starts_over=True), STREAM.head, STREAM.feed
    )


def test_start_over_never_continues_a_cached_state() -> None:
    assert continues(chunk(None))
    assert not continues(chunk(None, starts_over=True))
