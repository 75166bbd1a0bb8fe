"""Header and flags of a stored state, whose layout `service.store.codec` describes."""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

from service.core.values import LastChunk, StreamHead

FORMAT: Final = 1
STATE_MAGIC: Final = b"CRRY"

_STATE = struct.Struct("<4sBBHII16s8s16sQQ16sq")
SINCE: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _STATE.size
_FLOAT: Final = np.dtype("<f4")
_INT: Final = np.dtype("<i8")

FEED_IS_INPUTS: Final = 1
HAS_LAST: Final = 2
DELETED: Final = 4
STREAM_EXISTED: Final = 8
IS_INEXACT: Final = 16
HAS_SOURCE: Final = 32
KNOWN_FLAGS: Final = FEED_IS_INPUTS | HAS_LAST | STREAM_EXISTED | IS_INEXACT | HAS_SOURCE


class CodecError(Exception):
    """Invalid bytes, or a value that cannot be encoded; the message gives the reason."""


class StateHeader(msgspec.Struct, frozen=True, gc=False):
    """The header of a state or a tombstone: its fields, in the order of the layout."""

    magic: bytes
    format: int
    flags: int
    int_size: int
    float_size: int
    crc: int
    fingerprint: bytes
    epoch: bytes
    tag: bytes
    position: int
    start: int
    digest: bytes
    updated_ms: int

    @classmethod
    def decode(cls, value: bytes) -> StateHeader:
        """Decode the first 96 bytes of a value; the checksum is not verified.

        Raises:
            CodecError: they are not a header of a known format.
        """
        if len(value) < HEADER_BYTES:
            raise CodecError(f"expected at least {HEADER_BYTES} bytes, got {len(value)}")
        header = cls(*_STATE.unpack_from(value))
        check_format(header.magic, STATE_MAGIC, header.format)
        return header

    @property
    def is_tombstone(self) -> bool:
        """Whether it is the header of a tombstone."""
        return self.flags == DELETED

    @property
    def size_bytes(self) -> int:
        """Size of the whole state, without a source mark."""
        values = self.int_size * _INT.itemsize + self.float_size * _FLOAT.itemsize
        return HEADER_BYTES + values + (SINCE.size if self.flags & IS_INEXACT else 0)

    @property
    def head(self) -> StreamHead:
        """The head of the stream or the tombstone."""
        return StreamHead(self.epoch, self.tag, self.position)

    @property
    def last(self) -> LastChunk | None:
        """The last chunk, if there is one."""
        if not self.flags & HAS_LAST:
            return None
        return LastChunk(self.start, self.digest, bool(self.flags & STREAM_EXISTED))


def check_format(magic: bytes, expected: bytes, format_: int) -> None:
    """Check what encoded bytes start with.

    Raises:
        CodecError: another magic or format.
    """
    if magic != expected:
        raise CodecError(f"expected the magic {expected!r}, got {magic!r}")
    if format_ != FORMAT:
        raise CodecError(f"expected format {FORMAT}, got {format_}")
