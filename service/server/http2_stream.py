"""Frames of HTTP/2 (RFC 9113), and a stream: one request, its response and its flow control."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from service.server.http2_protocol import Http2Connection

MAX_FRAME_BYTES: Final = 16_384
"""Longest payload of a frame, in both directions: the protocol's default."""

STREAM_WINDOW: Final = 256 * 1024
"""Bytes of a stream that its client may send before they are consumed."""

HEAD: Final = struct.Struct(">IBI")
END_STREAM: Final = 1
ACK: Final = 1
END_HEADERS: Final = 4
PADDED: Final = 8
PRIORITY: Final = 32


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Error codes of a reset stream or a closed connection."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Http2Error(Exception):
    """The client broke the protocol, or a limit."""

    def __init__(self, code: Code, detail: str):
        super().__init__(detail)
        self.code = code


def encode_frame(kind: Kind, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def without_padding(payload: bytes) -> bytes:
    """The payload of a padded frame.

    Raises:
        Http2Error
    """
    if not payload or payload[0] >= len(payload):
        raise Http2Error(Code.PROTOCOL_ERROR, "the padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def check_length(payload: bytes, expected: int) -> None:
    """Check the length of a frame whose type has one.

    Raises:
        Http2Error
    """
    if len(payload) != expected:
        raise Http2Error(Code.FRAME_SIZE_ERROR, "a frame has another length than its type")


class Http2Stream(ABC):
    """One request and its response. Nothing is received after `finish`.

    Attributes:
        has_received_all: whether the client has sent all.
        window: bytes that the client allows beyond its initial window of streams; often negative.
        reads: whether received bytes are consumed; otherwise the client's window is not restored.
        is_open: whether it is neither finished, nor reset, nor cancelled.
    """

    reads = True
    is_open = True
    has_received_all = False

    def __init__(self, connection: Http2Connection, identity: int):
        self.connection = connection
        self.id = identity
        self.window = 0
        self.unread_bytes = 0
        self.unsent = bytearray()
        self.trailers: bytes | None = None

    @abstractmethod
    def receive(self, data: bytes) -> None:
        """Process bytes of the request."""

    @abstractmethod
    def receive_end(self) -> None:
        """Process the end of the request."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop: the client reset the stream or disconnected."""

    @abstractmethod
    def release(self) -> None:
        """Give back what it holds: it is over, whatever ended it; called once, after all others."""

    @abstractmethod
    def resume(self) -> None:
        """Continue to write: `can_write` is true again."""

    @property
    def can_write(self) -> bool:
        """Whether all that was written has left, as far as the windows of the client matter."""
        return not self.unsent and not self.connection.is_write_paused

    def restore_window(self) -> None:
        """Let the client send more, once enough was consumed."""
        if self.unread_bytes >= STREAM_WINDOW // 2 and self.reads and not self.has_received_all:
            self.connection.update_window(self.id, self.unread_bytes)
            self.unread_bytes = 0

    def write_headers(self, block: bytes) -> None:
        """Begin the response."""
        self.connection.write(encode_frame(Kind.HEADERS, END_HEADERS, self.id, block))

    def write(self, data: bytes) -> None:
        """Write bytes of the response: now, or once the client's windows allow it."""
        size, connection = len(data), self.connection
        connection.progress += 1
        window = self.window + connection.initial_window
        if not self.unsent and size <= min(window, connection.window, MAX_FRAME_BYTES):
            self.window -= size
            connection.window -= size
            connection.write(HEAD.pack(size << 8, 0, self.id) + data)
            return
        self.unsent += data
        if not self.send():
            connection.send_later(self)

    def finish(self, trailers: bytes) -> None:
        """End the response with a header block, after what was written."""
        self.trailers = trailers
        if not self.unsent:
            self._write_trailers(trailers)

    def reset(self, code: Code) -> None:
        """End the stream at once."""
        self.connection.write(encode_reset(self.id, code))
        self.connection.remove(self)

    def send(self) -> bool:
        """Send what is unsent as far as the windows allow; returns whether all has left."""
        unsent, connection = self.unsent, self.connection
        while unsent:
            window = self.window + connection.initial_window
            size = min(window, connection.window, MAX_FRAME_BYTES)
            if size <= 0:
                return False
            part = bytes(unsent[:size])
            del unsent[:size]
            self.window -= len(part)
            connection.window -= len(part)
            connection.write(encode_frame(Kind.DATA, 0, self.id, part))
        if self.trailers is not None:
            self._write_trailers(self.trailers)
        return True

    def _write_trailers(self, block: bytes) -> None:
        connection, kind, flags = self.connection, Kind.HEADERS, END_STREAM
        while len(block) > MAX_FRAME_BYTES:
            connection.write(encode_frame(kind, flags, self.id, block[:MAX_FRAME_BYTES]))
            block, kind, flags = block[MAX_FRAME_BYTES:], Kind.CONTINUATION, 0
        connection.write(encode_frame(kind, flags | END_HEADERS, self.id, block))
        if not self.has_received_all:
            connection.write(encode_reset(self.id, Code.NO_ERROR))
        connection.progress += 1
        connection.remove(self)


def encode_reset(stream: int, code: Code) -> bytes:
    """A frame that ends a stream at once."""
    return encode_frame(Kind.RST_STREAM, 0, stream, struct.pack(">I", code))
