"""Bytes of a stream in the store: the codec of its state and last reply.

A state, all little-endian, with M int64 values and N float32 values:

    offset  size  what
         0     4  magic "CRRY"
         4     1  format, 1
         5     1  flags: bit 0 the feed is `inputs` (else `events`), bit 1 there is a last chunk,
                  bit 2 the stream is deleted (a tombstone), bit 3 the last chunk starts at 0 and
                  did not create the stream, bit 4 the state is inexact, bit 5 it has a source mark
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
        96    8M  int64 values, then 4N bytes of float32 values; then its source mark, if it has
                  one (`service.store.source_mark`); if it is inexact, then the position since which
                  it is computed, from the initial state, u64

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
from typing import Final

import msgspec
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
    LastFields,
    StoredReply,
    StreamHead,
    StreamState,
    Tombstone,
)
from service.store.layout import (
    DELETED,
    FEED_IS_INPUTS,
    FORMAT,
    HAS_LAST,
    HAS_SOURCE,
    HEADER_BYTES,
    IS_INEXACT,
    KNOWN_FLAGS,
    SINCE,
    STATE_MAGIC,
    STREAM_EXISTED,
    CodecError,
    StateHeader,
    check_format,
)
from service.store.source_mark import decode_mark, encode_mark

REPLY_MAGIC: Final = b"CRRP"
FINGERPRINT_BYTES: Final = 16

# LEAD is the part before the checksum.
_STATE_LEAD = struct.Struct("<4sBBHI")
_REPLY_LEAD = struct.Struct("<4sB3sII")
_HEAD = struct.Struct("<8s16sQ")
_REPLY = struct.Struct("<4sB3sIII8s16sQ")
_HEAD_OFFSET: Final = 32
_HEAD_END: Final = _HEAD_OFFSET + _HEAD.size
COMPARED: Final = slice(0, EPOCH_BYTES + TAG_BYTES)
"""Epoch and tag, the part of a packed head that the scripts compare."""

WRITER: Final = slice(16, 16 + FINGERPRINT_BYTES)
"""The part of a state with the fingerprint of the model that wrote it."""

EPOCH: Final = slice(_HEAD_OFFSET, _HEAD_OFFSET + EPOCH_BYTES)
"""The epoch in a state."""

REPLY_HEADER_BYTES: Final = _REPLY.size
_FLAGS_OFFSET: Final = 5
_STATE_CRC_OFFSET: Final = _STATE_LEAD.size
_REPLY_CRC_OFFSET: Final = _REPLY_LEAD.size
_FLOAT: Final = np.dtype("<f4")
_INT: Final = np.dtype("<i8")
_NO_DIGEST: Final = bytes(DIGEST_BYTES)
_NO_LAST: Final = (0, _NO_DIGEST, False)
_ZERO: Final = bytes(3)
_NO_INTS: Final = np.frombuffer(b"", _INT)

_FLAGS_WITH_LAST: Final = tuple(
    HAS_LAST | existed | feed for existed in (0, STREAM_EXISTED) for feed in (0, FEED_IS_INPUTS)
)
TOMBSTONE_PREFIX: Final = STATE_MAGIC + bytes((FORMAT, DELETED))
"""The first bytes of every tombstone, and of no state."""


class EncodedStream(msgspec.Struct, frozen=True, gc=False):
    """A stream as it is stored, of which only head and feed are decoded.

    Attributes:
        value: the bytes of the whole state.
        since: as of `StreamState`.
    """

    head: StreamHead
    feed: Feed
    value: bytes
    since: int | None = None


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
            flags = FEED_IS_INPUTS if feed is Feed.INPUTS else 0
            flags |= (HAS_LAST if chunk else 0) | (STREAM_EXISTED if existed else 0)
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
    values_end = HEADER_BYTES + 8 * int_size + 4 * float_size
    joined = b"".join([value[HEADER_BYTES:values_end] for value in values])
    rows = np.frombuffer(joined, _FLOAT).reshape(len(values), 2 * int_size + float_size)
    if not int_size:
        return State(rows, np.empty((len(values), 0), _INT))
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
    value = encode_states(
        [stream.feed],
        [pack_head(stream.head)],
        [last],
        State(floats[np.newaxis], ints[np.newaxis]),
        fingerprint=fingerprint,
        updated_ms=stream.updated_ms,
    )[0]
    if stream.source is not None:
        try:
            value = _append(value, HAS_SOURCE, encode_mark(stream.source))
        except struct.error as error:
            raise CodecError(f"a value is out of range: {error}") from error
    return value if stream.since is None else mark_inexact(value, stream.since)


def mark_inexact(value: bytes, since: int) -> bytes:
    """An encoded state that is not inexact, with the position since which it is computed."""
    return _append(value, IS_INEXACT, SINCE.pack(since))


def _append(value: bytes, flag: int, data: bytes) -> bytes:
    """An encoded state with another flag, and data at its end."""
    flags = value[_FLAGS_OFFSET] | flag
    lead = value[:_FLAGS_OFFSET] + bytes((flags,)) + value[_FLAGS_OFFSET + 1 : _STATE_CRC_OFFSET]
    body = value[_STATE_CRC_OFFSET + 4 :] + data
    return lead + zlib.crc32(body, zlib.crc32(lead)).to_bytes(4, "little") + body


def encode_tombstone(tombstone: Tombstone) -> bytes:
    """Encode a tombstone.

    Raises:
        CodecError: the head is not a tombstone's.
    """
    head = tombstone.head
    if head.tag != FIRST_TAG or head.position != 0:
        raise CodecError("expected the first tag and position 0 of a tombstone")
    lead, crc = _state_lead(DELETED, 0, 0)
    body = bytes(FINGERPRINT_BYTES) + pack_head(head) + bytes(HEADER_BYTES - _HEAD_END)
    return lead + zlib.crc32(body, crc).to_bytes(4, "little") + body


def read_since(value: bytes) -> int | None:
    """The position since which an encoded state is computed; None if it is exact."""
    is_inexact = value[_FLAGS_OFFSET] & IS_INEXACT
    since: int | None = SINCE.unpack(value[-SINCE.size :])[0] if is_inexact else None
    return since


def has_source_mark(value: bytes) -> bool:
    """Whether a stored value is flagged to have a source mark; it may be damaged."""
    return len(value) > _FLAGS_OFFSET and bool(value[_FLAGS_OFFSET] & HAS_SOURCE)


def decode_state(value: bytes) -> StreamState | Tombstone:
    """Decode a stream or a tombstone.

    Raises:
        CodecError: the bytes are not a complete, undamaged stream or tombstone of a known format.
    """
    header = StateHeader.decode(value)
    if header.is_tombstone:
        tombstone = Tombstone(header.head)
        if value != encode_tombstone(tombstone):
            raise CodecError("a tombstone has fields other than its epoch")
        return tombstone
    if header.flags & ~KNOWN_FLAGS:
        raise CodecError(f"unknown flags 0x{header.flags:02x}")
    int_size, float_size = header.int_size, header.float_size
    source, source_size = None, 0
    if header.flags & HAS_SOURCE:
        try:
            end = HEADER_BYTES + 8 * int_size + 4 * float_size
            source, source_size = decode_mark(value, end)
        except (struct.error, ValueError) as error:
            raise CodecError(f"expected the bytes of a source mark: {error}") from error
    _check_integrity(value, header.size_bytes + source_size, _STATE_CRC_OFFSET, header.crc)
    last = header.last
    if last is None and (header.start or any(header.digest) or header.flags & STREAM_EXISTED):
        raise CodecError("a last chunk is given, but the flags say there is none")
    ints = np.frombuffer(value, _INT, int_size, HEADER_BYTES) if int_size else _NO_INTS
    return StreamState(
        head=header.head,
        feed=Feed.INPUTS if header.flags & FEED_IS_INPUTS else Feed.EVENTS,
        fingerprint=header.fingerprint,
        last=last,
        updated_ms=header.updated_ms,
        state=State(_floats(value, float_size, HEADER_BYTES + 8 * int_size), ints),
        since=read_since(value),
        source=source,
    )


def read_streams(
    values: Sequence[bytes], fingerprint: bytes, int_size: int, float_size: int
) -> list[EncodedStream | None]:
    """The streams that a model wrote, with their last chunks; the fast path of `decode_state`.

    None does not mean that a value is damaged, but that it has to be decoded: it is inexact, say.

    Args:
        values: what is stored.
        fingerprint: of the model.
        int_size, float_size: of its states.
    """
    leads = {
        lead: (crc, Feed.INPUTS if flags & FEED_IS_INPUTS else Feed.EVENTS)
        for flags in _FLAGS_WITH_LAST
        for lead, crc in [_state_lead(flags, int_size, float_size)]
    }
    size, at = HEADER_BYTES + 8 * int_size + 4 * float_size, _STATE_CRC_OFFSET
    streams: list[EncodedStream | None] = []
    floats: list[bytes] = []
    for value in values:
        stream, known = None, leads.get(value[:at])
        if known is not None and len(value) == size and value[at + 4 : _HEAD_OFFSET] == fingerprint:
            crc, feed = known
            if value[at : at + 4] == zlib.crc32(value[at + 4 :], crc).to_bytes(4, "little"):
                head = StreamHead(*_HEAD.unpack_from(value, _HEAD_OFFSET))
                stream = EncodedStream(head, feed, value)
                floats.append(value[size - 4 * float_size :])
        streams.append(stream)
    rows = np.frombuffer(b"".join(floats), _FLOAT)
    return streams if _are_finite(rows) else [None] * len(values)


def pack_head(head: StreamHead | None) -> bytes:
    """The 32 bytes of a head in a header; empty if there is no head.

    Raises:
        CodecError: a value does not fit the layout.
    """
    if head is None:
        return b""
    epoch, tag = head.epoch, head.tag
    if len(tag) != TAG_BYTES or len(epoch) != EPOCH_BYTES:
        raise CodecError(f"expected a tag and an epoch, got {len(tag)} and {len(epoch)} bytes")
    try:
        return _HEAD.pack(epoch, tag, head.position)
    except struct.error as error:
        raise CodecError(f"a value is out of range: {error}") from error


def unpack_head(packed: bytes) -> StreamHead | None:
    """The inverse of `pack_head`."""
    return StreamHead(*_HEAD.unpack(packed)) if packed else None


def read_packed_head(value: bytes) -> bytes:
    """The packed head of a stored value; padded with zeros if the value is damaged and too short.

    It identifies a damaged value well enough to delete this value and no other.
    """
    return value[_HEAD_OFFSET:_HEAD_END].ljust(_HEAD.size, b"\0")


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
    check_format(magic, REPLY_MAGIC, format_)
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


def _check_integrity(value: bytes, size: int, crc_offset: int, crc: int) -> None:
    if len(value) != size:
        raise CodecError(f"expected {size} bytes, got {len(value)}")
    computed = _checksum(value, crc_offset)
    if computed != crc:
        raise CodecError(f"expected the checksum {crc:08x}, got {computed:08x}")


def _checksum(value: bytes, crc_offset: int) -> int:
    return zlib.crc32(value[crc_offset + 4 :], zlib.crc32(value[:crc_offset]))
