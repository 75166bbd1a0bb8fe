"""Exactly-once delivery by optimistic concurrency: the idempotency rules, as pure functions.

Every chunk is evaluated against the stream as the store has it, computed, and committed by a
compare-and-set on the stream head (epoch and tag). In the order in which a chunk meets them:

    evaluate_chunk      process it, replay the stored reply, or reject it
    next_head           the stream head after a processed chunk, with its `last_chunk`
    resolve_conflict    a version conflict: another commit changed the stream first
    resolve_duplicate   the chunk is a retry of one that was applied

The model checker in `tests/protocol` explores these same functions.

Digest and tag are defined here only; `docs/reference/protocol.md` documents their bytes:

    digest = SHA-256(kind, T as uint64 LE, canonical bytes, nonce)      32 bytes
    tag    = SHA-256(previous tag, start as uint64 LE, digest)[:16]     16 bytes

`kind` is the byte `I` (inputs) or `E` (events), in lower case for a final chunk. In a chunk with R
explicit resets the byte `R`, R as uint64 LE and their ascending indexes as uint64 LE precede it:
other resets make another chunk. (Resets by `reset_every` and session gaps follow from the stream
and are not part of it.) In a chunk with `false_alarms_per_day` the byte `A` and the rate as float64
LE precede all of these. The canonical bytes are float32 LE, row by row, or those of
`models.events.columns.canonical_bytes`; the nonce is 16 random bytes for a chunk without a position
and empty otherwise, so that two equal appends never share a tag.

An acknowledgement of an alarm has the kind `K`, no events and no position of its own: it leads to
another tag at the same position. So a cached state of before is never continued, and an If-Match
with the tag before names the state after it too: a producer does not notice.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from models.events.columns import canonical_bytes
from models.events.schema import EventSchema
from service.core.errors import (
    AlreadyApplied,
    Conflict,
    EpochMismatch,
    InputKindMismatch,
    PositionAhead,
    PositionBehind,
    StateChanged,
    StreamExists,
    StreamFinal,
    StreamNotFound,
)
from service.core.values import (
    DIGEST_BYTES,
    EPOCH_BYTES,
    FIRST_TAG,
    TAG_BYTES,
    Chunk,
    Feed,
    LastFields,
    Precondition,
    Steps,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
    Tombstone,
)

NONCE_BYTES = 16
ACKNOWLEDGEMENT: Final = hashlib.sha256(b"K" + bytes(8)).digest()
"""The digest of an acknowledgement of an alarm."""

_F4 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Process:
    """The chunk has to be processed.

    Attributes:
        base: the stream it continues; None if it creates one.
    """

    base: StreamState | None


@dataclass(frozen=True, slots=True)
class Replay:
    """The chunk is a retry of the stream's last one; the answer is the stored reply, if kept."""

    stored: StreamState


class Resolution(Enum):
    """How to answer a chunk that met a version conflict, or that was applied before."""

    STORED_REPLY = "with the reply in the store"
    OWN_REPLY = "with the reply that this worker computed"
    RE_EVALUATE = "not yet: evaluate it again, against the current stream"


def new_epoch() -> bytes:
    """A random epoch for a new stream."""
    return os.urandom(EPOCH_BYTES)


def new_nonce() -> bytes:
    """A random nonce for a chunk without a position."""
    return os.urandom(NONCE_BYTES)


def chunk_digest(
    schema: EventSchema | None, steps: Steps, nonce: bytes = b"", *, final: bool = False
) -> bytes:
    """SHA-256 over the canonical form of a chunk's events or rows and its options, 32 bytes."""
    columns, rows, resets = steps.columns, steps.rows, steps.resets
    if columns is not None and schema is not None:
        kind, canonical = b"E", canonical_bytes(schema, columns)
    elif rows is not None:
        # `astype` takes half a microsecond, also where it has nothing to do
        kind, canonical = b"I", (rows if rows.dtype is _F4 else rows.astype(_F4)).tobytes()
    else:
        raise ValueError("expected columns under a schema, or rows")
    if final:
        kind = kind.lower()
    if resets:
        kind = b"R" + struct.pack(f"<{len(resets) + 1}Q", len(resets), *resets) + kind
    if steps.false_alarms_per_day is not None:
        kind = b"A" + struct.pack("<d", steps.false_alarms_per_day) + kind
    count = steps.length.to_bytes(8, "little")
    return hashlib.sha256(kind + count + canonical + nonce).digest()


def next_tag(tag: bytes, start: int, digest: bytes) -> bytes:
    """The tag of the stream after a chunk that starts at position `start`."""
    return hashlib.sha256(tag + start.to_bytes(8, "little") + digest).digest()[:TAG_BYTES]


def acknowledged_head(head: StreamHead) -> StreamHead:
    """The stream head after an acknowledgement of its alarm."""
    tag = next_tag(head.tag, head.position, ACKNOWLEDGEMENT)
    return StreamHead(head.epoch, tag, head.position)


