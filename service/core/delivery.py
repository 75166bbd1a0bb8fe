"""The rules of exactly-once delivery, as pure functions.

`judge` is the idempotency table: given a chunk and the stream as the store has it, either
the chunk is to be processed, or the stored reply is its answer, or it is refused. `advance`
says what a processed chunk makes of the stream; `after_conflict` and `answer_retry` say what
becomes of a chunk whose stream was moved on meanwhile, and of one that was applied before. A
model of the protocol explores these same functions (`tests/protocol`).

Digest and tag are defined here and nowhere else; `docs/reference/protocol.md` repeats their bytes
for clients:

    digest = SHA-256(kind, T as uint64 LE, canonical bytes, nonce)      32 bytes
    tag    = SHA-256(previous tag, start as uint64 LE, digest)[:16]     16 bytes

`kind` is the byte `I` (inputs) or `E` (events), in lower case for a final chunk; the canonical
bytes are float32 LE, row by row, or those of `models.events.columns.canonical_bytes`; the nonce is
16 random bytes for a chunk without a position and empty otherwise, so that two equal appends never
share a tag.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from enum import Enum

import numpy as np

from models.events.columns import canonical_bytes
from models.events.schema import EventSchema
from models.spec.state import State
from service.core.errors import (
    AlreadyApplied,
    EpochMismatch,
    InputKindMismatch,
    PositionAhead,
    PositionBehind,
    StateChanged,
    StreamExists,
    StreamFinal,
)
from service.core.values import (
    DIGEST_BYTES,
    EPOCH_BYTES,
    FIRST_TAG,
    TAG_BYTES,
    Chunk,
    LastChunk,
    Steps,
    StoredReply,
    StreamHead,
    StreamState,
)

NONCE_BYTES = 16
_F4 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Process:
    """The chunk is to be processed.

    Attributes:
        base: the stream it continues, or None where it begins one.
    """

    base: StreamState | None


@dataclass(frozen=True, slots=True)
class Replay:
    """The chunk is the stream's last one; its stored reply, if it is kept, is the answer."""

    found: StreamState


class Answer(Enum):
    """Which answer a chunk gets that was not simply written."""

    STORED = "the stored reply"
    OWN = "what this worker computed for it"
    ANEW = "none yet: it is judged anew"


def new_epoch() -> bytes:
    """A random epoch."""
    return secrets.token_bytes(EPOCH_BYTES)


def new_nonce() -> bytes:
    """The nonce of an append."""
    return secrets.token_bytes(NONCE_BYTES)


def chunk_digest(
    schema: EventSchema | None, steps: Steps, nonce: bytes = b"", *, final: bool = False
) -> bytes:
    """SHA-256 over the canonical form of decoded events or rows, 32 bytes."""
    if steps.columns is not None and schema is not None:
        kind, canonical = b"E", canonical_bytes(schema, steps.columns)
    elif steps.rows is not None:
        kind, canonical = b"I", steps.rows.astype(_F4, copy=False).tobytes()
    else:
        raise ValueError("expected columns under a schema, or rows")
    if final:
        kind = kind.lower()
    count = steps.length.to_bytes(8, "little")
    return hashlib.sha256(kind + count + canonical + nonce).digest()


def next_tag(tag: bytes, start: int, digest: bytes) -> bytes:
    """The tag after a chunk that began at `start`."""
    return hashlib.sha256(tag + start.to_bytes(8, "little") + digest).digest()[:TAG_BYTES]


def standing(stream: str, head: StreamHead | None) -> dict[str, object]:
    """The facts every refusal carries: where the stream stands."""
    if head is None:
        return {"stream": stream, "epoch": None, "position": 0, "tag": None}
    return {
        "stream": stream,
        "epoch": head.epoch.hex(),
        "position": head.position,
        "tag": head.tag.hex(),
    }


def judge(chunk: Chunk, found: StreamState | None, *, closed: bool = False) -> Process | Replay:
    """The idempotency table, row by row.

    Args:
        chunk: what was sent.
        found: the stream as the store has it (or a copy that the commit will check).
        closed: a final chunk ended it.

    Raises:
        EpochMismatch, StateChanged, StreamFinal, InputKindMismatch, PositionAhead,
            PositionBehind: the chunk is refused; the stream is unchanged.
    """
    stream, head = chunk.key.stream, found.head if found else None
    facts = standing(stream, head)
    if chunk.epoch is not None and (head is None or chunk.epoch != head.epoch):
        stands = "has no epoch, it does not exist" if head is None else f"is in {head.epoch.hex()}"
        raise EpochMismatch(
            f"expected stream {stream!r} in epoch {chunk.epoch.hex()}; it {stands}", **facts
        )
    if found is not None and _is_last(chunk, found):
        return Replay(found)
    check_precondition(chunk, head)
    if closed:
        raise StreamFinal(f"stream {stream!r} was ended by a final chunk", **facts)
    if found is not None and found.feed is not chunk.steps.feed:
        raise InputKindMismatch(
            f"stream {stream!r} is fed by `{found.feed}`, got `{chunk.steps.feed}`",
            expected=str(found.feed),
            got=str(chunk.steps.feed),
            **facts,
        )
    check_position(stream, chunk.position, head)
    return Process(found)


