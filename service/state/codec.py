"""The bytes of one stream in the store, and of its last reply.

A state, all little-endian; M int64 values and N float32 values:

    offset  size  what
         0     4  magic "CRRY"
         4     1  format, 1
         5     1  flags: bit 0 the feed is `inputs` (else `events`), bit 1 there is a last chunk
         6     2  M, u16
         8     4  N, u32
        12     4  CRC-32 over every other byte, u32
        16    16  fingerprint of the model that wrote it
        32     8  epoch
        40    16  tag
        56     8  position, u64
        64     8  start of the last chunk, u64 (0 where there is none)
        72    16  digest of the last chunk, its first 16 bytes (0 where there is none)
        88     8  time of the commit, epoch milliseconds, i64
        96    8M  int64 values, then 4N bytes of float32 values

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

Epoch and tag lie side by side so that a commit can compare them as 24 bytes. The decoder
refuses what it does not know: another magic or format, an unknown flag, a length that the
counts do not give, a wrong checksum, a number that is not finite. Nothing is ever unpickled.
Decoded arrays are read-only views of the given bytes.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.state import State
from service.domain import (
    DIGEST_BYTES,
    EPOCH_BYTES,
    TAG_BYTES,
    Feed,
    LastChunk,
    Mark,
    StoredReply,
    StreamState,
)

FORMAT: Final = 1
STATE_MAGIC: Final = b"CRRY"
REPLY_MAGIC: Final = b"CRRP"
FINGERPRINT_BYTES: Final = 16

_STATE = struct.Struct("<4sBBHII16s8s16sQQ16sq")
_REPLY = struct.Struct("<4sB3sIII8s16sQ")
HEADER_BYTES: Final = _STATE.size
REPLY_HEADER_BYTES: Final = _REPLY.size
_STATE_CRC_AT: Final = 12
_REPLY_CRC_AT: Final = 16

_FEED_IS_INPUTS: Final = 1
_HAS_LAST: Final = 2


class CodecError(Exception):
    """Bytes that are not a stream's, or a value that has no bytes; the message says why."""


def encode_state(stream: StreamState) -> bytes:
    """The bytes of a stream.

    Args:
        stream: floats float32 [N] and finite, ints int64 [M].

    Raises:
        CodecError: a value does not fit the layout.
    """
    ints, floats = stream.state.ints, stream.state.floats
    if ints.ndim != 1 or ints.dtype != np.int64:
        raise CodecError(f"expected int64 [M], got {ints.dtype} {list(ints.shape)}")
    body = _row_bytes(ints) + _float_bytes(floats, 1)
    flags = _FEED_IS_INPUTS if stream.feed is Feed.INPUTS else 0
    start, digest = 0, bytes(DIGEST_BYTES)
    if stream.last is not None:
        flags |= _HAS_LAST
        start, digest = stream.last.start, _exact("digest", stream.last.digest, DIGEST_BYTES)
    try:
        header = _STATE.pack(
            STATE_MAGIC,
            FORMAT,
            flags,
            ints.size,
            floats.size,
            0,
            _exact("fingerprint", stream.fingerprint, FINGERPRINT_BYTES),
            _exact("epoch", stream.mark.epoch, EPOCH_BYTES),
            _exact("tag", stream.mark.tag, TAG_BYTES),
            stream.mark.position,
            start,
            digest,
            stream.updated_ms,
        )
    except struct.error as error:
        raise CodecError(f"a value is out of range: {error}") from error
    return _sealed(header + body, _STATE_CRC_AT)


