"""Bytes of a stream's last reply in the store, kept for retries; as `codec` has its state.

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
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from service.core.values import FloatRows, StoredReply, StreamHead
from service.store.codec import (
    FLOAT,
    FORMAT,
    CodecError,
    check_format,
    check_integrity,
    read_floats,
)

REPLY_MAGIC: Final = b"CRRP"
# LEAD is the part before the checksum.
_REPLY_LEAD = struct.Struct("<4sB3sII")
_REPLY = struct.Struct("<4sB3sIII8s16sQ")
REPLY_HEADER_BYTES: Final = _REPLY.size
_REPLY_CRC_OFFSET: Final = _REPLY_LEAD.size
_ZERO: Final = bytes(3)


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
            if len(shape) != 2 or values.dtype != FLOAT:
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
    check_integrity(value, REPLY_HEADER_BYTES + 4 * steps * width, _REPLY_CRC_OFFSET, crc)
    outputs = read_floats(value, steps * width, REPLY_HEADER_BYTES)
    return StoredReply(StreamHead(epoch, tag, position), outputs.reshape(steps, width))
