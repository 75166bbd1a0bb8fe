"""Splits long WebSocket frames into fragments before they reach the parser.

The library copies a frame twice when its last byte has arrived: for 16 MiB, the event loop would
stop for tens of milliseconds. So a long frame is passed on as fragments of one message, as an
intermediary may (RFC 6455, section 5.4). Nothing else is changed or validated: the parser sees
every header, and rejects what is wrong.
"""

from __future__ import annotations

import struct
from typing import Final

from websockets.frames import Opcode

FRAGMENT_BYTES: Final = 32 * 1024
"""Longest fragment; a multiple of four, so that every fragment begins with the first byte of the
masking key."""

_FIN: Final = 0x80
_MASKED: Final = 0x80
_LENGTH_OF_16_BITS: Final = 126
_LENGTH_OF_64_BITS: Final = 127
_DATA: Final = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)


class Fragmenter:
    """Rewrites the bytes of one connection.

    Args:
        max_bytes: largest message; a longer frame keeps its header, which the parser rejects.
    """

    __slots__ = ("_after", "_fin", "_header", "_key", "_left", "_max_bytes")

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._header = b""
        self._left = 0
        # of a frame that is split: the payload after this fragment, its FIN bit, its masking key
        self._after = 0
        self._fin = 0
        self._key = b""

    def split(self, data: bytes) -> bytes:
        """The next bytes for the parser."""
        if len(data) <= self._left:
            # within one payload
            self._left -= len(data)
            if self._left or not self._after:
                return data
            return data + self._next_fragment(Opcode.CONT)
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
            else:
                at += self._read_header(data[at : at + 14], parts)
            if self._after and not self._left:
                parts.append(self._next_fragment(Opcode.CONT))
        return b"".join(parts)

    def _read_header(self, data: bytes, parts: list[bytes]) -> int:
        """Read a header, or a part of it; returns how many bytes of the data it took."""
        known = len(self._header)
        header = self._header + data
        size = _header_size(header)
        if size is None or len(header) < size:
            self._header = header
            return len(data)
        header = header[:size]
        self._header = b""
        length = _payload_length(header)
        is_long = FRAGMENT_BYTES < length <= self._max_bytes
        if is_long and header[0] & 0x0F in _DATA and header[1] & _MASKED:
            self._after = length
            self._fin = header[0] & _FIN
            self._key = header[-4:]
            parts.append(self._next_fragment(header[0] & ~_FIN))
        else:
            self._left = length
            parts.append(header)
        return size - known

    def _next_fragment(self, lead: int) -> bytes:
        """The header of the next fragment.

        Args:
            lead: its reserved bits and opcode.
        """
        self._left = min(self._after, FRAGMENT_BYTES)
        self._after -= self._left
        fin = 0 if self._after else self._fin
        return struct.pack("!BBH", fin | lead, _MASKED | _LENGTH_OF_16_BITS, self._left) + self._key


def _header_size(header: bytes) -> int | None:
    """Bytes of a header; None if its first two are not known."""
    if len(header) < 2:
        return None
    length = header[1] & 0x7F
    extended = {_LENGTH_OF_16_BITS: 2, _LENGTH_OF_64_BITS: 8}.get(length, 0)
    return 2 + extended + (4 if header[1] & _MASKED else 0)


def _payload_length(header: bytes) -> int:
    length = header[1] & 0x7F
    if length == _LENGTH_OF_16_BITS:
        return int.from_bytes(header[2:4], "big")
    if length == _LENGTH_OF_64_BITS:
        return int.from_bytes(header[2:10], "big")
    return length