def check_position(stream: str, given: int | None, head: StreamHead | None) -> None:
    """Refuse a position at which the stream does not stand; None stands anywhere.

    Args:
        head: the stream, or None where there is none, which stands at 0.

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
        **standing(stream, head),
    )


def continues(chunk: Chunk, copy: StreamState) -> bool:
    """Whether the chunk would simply be processed from this copy of its stream: what `judge`
    says in the usual case, at a fraction of its cost. False says nothing."""
    head = copy.head
    return (
        (chunk.position is None or chunk.position == head.position)
        and copy.feed is chunk.steps.feed
        and (chunk.epoch is None or chunk.epoch == head.epoch)
        and chunk.precondition is None
    )


def after_conflict(chunk: Chunk, new: StreamHead, found: StreamHead | None) -> Answer:
    """What becomes of a chunk whose commit of `new` found its stream at another head than
    expected, `found` (None: no stream).

    Found at the very head the commit writes: by a nonce only this commit can have written it
    (its answer was lost); without one, a duplicate of the chunk may have.
    """
    if found != new:
        return Answer.ANEW
    return Answer.OWN if chunk.position is None else Answer.STORED


def answer_retry(
    chunk: Chunk,
    found: StreamState | None,
    kept: StoredReply | None,
    own: StreamHead | None,
    *,
    closed: bool = False,
) -> Answer:
    """The answer to a chunk that was found to be its stream's last one.

    Args:
        found: the stream, and `kept` its reply, read together.
        own: the head after the chunk where this worker computed it too; else None.
        closed: as for `judge`.

    Raises:
        AlreadyApplied: it was applied, and its reply is not kept.
        EpochMismatch, ...: as `judge`; the stream changed meanwhile.
    """
    verdict = judge(chunk, found, closed=closed)
    if isinstance(verdict, Process):
        return Answer.ANEW
    head = verdict.found.head
    if kept is not None and kept.head == head:
        return Answer.STORED
    if own == head:
        return Answer.OWN
    raise already_applied(chunk.key.stream, head)


def _is_last(chunk: Chunk, found: StreamState) -> bool:
    return (
        chunk.position is not None
        and found.last is not None
        and chunk.position == found.last.start
        and chunk.digest[:DIGEST_BYTES] == found.last.digest
    )


def check_precondition(chunk: Chunk, head: StreamHead | None) -> None:
    """Raise StateChanged where the chunk's If-Match does not hold."""
    if chunk.precondition is not None and not chunk.precondition.holds(head):
        raise state_changed(chunk.key.stream, head)


def state_changed(stream: str, head: StreamHead | None) -> StateChanged:
    """The refusal of an If-Match that names another state."""
    stands = "does not exist" if head is None else f'is at "{head.etag}"'
    return StateChanged(
        f"If-Match does not name the state of stream {stream!r}, which {stands}",
        **standing(stream, head),
    )


def stream_exists(stream: str, head: StreamHead) -> StreamExists:
    """The refusal to overwrite a stream without If-Match."""
    return StreamExists(
        f'stream {stream!r} exists at position {head.position}; send If-Match: "{head.etag}" '
        "to overwrite it",
        **standing(stream, head),
    )


def already_applied(stream: str, head: StreamHead) -> AlreadyApplied:
    """The answer to a retry whose reply is no longer kept."""
    return AlreadyApplied(
        f"the chunk was applied to stream {stream!r}, which stands at {head.position}; "
        "its reply is not kept (too large, or expired)",
        expected=head.position,
        **standing(stream, head),
    )


def advance(
    chunk: Chunk, base: StreamState | None, state: State, *, fingerprint: bytes, now_ms: int
) -> StreamState:
    """The stream after a processed chunk.

    Args:
        base: the stream before, or None where the chunk begins it, in a new epoch.
        state: the network's and the encoder's state after the chunk.
    """
    epoch, tag, start = base.head if base else (new_epoch(), FIRST_TAG, 0)
    steps, digest = chunk.steps, chunk.digest
    return StreamState(
        StreamHead(epoch, next_tag(tag, start, digest), start + steps.length),
        steps.feed,
        fingerprint,
        LastChunk(start, digest[:DIGEST_BYTES], base is not None and start == 0),
        now_ms,
        state,
    )


def begin_anew(
    source: StreamState, *, fingerprint: bytes, now_ms: int, position: int | None = None
) -> StreamState:
    """A restored or forked stream: a new epoch, no last chunk, the same state and feed."""
    return StreamState(
        head=StreamHead(
            new_epoch(), FIRST_TAG, source.head.position if position is None else position
        ),
        feed=source.feed,
        fingerprint=fingerprint,
        last=None,
        updated_ms=now_ms,
        state=source.state,
    )