def names_state(precondition: Precondition, head: StreamHead | None) -> bool:
    """Whether an If-Match names the state of a stream, or that before its acknowledgement."""
    if head is None or precondition.holds(head):
        return head is not None
    for etag in precondition.etags:
        with suppress(ValueError):
            tag = bytes.fromhex(etag.rpartition("-")[2])
            before = StreamHead(head.epoch, tag, head.position)
            if before.etag == etag and acknowledged_head(before) == head:
                return True
    return False


def stream_facts(stream: str, head: StreamHead | None) -> dict[str, object]:
    """The current epoch, position and tag of a stream, which every rejection reports."""
    if head is None:
        return {"stream": stream, "epoch": None, "position": 0, "tag": None}
    return {
        "stream": stream,
        "epoch": head.epoch.hex(),
        "position": head.position,
        "tag": head.tag.hex(),
    }


def evaluate_chunk(
    chunk: Chunk, stored: StreamState | None, *, closed: bool = False
) -> Process | Replay:
    """Process, replay or reject a chunk: the idempotency table of the protocol, row by row.

    Args:
        stored: the stream as the store has it, or a cached copy that the commit will verify.
        closed: whether a final chunk ended the stream.

    Raises:
        EpochMismatch, StateChanged, StreamFinal, InputKindMismatch, PositionAhead,
            PositionBehind: the chunk is rejected; the stream is unchanged.
    """
    stream, head = chunk.key.stream, stored.head if stored else None
    if chunk.starts_over:
        return _evaluate_start(chunk, stored)
    _check_epoch(chunk, head)
    if stored is not None and _is_last(chunk, stored):
        return Replay(stored)
    check_precondition(stream, chunk.precondition, head)
    facts = stream_facts(stream, head)
    if closed:
        raise StreamFinal(f"stream {stream!r} was ended by a final chunk", **facts)
    if stored is not None and stored.feed is not chunk.steps.feed:
        raise InputKindMismatch(
            f"expected `{stored.feed}`, as in the first chunk of stream {stream!r}, "
            f"got `{chunk.steps.feed}`",
            expected=str(stored.feed),
            got=str(chunk.steps.feed),
            **facts,
        )
    check_position(stream, chunk.position, head)
    return Process(stored)


def _evaluate_start(chunk: Chunk, stored: StreamState | None) -> Process | Replay:
    """Process or replay a chunk that starts its stream over.

    It is a retry if the stream's last chunk is this one and created the stream: from the initial
    state it leads to the same state. Its epoch is the one that it ends, so with an epoch a late
    duplicate cannot end the next one.
    """
    last = stored.last if stored else None
    if stored is not None and last is not None and last.created and _is_last(chunk, stored):
        return Replay(stored)
    head = stored.head if stored else None
    _check_epoch(chunk, head)
    check_precondition(chunk.key.stream, chunk.precondition, head)
    return Process(None)


def _check_epoch(chunk: Chunk, head: StreamHead | None) -> None:
    if chunk.epoch is None or (head is not None and chunk.epoch == head.epoch):
        return
    stream = chunk.key.stream
    current = "it does not exist" if head is None else f"it is in epoch {head.epoch.hex()}"
    raise EpochMismatch(
        f"expected stream {stream!r} in epoch {chunk.epoch.hex()}; {current}",
        **stream_facts(stream, head),
    )


def check_position(stream: str, given: int | None, head: StreamHead | None) -> None:
    """Reject a position that is not the stream's current one; None matches any.

    Args:
        head: the head of the stream; None if there is no stream, whose position is 0.

    Raises:
        PositionAhead, PositionBehind
    """
    position = head.position if head else 0
    if given is None or given == position:
        return
    error = PositionAhead if given > position else PositionBehind
    raise error(
        f"expected position {position} of stream {stream!r}, got {given}",
        expected=position,
        got=given,
        **stream_facts(stream, head),
    )


def is_continuation(chunk: Chunk, head: StreamHead, feed: Feed) -> bool:
    """Whether the chunk certainly continues its stream at this head, so that it can be processed.

    The fast path of `evaluate_chunk`. False means that the chunk has to be evaluated.
    """
    return (
        (chunk.position is None or chunk.position == head.position)
        and feed is chunk.steps.feed
        and (chunk.epoch is None or chunk.epoch == head.epoch)
        and not chunk.starts_over
        and (chunk.precondition is None or chunk.precondition.holds(head))
    )


def always_starts(chunk: Chunk) -> bool:
    """Whether a chunk starts its stream over whatever is stored: it expects nothing of the stream,
    and without a position it is no retry. `evaluate_chunk` would process it in any case."""
    return (
        chunk.starts_over
        and chunk.position is None
        and chunk.epoch is None
        and chunk.precondition is None
    )


