"""Header blocks of HTTP/2 (HPACK, RFC 7541): decodes those of requests, encodes those of responses.

RFC 9113 calls a header block a field block, and the headers or trailers in it a field section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from hpack import Decoder, HPACKError

from service.server.http2_stream import ErrorCode, Http2Error

MAX_HEADERS_BYTES: Final = 16_384
"""Longest header block, both compressed and as a list of headers."""

CACHED_BLOCKS: Final = 16
CACHED_BLOCK_BYTES: Final = 64
"""Most decoded blocks that a connection caches, and the longest: each byte may be a header."""

Headers = list[tuple[bytes, bytes]]


class HeadDecoder:
    """Decodes the header blocks of one connection.

    Args:
        read_head: the head of a request from its headers; cached.
    """

    def __init__(self, read_head: Callable[[Headers], Any]):
        self._read_head = read_head
        self._decoder = Decoder(max_header_list_size=MAX_HEADERS_BYTES)
        self._heads: dict[bytes, Any] = {}

    def decode(self, block: bytes) -> Any:
        """The head in a header block.

        A block whose bytes all have the highest bit set refers to the dynamic table and does not
        change it, so its head is cached until another block may change the table.

        Raises:
            Http2Error
        """
        head = self._heads.get(block)
        if head is not None:
            return head
        try:
            head = self._read_head(list(self._decoder.decode(block, raw=True)))
        except HPACKError as error:
            raise Http2Error(
                ErrorCode.COMPRESSION_ERROR, "a header block cannot be decoded"
            ) from error
        if not block or min(block) < 0x80 or len(self._heads) >= CACHED_BLOCKS:
            self._heads.clear()
        elif len(block) <= CACHED_BLOCK_BYTES:
            self._heads[block] = head
        return head


def encode_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block of literals, which neither uses nor changes the client's dynamic table."""
    return b"".join(
        b"\0%b%b%b%b" % (_length(name), name, _length(value), value) for name, value in headers
    )


def _length(value: bytes) -> bytes:
    """The length of a literal: an integer of HPACK with a prefix of 7 bits."""
    size = len(value)
    if size < 127:
        return bytes((size,))
    encoded, size = bytearray((127,)), size - 127
    while size >= 128:
        encoded.append(size & 127 | 128)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)
