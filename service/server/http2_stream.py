"""Frames of HTTP/2 (RFC 9113), and its streams: one request, its response and its flow control.

A stream of HTTP/2 has nothing to do with Carry's streams, which have a state.
"""

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
"""Flow-control window of a stream: bytes that the client may send before they are consumed."""

FRAME_HEADER: Final = struct.Struct(">IBI")
END_STREAM: Final = 1
ACK: Final = 1
END_HEADERS: Final = 4
PADDED: Final = 8
PRIORITY: Final = 32


class FrameType(IntEnum):
    """The type of a frame."""

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


class ErrorCode(IntEnum):
    """Why a stream is reset (RST_STREAM) or a connection is closed (GOAWAY)."""

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
    """A connection error: the client violated the protocol, or exceeded a limit."""

    def __init__(self, code: ErrorCode, detail: str):
        super().__init__(detail)
        self.code = code


def encode_frame(kind: FrameType, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Encode a frame; the stream 0 is the connection."""
    return FRAME_HEADER.pack(len(payload) << 8 | kind, flags, stream_id) + payload


def without_padding(payload: bytes) -> bytes:
    """The payload of a padded frame.

    Raises:
        Http2Error
    """
    if not payload or payload[0] >= len(payload):
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the padding is as long as the frame, or longer")
    return payload[1 : len(payload) - payload[0]]


def check_length(payload: bytes, expected: int) -> None:
    """Check the length of a payload whose frame type fixes it.

    Raises:
        Http2Error
    """
    if len(payload) != expected:
        raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, f"expected a payload of {expected} bytes")


class Http2Stream(ABC):
    """One request and its response. Nothing is received after `finish`.

    Args:
        stream_id: its identifier.

    Attributes:
        has_received_all: whether the client has sent END_STREAM.
        window: the client's window of this stream without its initial window; often negative.
        reads: whether received bytes are consumed; otherwise no WINDOW_UPDATE is sent for them.
        is_open: whether it is neither finished, nor reset, nor cancelled.
    """

    reads = True
    is_open = True
    has_received_all = False

    def __init__(self, connection: Http2Connection, stream_id: int):
        self.connection = connection
        self.id = stream_id
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
        """Release what it holds, however it ended; called once, after all others."""

    @abstractmethod
    def resume(self) -> None:
        """Continue to write: `can_write` is true again."""

    @property
    def can_write(self) -> bool:
        """Whether the client's windows hold nothing back, and the transport is not paused."""
        return not self.unsent and not self.connection.is_write_paused

    def restore_window(self) -> None:
        """Send WINDOW_UPDATE once half of the window is consumed."""
        if self.unread_bytes >= STREAM_WINDOW // 2 and self.reads and not self.has_received_all:
            self.connection.update_window(self.id, self.unread_bytes)
            self.unread_bytes = 0

    def write_headers(self, block: bytes) -> None:
        """Begin the response with a header block."""
        self.connection.write(encode_frame(FrameType.HEADERS, END_HEADERS, self.id, block))

    def write(self, data: bytes) -> None:
        """Write bytes of the response: now, or once the client's windows allow it."""
        size, connection = len(data), self.connection
        connection.progress += 1
        window = self.window + connection.initial_window
        if not self.unsent and size <= min(window, connection.window, MAX_FRAME_BYTES):
            self.window -= size
            connection.window -= size
            connection.write(FRAME_HEADER.pack(size << 8, 0, self.id) + data)
            return
        self.unsent += data
        if not self.send():
            connection.send_later(self)

    def finish(self, trailers: bytes) -> None:
        """End the response with trailers, a header block, after what was written."""
        self.trailers = trailers
        if not self.unsent:
            self._write_trailers(trailers)

    def reset(self, code: ErrorCode) -> None:
        """End the stream at once, by RST_STREAM."""
        self.connection.write(encode_reset(self.id, code))
        self.connection.remove(self)

    def send(self) -> bool:
        """Send what is unsent as far as the client's windows allow; returns whether all is sent."""
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
            connection.write(encode_frame(FrameType.DATA, 0, self.id, part))
        if self.trailers is not None:
            self._write_trailers(self.trailers)
        return True

    def _write_trailers(self, block: bytes) -> None:
        connection, kind, flags = self.connection, FrameType.HEADERS, END_STREAM
        while len(block) > MAX_FRAME_BYTES:
            connection.write(encode_frame(kind, flags, self.id, block[:MAX_FRAME_BYTES]))
            block, kind, flags = block[MAX_FRAME_BYTES:], FrameType.CONTINUATION, 0
        connection.write(encode_frame(kind, flags | END_HEADERS, self.id, block))
        if not self.has_received_all:
            connection.write(encode_reset(self.id, ErrorCode.NO_ERROR))
        connection.progress += 1
        connection.remove(self)


def encode_reset(stream_id: int, code: ErrorCode) -> bytes:
    """Encode RST_STREAM."""
    return encode_frame(FrameType.RST_STREAM, 0, stream_id, struct.pack(">I", code))