def resolve_conflict(chunk: Chunk, new: StreamHead, current: StreamHead | None) -> Resolution:
    """Resolve a version conflict: the commit of `new` met `current` instead.

    If `current` is `new`, this very chunk was applied. A chunk without a position has a nonce, so
    that only this commit can have written it (its response was lost); a chunk with a position may
    have been applied by a duplicate.

    Args:
        current: None if there is no stream.
    """
    if current != new:
        return Resolution.RE_EVALUATE
    return Resolution.OWN_REPLY if chunk.position is None else Resolution.STORED_REPLY


def resolve_duplicate(
    chunk: Chunk,
    stored: StreamState | None,
    kept: StoredReply | None,
    own: StreamHead | None,
    *,
    closed: bool = False,
) -> Resolution:
    """Resolve a retry of a stream's last chunk.

    Args:
        stored, kept: the stream and the reply of its last chunk, read together.
        own: the head after the chunk if this worker computed it too; else None.
        closed: as for `evaluate_chunk`.

    Raises:
        AlreadyApplied: the chunk was applied, and its reply is not kept.
        EpochMismatch, ...: as `evaluate_chunk`; the stream changed in the meantime.
    """
    evaluation = evaluate_chunk(chunk, stored, closed=closed)
    if isinstance(evaluation, Process):
        return Resolution.RE_EVALUATE
    head = evaluation.stored.head
    if kept is not None and head in (kept.head, acknowledged_head(kept.head)):
        return Resolution.STORED_REPLY
    if own == head:
        return Resolution.OWN_REPLY
    raise already_applied(chunk.key.stream, head)


def _is_last(chunk: Chunk, stored: StreamState) -> bool:
    return (
        chunk.position is not None
        and stored.last is not None
        and chunk.position == stored.last.start
        and chunk.digest[:DIGEST_BYTES] == stored.last.digest
    )


def check_precondition(
    stream: str, precondition: Precondition | None, head: StreamHead | None
) -> None:
    """Raise StateChanged if an If-Match does not name the state of the stream."""
    if precondition is not None and not names_state(precondition, head):
        raise state_changed(stream, head)


def check_stored(
    key: StreamKey, stored: StreamState | Tombstone | None, precondition: Precondition | None
) -> StreamHead | None:
    """Check an If-Match against what is stored; returns the stream's head, None without a stream.

    Raises:
        StateChanged: it does not name the state of the stream.
    """
    head = stored.head if isinstance(stored, StreamState) else None
    check_precondition(key.stream, precondition, head)
    return head


def state_changed(stream: str, head: StreamHead | None) -> StateChanged:
    """The error for an If-Match that names another state."""
    current = "which does not exist" if head is None else f'whose ETag is "{head.etag}"'
    return StateChanged(
        f"If-Match does not match stream {stream!r}, {current}",
        **stream_facts(stream, head),
    )


def stream_exists(stream: str, head: StreamHead) -> StreamExists:
    """The error for overwriting a stream without If-Match."""
    return StreamExists(
        f'stream {stream!r} exists at position {head.position}; send If-Match: "{head.etag}" '
        "to overwrite it",
        **stream_facts(stream, head),
    )


def stream_conflict(stream: str, attempts: int) -> Conflict:
    """The error for a stream that other writers kept changing."""
    return Conflict(
        f"other writers changed stream {stream!r} {attempts} times in a row", stream=stream
    )


def stream_not_found(key: StreamKey) -> StreamNotFound:
    """The error for a stream that does not exist."""
    return StreamNotFound(
        f"model {key.model!r} has no stream {key.stream!r}", **stream_facts(key.stream, None)
    )


def already_applied(stream: str, head: StreamHead) -> AlreadyApplied:
    """The error for a retry whose reply is no longer kept."""
    return AlreadyApplied(
        f"the chunk was applied to stream {stream!r}, whose position is {head.position}; "
        "its reply is not kept (too large, or expired)",
        expected=head.position,
        **stream_facts(stream, head),
    )


def next_head(chunk: Chunk, base: StreamHead | None) -> StreamHead:
    """The stream head after a processed chunk.

    Args:
        base: the head before; None if the chunk creates the stream, in a new epoch.
    """
    if base is None:
        base = StreamHead(new_epoch(), FIRST_TAG, 0)
    start = base.position
    tag = next_tag(base.tag, start, chunk.digest)
    return StreamHead(base.epoch, tag, start + chunk.steps.length)


def last_chunk(chunk: Chunk, base: StreamHead | None) -> LastFields:
    """What the stream keeps of a processed chunk, a `LastChunk`; `base` as for `next_head`."""
    start = base.position if base is not None else 0
    return start, chunk.digest[:DIGEST_BYTES], base is not None and start == 0


def start_epoch(
    source: StreamState, *, fingerprint: bytes, now_ms: int, position: int | None = None
) -> StreamState:
    """A restored or forked stream: the state and input kind of `source` in a new epoch."""
    return StreamState(
        head=StreamHead(
            new_epoch(), FIRST_TAG, source.head.position if position is None else position
        ),
        feed=source.feed,
        fingerprint=fingerprint,
        last=None,
        updated_ms=now_ms,
        state=source.state,
        since=source.since,
    )
