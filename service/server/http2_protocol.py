"""HTTP/2 connections of a server: frames, header blocks, flow control and limits (RFC 9113).

A server subclasses `Http2Stream`: one request and its response. `http2_headers` has header blocks.

A client that violates the protocol, or floods the connection with control frames, gets GOAWAY, and
the connection is closed. The unread bytes of a stream are bounded by its flow-control window; the
server sends nothing beyond the client's windows.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Final

import structlog

from service.server.connections import Connection, Connections, Phase
from service.server.http2_headers import MAX_HEADERS_BYTES, HeadDecoder, Headers
from service.server.http2_stream import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    PADDED,
    PRIORITY,
    STREAM_WINDOW,
    ErrorCode,
    FrameType,
    Http2Error,
    Http2Stream,
    check_length,
    encode_frame,
    encode_reset,
    without_padding,
)
from service.server.reading import LONG_BODY_BYTES, UNCONSUMED, ReadingFlow

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECTION_WINDOW: Final = 1024 * 1024
"""Flow-control window of the connection, whose bytes count as consumed once they are received."""

MAX_STREAMS: Final = 1024
"""Concurrent streams of one connection."""

WORK_AT_ONCE: Final = 1024
"""Most frames of a connection that are processed before others are served, in some 3 ms. A header
block counts as `BLOCK_WORK` frames more, and every 16 bytes of it as one."""

BLOCK_WORK: Final = 15

MAX_CONTROL_FRAMES: Final = 1000
CONTROL_INTERVAL_S: Final = 10.0
"""Most control frames of a client in this time, besides one for each response: PING, SETTINGS,
RST_STREAM, CONTINUATION, PRIORITY, unknown ones, empty DATA, and frames of closed streams."""

_DEFAULT_WINDOW: Final = 65_535
_MAX_WINDOW: Final = 2**31 - 1
_SETTING: Final = struct.Struct(">HI")
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW, _MAX_HEADER_LIST = 3, 4, 6

log = structlog.get_logger(__name__)


Accept = Callable[["Http2Connection", int, Any], Http2Stream]
"""Opens the stream with this identifier, of a request with this head."""


class Http2Connection(Connection, asyncio.Protocol):
    """One client's connection.

    Args:
        read_head: the head of a request from its headers; cached.
        accept: opens the stream of a request.

    Attributes:
        requests: requests that are being answered, counted by the streams.
        window: the client's window of the connection: bytes that it still accepts.
        initial_window: the client's initial window of each stream.
    """

    transport_name = "grpc"
    requests = 0

    def __init__(
        self,
        connections: Connections,
        read_head: Callable[[Headers], Any],
        accept: Accept,
    ):
        self.loop = asyncio.get_running_loop()
        self._connections = connections
        self._accept = accept
        self._heads = HeadDecoder(read_head)
        self._streams: dict[int, Http2Stream] = {}
        self._unsent: dict[Http2Stream, float] = {}
        self._is_window_wider = False
        self._expiry: asyncio.TimerHandle | None = None
        self._last_id = 0
        self._buffer = PREFACE[:0]
        self._has_preface = False
        self._block: tuple[int, int, bytearray] | None = None
        self._work = 0
        self._unrestored_bytes = 0
        self._out: list[bytes] = []
        self._control_frames, self._control_since_s = 0, self.loop.time()
        self._control_progress = 0
        self._has_pinged = False
        self._is_retiring = False
        self.is_write_paused = False
        self.initial_window = self.window = _DEFAULT_WINDOW
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            FrameType.DATA: self._receive_data,
            FrameType.HEADERS: self._receive_headers,
            FrameType.RST_STREAM: self._receive_reset,
            FrameType.SETTINGS: self._receive_settings,
            FrameType.PING: self._receive_ping,
            FrameType.WINDOW_UPDATE: self._receive_window_update,
            FrameType.CONTINUATION: self._receive_continuation,
        }

    # what the server's limits on connections use

    @property
    def phase(self) -> Phase:
        """What it is waiting for now; one without a request is pinged, as a WebSocket is."""
        is_behind = self.is_write_paused or bool(self._unsent)
        if (closing := self._closing_phase(write_paused=is_behind)) is not None:
            return closing
        if not self._has_preface or self._block is not None:
            return Phase.HEAD
        return Phase.SERVICE if self.requests else Phase.LIVE

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that it buffers."""
        held = sum(len(stream.unsent) for stream in self._unsent)
        return held + self.transport.get_write_buffer_size()

    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase: an idle client is pinged, and closed without an answer."""
        if phase is Phase.LIVE and not self._has_pinged:
            self._has_pinged = True
            self.progress += 1
            self.write(encode_frame(FrameType.PING, 0, 0, bytes(8)))
        else:
            self.abort()

    def retire(self) -> None:
        """Accept no further streams, and close the connection once the open ones have ended."""
        if not self._is_retiring:
            self._is_retiring = True
            self._write_goaway(ErrorCode.NO_ERROR)
            self._close_if_done()

    def shed_body(self) -> None:
        """Close it; the server of the streams bounds what they buffer."""
        self.abort()

    def _drop_received(self) -> None:
        self._buffer, self._block = b"", None

    # asyncio's protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        self.transport, self._flow = transport, ReadingFlow(transport)
        settings = (
            (_MAX_CONCURRENT_STREAMS, MAX_STREAMS),
            (_INITIAL_WINDOW, STREAM_WINDOW),
            (_MAX_HEADER_LIST, MAX_HEADERS_BYTES),
        )
        self.write(
            encode_frame(FrameType.SETTINGS, 0, 0, b"".join(_SETTING.pack(*s) for s in settings))
        )
        self.update_window(0, CONNECTION_WINDOW - _DEFAULT_WINDOW)
        error = self._connections.add(self)
        if error is not None and not transport.is_closing():
            self._fail(Http2Error(ErrorCode.ENHANCE_YOUR_CALM, error.detail))

    def data_received(self, data: bytes) -> None:
        """Process received bytes; a violation of the protocol is answered with GOAWAY."""
        if self._is_lingering:
            return
        self._has_pinged = False
        if len(data) >= LONG_BODY_BYTES:
            self._connections.turns.wait(self._flow)
        try:
            self._buffer = self._process(self._buffer + data if self._buffer else data)
            if self._is_window_wider:
                self._is_window_wider = False
                self._send_unsent(list(self._unsent))
        except Http2Error as error:
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection ended, and with it all streams."""
        self._cancel_streams()
        if self._expiry is not None:
            self._expiry.cancel()
        self._connections.turns.forget(self._flow)
        self._connections.remove(self)

    def pause_writing(self) -> None:
        """Stop reading and answering: the client does not read."""
        self.is_write_paused = True
        self._flow.pause_reading(UNCONSUMED)

    def resume_writing(self) -> None:
        """Continue to read and answer."""
        self.is_write_paused = False
        self._flow.resume_reading(UNCONSUMED)
        self._resume(list(self._streams.values()))

    # what streams use

    def write(self, data: bytes) -> None:
        """Write bytes, with all others of this turn of the event loop: each write of a transport
        costs more than most frames."""
        self._out.append(data)
        if len(self._out) == 1:
            self.loop.call_soon(self._flush)

    def update_window(self, stream_id: int, size: int) -> None:
        """Send WINDOW_UPDATE: the client may send as many bytes more."""
        self.write(encode_frame(FrameType.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", size)))

    def send_later(self, stream: Http2Stream) -> None:
        """Send the unsent bytes of a stream once the client's windows allow it; the stream is reset
        if they do not in time."""
        if stream not in self._unsent:
            self._unsent[stream] = self.loop.time()
            if self._expiry is None:
                timeout_s = self._connections.limits.send_timeout_s
                self._expiry = self.loop.call_later(timeout_s, self._expire_unsent)

    def remove(self, stream: Http2Stream) -> None:
        """Forget a stream that has ended."""
        stream.is_open = False
        self._streams.pop(stream.id, None)
        self._unsent.pop(stream, None)
        stream.release()
        self._close_if_done()

    def _flush(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        if data and not self._is_lingering and not self.transport.is_closing():
            self.transport.write(data)

    def _send_unsent(self, streams: list[Http2Stream]) -> None:
        sent, now_s = [], self.loop.time()
        for stream in streams:
            before = len(stream.unsent)
            if stream.send():
                self._unsent.pop(stream, None)
                sent.append(stream)
            elif len(stream.unsent) < before:
                self._unsent[stream] = now_s
        self._resume(sent)

    def _resume(self, streams: list[Http2Stream]) -> None:
        for stream in streams:
            if stream.is_open and stream.can_write:
                stream.resume()

    def _expire_unsent(self) -> None:
        timeout_s = self._connections.limits.send_timeout_s
        since_s = self.loop.time() - timeout_s
        for stream in [each for each, began_s in self._unsent.items() if began_s <= since_s]:
            stream.cancel()
            stream.reset(ErrorCode.CANCEL)
        self._expiry = None
        if self._unsent:
            self._expiry = self.loop.call_later(timeout_s / 4, self._expire_unsent)

    def _close_if_done(self) -> None:
        if self._is_retiring and not self._streams and not self._is_lingering:
            self._flush()
            self._linger()

    def _write_goaway(self, code: ErrorCode, detail: str = "") -> None:
        payload = struct.pack(">II", self._last_id, code) + detail.encode()
        self.write(encode_frame(FrameType.GOAWAY, 0, 0, payload))

    def _fail(self, error: Http2Error) -> None:
        log.info("http2_connection_failed", code=error.code.name, detail=str(error))
        self._write_goaway(error.code, str(error))
        self._cancel_streams()
        self._flush()
        self._linger()

    def _cancel_streams(self) -> None:
        streams, self._streams = self._streams, {}
        self._unsent.clear()
        for stream in streams.values():
            stream.cancel()
            stream.is_open = False
            stream.release()

    # frames

    def _process(self, data: bytes) -> bytes:
        """Process complete frames; returns the bytes after them."""
        at, size = 0, len(data)
        self._work = 0
        if not self._has_preface:
            if not data.startswith(PREFACE[:size]):
                self.abort()
                return b""
            if size < len(PREFACE):
                return data
            at, self._has_preface = len(PREFACE), True
        while size - at >= 9 and not self._is_lingering:
            head, flags, stream_id = FRAME_HEADER.unpack_from(data, at)
            length, kind = head >> 8, head & 255
            if length > MAX_FRAME_BYTES:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "a frame is too long")
            begin, at = at, at + 9 + length
            if at > size:
                return data[begin:]
            if self._block is not None and kind != FrameType.CONTINUATION:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "expected CONTINUATION")
            receive = self._handlers.get(kind)
            if receive is None:
                # PRIORITY, and unknown types: they are ignored, as the protocol requires
                self._count_control_frame()
            else:
                receive(flags, stream_id & _MAX_WINDOW, data[begin + 9 : at])
            self._work += 1
            if self._work >= WORK_AT_ONCE:
                self._connections.turns.wait(self._flow, self._continue)
                break
        return data[at:]

    def _continue(self) -> None:
        self.data_received(b"")

    def _receive_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._unrestored_bytes += size
        if self._unrestored_bytes >= CONNECTION_WINDOW // 2:
            self.update_window(0, self._unrestored_bytes)
            self._unrestored_bytes = 0
        stream = self._streams.get(stream_id)
        if stream is None or stream.has_received_all or stream.trailers is not None:
            self._check_was_opened(stream_id)
            self._count_control_frame()
            return
        stream.unread_bytes += size
        if stream.unread_bytes > STREAM_WINDOW:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "the window of a stream is exceeded")
        if flags & PADDED:
            payload = without_padding(payload)
        ends = flags & END_STREAM
        if payload:
            stream.receive(payload)
        elif not ends:
            self._count_control_frame()
        if ends:
            self._end_request(stream)
        elif stream.is_open:
            stream.restore_window()

    def _receive_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = without_padding(payload)
        if flags & PRIORITY:
            check_length(payload[:5], 5)
            payload = payload[5:]
        if flags & END_HEADERS:
            self._open(flags, stream_id, payload)
        else:
            self._block = flags, stream_id, bytearray(payload)

    def _receive_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._count_control_frame()
        if self._block is None or self._block[1] != stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "unexpected CONTINUATION")
        first_flags, _, block = self._block
        block += payload
        if len(block) > MAX_HEADERS_BYTES:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & END_HEADERS:
            self._block = None
            self._open(first_flags, stream_id, bytes(block))

    def _open(self, flags: int, stream_id: int, block: bytes) -> None:
        """Open the stream of a header block, or end its request with trailers."""
        self._work += BLOCK_WORK + len(block) // 16
        head = self._heads.decode(block)
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.has_received_all:
            if not flags & END_STREAM:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "trailers without END_STREAM")
            self._end_request(stream)
            return
        if stream_id <= self._last_id or not stream_id % 2:
            if not stream_id % 2:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "expected an odd stream identifier")
            self._count_control_frame()
            return
        if self._is_retiring:
            # its identifier is above that of GOAWAY, so its client knows that it was not processed
            return
        self._last_id = stream_id
        if len(self._streams) >= MAX_STREAMS:
            self._count_control_frame()
            self.write(encode_reset(stream_id, ErrorCode.REFUSED_STREAM))
            return
        stream = self._accept(self, stream_id, head)
        if not stream.is_open:
            return
        self._streams[stream_id] = stream
        if flags & END_STREAM:
            self._end_request(stream)

    def _end_request(self, stream: Http2Stream) -> None:
        stream.has_received_all = True
        if stream.is_open and stream.trailers is None:
            stream.receive_end()

    def _receive_reset(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._count_control_frame()
        self._check_was_opened(stream_id)
        check_length(payload, 4)
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.cancel()
            self.remove(stream)

    def _receive_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._count_control_frame()
        if flags & ACK:
            return
        if len(payload) % _SETTING.size:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "expected SETTINGS of 6 bytes each")
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW:
                _check_window(value)
                self.initial_window = value
                self._is_window_wider = True
        self.write(encode_frame(FrameType.SETTINGS, ACK, 0))

    def _receive_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._count_control_frame()
        check_length(payload, 8)
        if not flags & ACK:
            self.write(encode_frame(FrameType.PING, ACK, 0, payload))

    def _receive_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        check_length(payload, 4)
        size = int.from_bytes(payload) & _MAX_WINDOW
        if not size:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0 bytes")
        if stream_id == 0:
            self.window += size
            _check_window(self.window)
            self._is_window_wider = True
            return
        self._check_was_opened(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.window += size
            _check_window(stream.window + self.initial_window)
            if stream in self._unsent:
                self._send_unsent([stream])

    def _check_was_opened(self, stream_id: int) -> None:
        """Reject frames of idle streams. Those of closed streams are ignored: their client may not
        have received the end yet."""
        if (stream_id > self._last_id and not self._is_retiring) or not stream_id % 2:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a frame of an idle stream")

    def _count_control_frame(self) -> None:
        self._control_frames += 1
        if self._control_frames > MAX_CONTROL_FRAMES + self.progress - self._control_progress:
            now_s = self.loop.time()
            if now_s - self._control_since_s < CONTROL_INTERVAL_S:
                raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")
            self._control_frames, self._control_since_s = 1, now_s
            self._control_progress = self.progress


def _check_window(size: int) -> None:
    if size > _MAX_WINDOW:
        raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window exceeds 2^31 - 1")