def decode_state(value: bytes) -> StreamState:
    """The stream whose bytes these are.

    Raises:
        CodecError: the bytes are not a whole, undamaged stream of a known format.
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
    _check_known(magic, STATE_MAGIC, format_)
    if flags & ~(_FEED_IS_INPUTS | _HAS_LAST):
        raise CodecError(f"unknown flags 0x{flags:02x}")
    _check_whole(value, HEADER_BYTES + 8 * int_size + 4 * float_size, _STATE_CRC_AT, crc)
    has_last = bool(flags & _HAS_LAST)
    if not has_last and (start or any(digest)):
        raise CodecError("a last chunk is given, and the flags say there is none")
    ints = np.frombuffer(value, "<i8", int_size, HEADER_BYTES)
    floats = _floats(value, float_size, HEADER_BYTES + 8 * int_size)
    return StreamState(
        mark=Mark(epoch, tag, position),
        feed=Feed.INPUTS if flags & _FEED_IS_INPUTS else Feed.EVENTS,
        fingerprint=fingerprint,
        last=LastChunk(start, digest) if has_last else None,
        updated_ms=updated_ms,
        state=State(floats, ints.astype(np.int64, copy=False)),
    )


def decode_mark(header: bytes) -> Mark:
    """Where a stream stands, from the first 96 bytes alone (the checksum is not checked).

    Raises:
        CodecError: these are not the first bytes of a stream.
    """
    if len(header) < HEADER_BYTES:
        raise CodecError(f"expected {HEADER_BYTES} bytes, got {len(header)}")
    fields = _STATE.unpack_from(header)
    _check_known(fields[0], STATE_MAGIC, fields[1])
    return Mark(fields[7], fields[8], fields[9])


def mark_bytes(mark: Mark) -> bytes:
    """What a commit compares: epoch and tag, 24 bytes, as they lie in the header."""
    return mark.epoch + mark.tag


def encode_reply(reply: StoredReply) -> bytes:
    """The bytes of a reply, outputs float32 [T, O] and finite.

    Raises:
        CodecError: a value does not fit the layout.
    """
    body = _float_bytes(reply.outputs, 2)
    steps, width = reply.outputs.shape
    try:
        header = _REPLY.pack(
            REPLY_MAGIC,
            FORMAT,
            bytes(3),
            steps,
            width,
            0,
            _exact("epoch", reply.mark.epoch, EPOCH_BYTES),
            _exact("tag", reply.mark.tag, TAG_BYTES),
            reply.mark.position,
        )
    except struct.error as error:
        raise CodecError(f"a value is out of range: {error}") from error
    return _sealed(header + body, _REPLY_CRC_AT)


def decode_reply(value: bytes) -> StoredReply:
    """The reply whose bytes these are.

    Raises:
        CodecError: the bytes are not a whole, undamaged reply of a known format.
    """
    if len(value) < REPLY_HEADER_BYTES:
        raise CodecError(f"expected at least {REPLY_HEADER_BYTES} bytes, got {len(value)}")
    magic, format_, zero, steps, width, crc, epoch, tag, position = _REPLY.unpack_from(value)
    _check_known(magic, REPLY_MAGIC, format_)
    if any(zero):
        raise CodecError("the bytes 5 to 7 are not zero")
    _check_whole(value, REPLY_HEADER_BYTES + 4 * steps * width, _REPLY_CRC_AT, crc)
    outputs = _floats(value, steps * width, REPLY_HEADER_BYTES)
    return StoredReply(Mark(epoch, tag, position), outputs.reshape(steps, width))


def _exact(name: str, value: bytes, size: int) -> bytes:
    # struct would pad or cut a string of another length without a word.
    if len(value) != size:
        raise CodecError(f"{name}: expected {size} bytes, got {len(value)}")
    return value


def _row_bytes(row: NDArray[np.int64] | NDArray[np.float32]) -> bytes:
    return row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes()


def _float_bytes(values: NDArray[np.float32], ndim: int) -> bytes:
    if values.ndim != ndim or values.dtype != np.float32:
        raise CodecError(
            f"expected float32 of {ndim} axes, got {values.dtype} {list(values.shape)}"
        )
    if not np.isfinite(values).all():
        raise CodecError("expected finite numbers")
    return _row_bytes(values)


def _floats(value: bytes, count: int, offset: int) -> NDArray[np.float32]:
    floats = np.frombuffer(value, "<f4", count, offset).astype(np.float32, copy=False)
    if not np.isfinite(floats).all():
        raise CodecError("a number is not finite")
    return floats


def _check_known(magic: bytes, expected: bytes, format_: int) -> None:
    if magic != expected:
        raise CodecError(f"expected the magic {expected!r}, got {magic!r}")
    if format_ != FORMAT:
        raise CodecError(f"expected format {FORMAT}, got {format_}")


def _check_whole(value: bytes, size: int, crc_at: int, crc: int) -> None:
    if len(value) != size:
        raise CodecError(f"expected {size} bytes, got {len(value)}")
    found = _checksum(value, crc_at)
    if found != crc:
        raise CodecError(f"expected the checksum {crc:08x}, got {found:08x}")


def _checksum(value: bytes, crc_at: int) -> int:
    view = memoryview(value)
    return zlib.crc32(view[crc_at + 4 :], zlib.crc32(view[:crc_at]))


def _sealed(value: bytes, crc_at: int) -> bytes:
    crc = struct.pack("<I", _checksum(value, crc_at))
    return b"".join((value[:crc_at], crc, value[crc_at + 4 :]))
