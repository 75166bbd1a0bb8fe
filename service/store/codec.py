"""Bytes of a stream in the store: the codec of its state and last reply.

A state, all little-endian, with M int64 values and N float32 values:

    offset  size  what
         0     4  magic "CRRY"
         4     1  format, 1
         5     1  flags: bit 0 the feed is `inputs` (else `events`), bit 1 there is a last chunk,
                  bit 2 the stream is deleted (a tombstone), bit 3 the last chunk starts at 0 and
                  did not create the stream
         6     2  M, u16
         8     4  N, u32
        12     4  CRC-32 over every other byte, u32
        16    16  fingerprint of the model that wrote it
        32     8  epoch
        40    16  tag
        56     8  position, u64
        64     8  start position of the last chunk, u64 (0 if there is none)
        72    16  digest of the last chunk, its first 16 bytes (0 if there is none)
        88     8  time of the commit, epoch milliseconds, i64
        96    8M  int64 values, then 4N bytes of float32 values

A tombstone is a header with bit 2 as its only flag, a random epoch and the checksum. All its other
fields are zero.

A reply, T steps of O outputs:

         0     4  magic "CRRP"
         4     1  format, 1
         5     3  zero
         8     4  T, u32
        12     4  O, u32
        16     4  CRC-32 over every other byte, u32
        20     8  epoch
        28    16  tag
        44     8  position, u64
        52   4TO  float32 values, step by step

Epoch and tag are adjacent so that a commit can compare them as 24 bytes. The decoder rejects
another magic or format, an unknown flag, a length that does not match the counts, a wrong checksum
and a number that is not finite. Nothing is unpickled. Decoded arrays are read-only views of the
bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.spec.state import State
from service.core.values import (
    DIGEST_BYTES,
    EPOCH_BYTES,
    FIRST_TAG,
    TAG_BYTES,
    Feed,
    FloatRows,
    LastChunk,
    LastFields,
    StoredReply,
    StreamHead,
    StreamState,
    Tombstone,
)

FORMAT: Final = 1
STATE_MAGIC: Final = b"CRRY"
REPLY_MAGIC: Final = b"CRRP"
FINGERPRINT_BYTES: Final = 16

# LEAD is the part before the checksum, REST the part behind it.
_STATE_LEAD = struct.Struct("<4sBBHI")
_STATE_REST = struct.Struct("<16s8s16sQQ16sq")
_STATE = struct.Struct("<4sBBHII16s8s16sQQ16sq")
_REPLY_LEAD = struct.Struct("<4sB3sII")
_HEAD = struct.Struct("<8s16sQ")
_REPLY = struct.Struct("<4sB3sIII8s16sQ")
HEADER_BYTES: Final = _STATE.size
_HEAD_OFFSET: Final = 32
_TIME_OFFSET: Final = 88
REPLY_HEADER_BYTES: Final = _REPLY.size
_STATE_CRC_OFFSET: Final = _STATE_LEAD.size
_REPLY_CRC_OFFSET: Final = _REPLY_LEAD.size
_FLOAT: Final = np.dtype("<f4")
_INT: Final = np.dtype("<i8")
_NO_DIGEST: Final = bytes(DIGEST_BYTES)
_NO_LAST: Final = (0, _NO_DIGEST, False)
_ZERO: Final = bytes(3)
_NO_INTS: Final = np.frombuffer(b"", _INT)

_FEED_IS_INPUTS: Final = 1
_HAS_LAST: Final = 2
_DELETED: Final = 4
_STREAM_EXISTED: Final = 8
_FLAGS_WITH_LAST: Final = tuple(
    _HAS_LAST | existed | feed for existed in (0, _STREAM_EXISTED) for feed in (0, _FEED_IS_INPUTS)
)
TOMBSTONE_PREFIX: Final = STATE_MAGIC + bytes((FORMAT, _DELETED))
"""The first bytes of every tombstone, and of no state."""


class CodecError(Exception):
    """Invalid bytes, or a value that cannot be encoded; the message gives the reason."""


def encode_states(
    feeds: Sequence[Feed],
    heads: Sequence[bytes],
    last: Sequence[LastFields | None],
    states: State,
    *,
    fingerprint: bytes,
    updated_ms: int,
) -> list[bytes]:
    """Encode many streams with states of the same size.

    Args:
        heads: packed.
        last: the last chunks, whose digests have 16 bytes.
        states: floats float32 [B, N] and ints int64 [B, M]. The caller checks that they are finite,
            for all at once.
        fingerprint: 16 bytes, of all streams.
        updated_ms: of all streams.

    Raises:
        CodecError: a value does not fit the layout.
    """
    floats, ints = states
    if floats.ndim != 2 or floats.dtype != _FLOAT or ints.ndim != 2 or ints.dtype != _INT:
        raise CodecError(
            f"expected float32 [B, N] and int64 [B, M], got {floats.dtype} {list(floats.shape)} "
            f"and {ints.dtype} {list(ints.shape)}"
        )
    int_size, float_size = 8 * ints.shape[1], 4 * floats.shape[1]
    float_bytes, int_bytes = floats.tobytes(), ints.tobytes()
    values: list[bytes] = []
    at = int_at = 0
    known: int | None = None
    try:
        updated = updated_ms.to_bytes(8, "little", signed=True)
        for feed, head, chunk in zip(feeds, heads, last, strict=True):
            start, digest, existed = chunk or _NO_LAST
            flags = _FEED_IS_INPUTS if feed is Feed.INPUTS else 0
            flags |= (_HAS_LAST if chunk else 0) | (_STREAM_EXISTED if existed else 0)
            if flags != known:
                known, (lead, crc) = flags, _state_lead(flags, ints.shape[1], floats.shape[1])
            end, int_end = at + float_size, int_at + int_size
            body = b"".join(
                (
                    fingerprint,
                    head,
                    start.to_bytes(8, "little"),
                    digest,
                    updated,
                    int_bytes[int_at:int_end],
                    float_bytes[at:end],
                )
            )
            at, int_at = end, int_end
            values.append(b"".join((lead, zlib.crc32(body, crc).to_bytes(4, "little"), body)))
    except (struct.error, OverflowError) as error:
        raise CodecError(f"a value is out of range: {error}") from error
    return values


def decode_states(values: Sequence[bytes], int_size: int, float_size: int) -> State:
    """The states of valid values of the same size: floats float32 [B, N] and ints int64 [B, M]."""
    joined = b"".join([value[HEADER_BYTES:] for value in values])
    rows = np.frombuffer(joined, _FLOAT).reshape(len(values), 2 * int_size + float_size)
    floats, ints = rows[:, 2 * int_size :], rows[:, : 2 * int_size].view(_INT)
    return State(np.ascontiguousarray(floats), ints)


@lru_cache(maxsize=256)
def _state_lead(flags: int, int_size: int, float_size: int) -> tuple[bytes, int]:
    """The part of a state before its checksum, and the checksum of this part."""
    lead = _STATE_LEAD.pack(STATE_MAGIC, FORMAT, flags, int_size, float_size)
    return lead, zlib.crc32(lead)


def encode_state(stream: StreamState) -> bytes:
    """Encode one stream.

    Raises:
        CodecError: a value does not fit the layout.
    """
    floats, ints = stream.state
    last, fingerprint = stream.last, stream.fingerprint
    if len(fingerprint) != FINGERPRINT_BYTES or (last and len(last.digest) != DIGEST_BYTES):
        raise CodecError(
            f"expected {FINGERPRINT_BYTES} bytes of the fingerprint and {DIGEST_BYTES} of the "
            f"digest, got {len(fingerprint)} and {len(last.digest) if last else 'none'}"
        )
    return encode_states(
        [stream.feed],
        [pack_head(stream.head)],
        [last],
        State(floats[np.newaxis], ints[np.newaxis]),
        fingerprint=fingerprint,
        updated_ms=stream.updated_ms,
    )[0]


def encode_tombstone(tombstone: Tombstone) -> bytes:
    """Encode a tombstone.

    Raises:
        CodecError: the head is not a tombstone's.
    """
    epoch, tag = tombstone.head.epoch, tombstone.head.tag
    if len(epoch) != EPOCH_BYTES or tag != FIRST_TAG or tombstone.head.position != 0:
        raise CodecError("expected an epoch, the first tag and position 0 of a tombstone")
    lead = _STATE_LEAD.pack(STATE_MAGIC, FORMAT, _DELETED, 0, 0)
    no_fingerprint = bytes(FINGERPRINT_BYTES)
    return _join_with_checksum(
        lead, _STATE_REST.pack(no_fingerprint, epoch, tag, 0, 0, _NO_DIGEST, 0)
    )


def decode_state(value: bytes) -> StreamState | Tombstone:
    """Decode a stream or a tombstone.

    Raises:
        CodecError: the bytes are not a complete, undamaged stream or tombstone of a known format.
    """
    if len(value) < HEADER_BYTES:
        raise CodecError(f"expected at least {HEADER_BYTES} bytes, got {len(value)}")
    (
        magic,
        format_,
        flags,
        int_size,
        float_size,
        crc,
        fingerprint,
        epoch,
        tag,
        position,
        start,
        digest,
        updated_ms,
    ) = _STATE.unpack_from(value)
    _check_format(magic, STATE_MAGIC, format_)
    if flags & ~(_FEED_IS_INPUTS | _HAS_LAST | _STREAM_EXISTED):
        if flags == _DELETED:
            return _decode_tombstone(value, StreamHead(epoch, tag, position))
        raise CodecError(f"unknown flags 0x{flags:02x}")
    _check_integrity(value, HEADER_BYTES + 8 * int_size + 4 * float_size, _STATE_CRC_OFFSET, crc)
    has_last = bool(flags & _HAS_LAST)
    stream_existed = bool(flags & _STREAM_EXISTED)
    if not has_last and (start or any(digest) or stream_existed):
        raise CodecError("a last chunk is given, but the flags say there is none")
    ints = np.frombuffer(value, _INT, int_size, HEADER_BYTES) if int_size else _NO_INTS
    floats = _floats(value, float_size, HEADER_BYTES + 8 * int_size)
    return StreamState(
        head=StreamHead(epoch, tag, position),
        feed=Feed.INPUTS if flags & _FEED_IS_INPUTS else Feed.EVENTS,
        fingerprint=fingerprint,
        last=LastChunk(start, digest, stream_existed) if has_last else None,
        updated_ms=updated_ms,
        state=State(floats, ints),
        value=value,
    )


def read_heads(
    values: Sequence[bytes], fingerprint: bytes, int_size: int, float_size: int
) -> list[tuple[StreamHead, Feed] | None]:
    """The heads and feeds of streams that a model wrote; the fast path of `decode_state`.

    None does not mean that a value is damaged, but that it has to be decoded.

    Args:
        values: what is stored.
        fingerprint: of the model.
        int_size, float_size: of its states.
    """
    leads = {
        lead: (crc, Feed.INPUTS if flags & _FEED_IS_INPUTS else Feed.EVENTS)
        for flags in _FLAGS_WITH_LAST
        for lead, crc in [_state_lead(flags, int_size, float_size)]
    }
    size, at = HEADER_BYTES + 8 * int_size + 4 * float_size, _STATE_CRC_OFFSET
    heads: list[tuple[StreamHead, Feed] | None] = []
    floats: list[bytes] = []
    for value in values:
        head, known = None, leads.get(value[:at])
        if known is not None and len(value) == size and value[at + 4 : _HEAD_OFFSET] == fingerprint:
            crc, feed = known
            if value[at : at + 4] == zlib.crc32(value[at + 4 :], crc).to_bytes(4, "little"):
                head = StreamHead(*_HEAD.unpack_from(value, _HEAD_OFFSET)), feed
                floats.append(value[size - 4 * float_size :])
        heads.append(head)
    rows = np.frombuffer(b"".join(floats), _FLOAT)
    return heads if _are_finite(rows) else [None] * len(values)


def _decode_tombstone(value: bytes, head: StreamHead) -> Tombstone:
    tombstone = Tombstone(head)
    if value != encode_tombstone(tombstone):
        raise CodecError("a tombstone has fields other than its epoch")
    return tombstone


def decode_head(header: bytes) -> StreamHead | None:
    """Decode the head of a stream from its first 96 bytes; None for a tombstone.

    The checksum is not verified.

    Raises:
        CodecError: the bytes are not the header of a stream.
    """
    if len(header) < HEADER_BYTES:
        raise CodecError(f"expected {HEADER_BYTES} bytes, got {len(header)}")
    fields = _STATE.unpack_from(header)
    _check_format(fields[0], STATE_MAGIC, fields[1])
    if fields[2] == _DELETED:
        return None
    return StreamHead(fields[7], fields[8], fields[9])


class StateSummary(NamedTuple):
    """Size of a stored state, and wall clock of its commit in epoch milliseconds."""

    size_bytes: int
    updated_ms: int


def summarize_state(header: bytes) -> StateSummary | None:
    """Summarize a state by its first 96 bytes; None for a tombstone and for other bytes."""
    if len(header) < HEADER_BYTES:
        return None
    fields = _STATE.unpack_from(header)
    if fields[0] != STATE_MAGIC or fields[2] == _DELETED:
        return None
    size_bytes = HEADER_BYTES + fields[3] * _INT.itemsize + fields[4] * _FLOAT.itemsize
    return StateSummary(size_bytes, fields[12])


def head_bytes(head: StreamHead) -> bytes:
    """The 24 bytes that a commit compares: epoch and tag, as in the header."""
    return head.epoch + head.tag


def decode_stream(value: bytes) -> StreamState:
    """Decode a state that is no tombstone.

    Raises:
        CodecError
    """
    stream = decode_state(value)
    if isinstance(stream, Tombstone):
        raise CodecError("expected a stream, got a tombstone")
    return stream


def committed_at_ms(value: bytes) -> int:
    """The time of the commit of a valid state, epoch milliseconds."""
    return int.from_bytes(value[_TIME_OFFSET:HEADER_BYTES], "little", signed=True)


def pack_head(head: StreamHead) -> bytes:
    """The 32 bytes of a head in a header.

    Raises:
        CodecError: a value does not fit the layout.
    """
    epoch, tag = head.epoch, head.tag
    if len(tag) != TAG_BYTES or len(epoch) != EPOCH_BYTES:
        raise CodecError(f"expected a tag and an epoch, got {len(tag)} and {len(epoch)} bytes")
    try:
        return _HEAD.pack(epoch, tag, head.position)
    except struct.error as error:
        raise CodecError(f"a value is out of range: {error}") from error


def slice_packed_head(value: bytes) -> bytes:
    """The packed head in a stored state."""
    return value[_HEAD_OFFSET : _HEAD_OFFSET + _HEAD.size]


def unpack_head(packed: bytes) -> StreamHead:
    """The inverse of `pack_head`."""
    return StreamHead(*_HEAD.unpack(packed))


def raw_head(value: bytes) -> StreamHead:
    """The bytes at the offset of a state's head, padded with zeros.

    They identify a damaged value well enough to delete this value and no other.
    """
    raw = value[_HEAD_OFFSET : _HEAD_OFFSET + EPOCH_BYTES + TAG_BYTES].ljust(
        EPOCH_BYTES + TAG_BYTES, b"\0"
    )
    return StreamHead(raw[:EPOCH_BYTES], raw[EPOCH_BYTES:], 0)


def encode_replies(heads: Sequence[bytes], outputs: Sequence[FloatRows]) -> list[bytes]:
    """Encode replies, outputs float32 [T, O] of each; the caller checks that they are finite.

    Args:
        heads: packed.

    Raises:
        CodecError: a value does not fit the layout.
    """
    replies: list[bytes] = []
    known: tuple[int, ...] = ()
    for head, values in zip(heads, outputs, strict=True):
        shape = values.shape
        if shape != known:
            if len(shape) != 2 or values.dtype != _FLOAT:
                raise CodecError(f"expected float32 [T, O], got {values.dtype} {list(shape)}")
            known, (lead, crc) = shape, _reply_lead(*shape)
        body = head + values.tobytes()
        replies.append(b"".join((lead, zlib.crc32(body, crc).to_bytes(4, "little"), body)))
    return replies


def encode_reply(reply: StoredReply) -> bytes:
    """Encode one reply; see `encode_replies`."""
    return encode_replies([pack_head(reply.head)], [reply.outputs])[0]


@lru_cache(maxsize=256)
def _reply_lead(steps: int, width: int) -> tuple[bytes, int]:
    """The part of a reply before its checksum, and the checksum of this part."""
    lead = _REPLY_LEAD.pack(REPLY_MAGIC, FORMAT, _ZERO, steps, width)
    return lead, zlib.crc32(lead)


def decode_reply(value: bytes) -> StoredReply:
    """Decode a reply.

    Raises:
        CodecError: the bytes are not a complete, undamaged reply of a known format.
    """
    if len(value) < REPLY_HEADER_BYTES:
        raise CodecError(f"expected at least {REPLY_HEADER_BYTES} bytes, got {len(value)}")
    magic, format_, zero, steps, width, crc, epoch, tag, position = _REPLY.unpack_from(value)
    _check_format(magic, REPLY_MAGIC, format_)
    if any(zero):
        raise CodecError("bytes 5 to 7 are not zero")
    _check_integrity(value, REPLY_HEADER_BYTES + 4 * steps * width, _REPLY_CRC_OFFSET, crc)
    outputs = _floats(value, steps * width, REPLY_HEADER_BYTES)
    return StoredReply(StreamHead(epoch, tag, position), outputs.reshape(steps, width))


def _floats(value: bytes, count: int, offset: int) -> NDArray[np.float32]:
    floats = np.frombuffer(value, _FLOAT, count, offset)
    if not _are_finite(floats):
        raise CodecError("a number is not finite")
    return floats


def _are_finite(floats: NDArray[np.float32]) -> bool:
    # Infinity and NaN propagate to the sum of squares, which is faster to compute. If that is not
    # finite, perhaps because it overflowed, every number is checked.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = floats.dot(floats)
    return math.isfinite(squares) or bool(np.isfinite(floats).all())


def _check_format(magic: bytes, expected: bytes, format_: int) -> None:
    if magic != expected:
        raise CodecError(f"expected the magic {expected!r}, got {magic!r}")
    if format_ != FORMAT:
        raise CodecError(f"expected format {FORMAT}, got {format_}")


def _check_integrity(value: bytes, size: int, crc_offset: int, crc: int) -> None:
    if len(value) != size:
        raise CodecError(f"expected {size} bytes, got {len(value)}")
    computed = _checksum(value, crc_offset)
    if computed != crc:
        raise CodecError(f"expected the checksum {crc:08x}, got {computed:08x}")


def _checksum(value: bytes, crc_offset: int) -> int:
    return zlib.crc32(value[crc_offset + 4 :], zlib.crc32(value[:crc_offset]))


def _join_with_checksum(lead: bytes, *rest: bytes) -> bytes:
    """Join the parts, and insert the checksum of all of them behind `lead`."""
    body = b"".join(rest)
    crc = zlib.crc32(body, zlib.crc32(lead))
    return lead + crc.to_bytes(4, "little") + body
