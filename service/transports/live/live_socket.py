"""One WebSocket connection: bytes to frames by the `websockets` library, and its flow control.

At most a window of chunks is unanswered. While it is full, while a long frame is read, or while the
client does not read its outcomes, the socket is not read either (backpressure through TCP): a
connection buffers one read from the socket, one incomplete message and the outcomes of one window.
`Connections` enforces its timeouts and the limits of all connections together.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import time
from typing import Final

import structlog
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from service.codec.media import Media
from service.core.errors import CarryError, Unauthenticated
from service.server.connections import Connections, Phase
from service.server.http_protocol import PROBE_S
from service.server.reading_turns import LONG_BODY_BYTES
from service.server.settings import WebSocketSettings
from service.telemetry.request_lines import access_log
from service.transports.live.fragments import Fragmenter
from service.transports.live.session import Session

PIECE_BYTES: Final = 4 * 1024
"""Maximum bytes given to the parser at once: it allocates an object for each frame."""

TURN_S: Final = 0.005
"""A turn of the event loop processes received bytes no longer than this, and a piece: one read from
the socket may have ten thousands of frames."""

_UTF8: Final = codecs.getincrementaldecoder("utf-8")

UNAUTHENTICATED: Final = 4401
"""Close code of a socket whose access key is no longer accepted."""

ELSEWHERE: Final = "the service is stopping: connect again, and continue at your position"

log = structlog.get_logger(__name__)


class LiveSocket(asyncio.Protocol):
    """One connection after the handshake.

    Attributes:
        route: its address, with the names of its parameters.
        transport_name, progress, body_bytes, body_began_s: see `connections.Connection`.
    """

    transport_name = "websocket"

    __slots__ = (
        "_buffered",
        "_connections",
        "_decoder",
        "_fragmenter",
        "_half_closed",
        "_has_pinged",
        "_is_draining",
        "_is_lingering",
        "_is_read_paused",
        "_is_read_scheduled",
        "_is_write_paused",
        "_last_chunk_s",
        "_loop",
        "_media",
        "_message",
        "_messages",
        "_opened_s",
        "_parsed_bytes",
        "_received_bytes",
        "_request_id",
        "_sent_bytes",
        "_server",
        "_session",
        "_settings",
        "_transport",
        "_waits_for_turn",
        "_websocket",
        "body_began_s",
        "body_bytes",
        "progress",
        "route",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        server: ServerState,
        connections: Connections,
        settings: WebSocketSettings,
        max_frame_bytes: int,
        *,
        request_id: bytes,
        route: str,
        logger: logging.Logger,
    ):
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._server = server
        self._connections = connections
        self._settings = settings
        self._request_id = request_id
        self.route = route
        self._websocket = ServerProtocol(state=State.OPEN, max_size=max_frame_bytes, logger=logger)
        self._fragmenter = Fragmenter(max_frame_bytes)
        self._session: Session | None = None
        self._messages: list[tuple[Media, bytes | bytearray]] = []
        self._message: bytearray | None = None
        self._decoder: codecs.IncrementalDecoder | None = None
        self._media = Media.JSON
        self._buffered = b""
        self._parsed_bytes = 0
        self._waits_for_turn = False
        # nothing is to be read before the handshake is answered
        transport.pause_reading()
        self._is_read_paused = True
        self._is_read_scheduled = False
        self._is_write_paused = False
        self._is_draining = False
        self._is_lingering = False
        self._half_closed = False
        self._has_pinged = False
        self._received_bytes = self._sent_bytes = 0
        self._opened_s = self._last_chunk_s = self._loop.time()
        self.progress = 0
        self.body_bytes = 0
        self.body_began_s = 0.0
        connections.add(self, self._loop, transport.get_extra_info("peername"))
        server.connections.add(self)  # type: ignore[arg-type]

    def start(self, session: Session, response: bytes, hello: bytes) -> None:
        """Send the response of the handshake and the hello, and read frames."""
        self._session = session
        if self._transport.is_closing():
            return
        session.open()
        self._transport.write(response)
        self.send(Media.JSON, hello)
        if self._is_draining:
            self._drain()
        self._read()

    def reject(self, response: bytes) -> None:
        """Answer the handshake with an error, and close the connection."""
        self._transport.write(response)
        self._linger()

    def send(self, media: Media, message: bytes) -> None:
        """Send a message, unless the socket is closing."""
        if self._websocket.state is not State.OPEN or self._transport.is_closing():
            return
        if media is Media.JSON:
            self._websocket.send_text(message)
        else:
            self._websocket.send_binary(message)
        self._write()

    def on_progress(self) -> None:
        """Continue after outcomes were sent, or a long frame was read."""
        self.progress += 1
        if self._is_draining:
            self._drain()
        if self._messages or self._buffered or self._is_read_paused:
            self._read()
        if self._half_closed and not self._is_answering:
            self._close(CloseCode.NORMAL_CLOSURE, "")

    def data_received(self, data: bytes) -> None:
        """Process received bytes, after those that were buffered."""
        self.progress += 1
        self._has_pinged = False
        self._received_bytes += len(data)
        if self._is_lingering:
            return
        self._buffered = self._buffered[self._parsed_bytes :] + data if self._buffered else data
        self._parsed_bytes = 0
        if self.body_bytes > LONG_BODY_BYTES:
            self._waits_for_turn = True
            self._connections.turns.wait(self, self._take_turn)
        self._read()

    def _take_turn(self) -> None:
        self._waits_for_turn = False
        self._set_reading()

    @property
    def _is_answering(self) -> bool:
        """Whether a chunk has not been answered."""
        session = self._session
        return session is not None and (session.unanswered > 0 or session.is_reading)

    @property
    def _is_blocked(self) -> bool:
        """Whether the next message has to wait. Once the socket is closing, none has: all but the
        client's close frame is discarded."""
        session = self._session
        return self._websocket.state is State.OPEN and (
            session is None
            or session.unanswered >= self._settings.pipelining_window
            or session.is_reading
            or self._is_write_paused
            or self._is_draining
        )

    def _read(self) -> None:
        """Process messages and buffered bytes as far as possible; the rest in later turns."""
        end_s = time.monotonic() + TURN_S
        while not self._is_lingering and not self._is_blocked:
            if self._messages:
                media, message = self._messages.pop(0)
                if self._session is not None and self._websocket.state is State.OPEN:
                    self._last_chunk_s = self._loop.time()
                    self._session.receive(media, message)
            elif self._buffered:
                start, self._parsed_bytes = self._parsed_bytes, self._parsed_bytes + PIECE_BYTES
                piece = self._buffered[start : self._parsed_bytes]
                if self._parsed_bytes >= len(self._buffered):
                    self._buffered = b""
                self._parse(piece)
            else:
                break
            if time.monotonic() > end_s:
                self._schedule_read()
                break
        if self._is_lingering:
            self._buffered = b""
            self._messages.clear()
        self._set_reading()

    def _schedule_read(self) -> None:
        """Continue in the next turn of the event loop."""
        if not self._is_read_scheduled:
            self._is_read_scheduled = True
            self._loop.call_soon(self._continue_read)

    def _continue_read(self) -> None:
        self._is_read_scheduled = False
        self._read()

    def _set_reading(self) -> None:
        """Read from the socket exactly when nothing that was read is waiting: also while the next
        message would have to wait, since only a socket that is read notices a disconnect."""
        is_waiting = bool(self._buffered) or bool(self._messages) or self._waits_for_turn
        pauses = not self._is_lingering and is_waiting
        if pauses == self._is_read_paused or self._transport.is_closing():
            return
        self._is_read_paused = pauses
        if pauses:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        self._websocket.receive_data(self._fragmenter.split(data))
        for event in self._websocket.events_received():
            if isinstance(event, Frame):
                try:
                    self._collect(event)
                except UnicodeDecodeError as error:
                    self._fail(
                        CloseCode.INVALID_DATA, f"expected UTF-8 in text frames: {error.reason}"
                    )
                    break
        self._write()
        incomplete = len(self._websocket.reader.buffer) + len(self._message or b"")
        if incomplete or self.body_bytes:
            if not self.body_bytes:
                self.body_began_s = self._loop.time()
            self._connections.set_body_bytes(self, incomplete)

    def _collect(self, frame: Frame) -> None:
        """Add a frame to its message.

        Raises:
            UnicodeDecodeError: a text message is not UTF-8, up to this frame.
        """
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            is_text = frame.opcode is Opcode.TEXT
            self._media = Media.JSON if is_text else Media.MSGPACK
            if not frame.fin:
                self._message = bytearray()
                self._decoder = _UTF8() if is_text else None
            elif is_text and not (text := bytes(frame.data)).isascii():
                text.decode()
        elif frame.opcode is not Opcode.CONT:
            return
        if self._message is None:
            self._messages.append((self._media, bytes(frame.data)))
            return
        if self._decoder is not None:
            self._decoder.decode(frame.data, final=frame.fin)
        self._message += frame.data
        if frame.fin:
            self._messages.append((self._media, self._message))
            self._message = self._decoder = None

    def _write(self) -> None:
        """Write what the library has to send.

        An empty part ends the stream, and so does a close frame that the client cannot answer.
        """
        parts = self._websocket.data_to_send()
        if parts and not self._transport.is_closing():
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            self._sent_bytes += len(data)
            self._transport.write(data)
        if self._websocket.state is not State.OPEN and (b"" in parts or self._half_closed):
            self._linger()

    def _close(self, code: int, reason: str) -> None:
        """Start the closing handshake; the connection is closed when the client answers."""
        if self._websocket.state is State.OPEN:
            self._websocket.send_close(code, reason)
            self._write()

    def _fail(self, code: int, reason: str) -> None:
        """Close without waiting for the client's close frame."""
        self._websocket.fail(code, reason)
        self._write()

    def _linger(self) -> None:
        """Lingering close: flush, send FIN, and discard further input for a moment."""
        if self._is_lingering:
            return
        self._is_lingering = True
        if self._session is not None:
            self._session.cancel()
        self._message = self._decoder = None
        self._connections.set_body_bytes(self, 0)
        if self._transport.is_closing():
            return
        is_last = self._half_closed or self._websocket.close_rcvd is not None
        if is_last or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._set_reading()
            self._transport.write_eof()

    @property
    def phase(self) -> Phase:
        """What the connection is waiting for."""
        is_closing = self._is_lingering or self._transport.is_closing()
        if self._is_write_paused or (is_closing and self._transport.get_write_buffer_size()):
            return Phase.SEND
        if is_closing or self._websocket.state is not State.OPEN:
            return Phase.LINGER
        if self._session is None or self._session.unanswered or self._session.is_reading:
            return Phase.SERVICE
        return Phase.BODY if self.body_bytes else Phase.LIVE

    @property
    def requests(self) -> int:
        """Chunks that have not been answered."""
        return 0 if self._session is None else self._session.unanswered

    @property
    def unsent_bytes(self) -> int:
        """Bytes of outcomes that wait for the client to read."""
        return self._transport.get_write_buffer_size()

    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase; a live one is pinged, and closed without an answer."""
        idle_s = self._settings.websocket_idle_s
        if phase is Phase.SEND or self._is_lingering:
            self.abort()
        elif phase is Phase.LINGER:
            self._linger()
        elif phase is Phase.BODY:
            self._fail(CloseCode.POLICY_VIOLATION, "the message did not arrive in time")
        elif self._has_pinged:
            self._fail(CloseCode.INTERNAL_ERROR, "no answer to a ping")
        elif idle_s and self._loop.time() - self._last_chunk_s > idle_s:
            self._close(CloseCode.GOING_AWAY, f"no chunk for {idle_s:g} s")
        else:
            self._has_pinged = True
            self.progress += 1
            self._websocket.send_ping(b"carry")
            self._write()

    def shed_body(self) -> None:
        """Reject the message that is being received: all bodies together exceed the limit."""
        self._fail(CloseCode.TRY_AGAIN_LATER, "too many bytes of incomplete messages")

    def abort(self) -> None:
        """Close the connection at once and drop unsent outcomes."""
        self._transport.abort()

    def pause_writing(self) -> None:
        """The client does not read its outcomes."""
        self._is_write_paused = True
        self._set_reading()

    def resume_writing(self) -> None:
        """The client reads its outcomes again."""
        self._is_write_paused = False
        self.progress += 1
        self._read()

    def shutdown(self) -> None:
        """Graceful shutdown: answer the chunks that were started, then close."""
        self._is_draining = True
        self._drain()
        self._read()

    def retire(self) -> None:
        """As `shutdown`; the client then reconnects to the process that replaces this one."""
        self.shutdown()

    def revoke(self, error: CarryError) -> None:
        """Close the socket: its access key is no longer accepted, or cannot be checked."""
        if self._session is not None:
            self._session.cancel()
        is_revoked = isinstance(error, Unauthenticated)
        self._close(UNAUTHENTICATED if is_revoked else CloseCode.TRY_AGAIN_LATER, error.detail)

    def _drain(self) -> None:
        if self._session is not None and not self._is_answering:
            self._close(CloseCode.SERVICE_RESTART, ELSEWHERE)

    def eof_received(self) -> bool | None:
        """Handle a half-close: the client disconnected, or waits for its outcomes."""
        if self._websocket.state is not State.OPEN or not self._is_answering:
            return None
        self._half_closed = True
        self._loop.call_later(PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Write a ping, as `HttpProtocol` writes an interim response: a disconnected client resets
        the connection upon the first ping, so that the next write fails."""
        if not self._transport.is_closing():
            self._websocket.send_ping(b"carry")
            self._write()
            self._loop.call_later(PROBE_S, self._probe)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected, or the connection was closed."""
        self._connections.remove(self)
        self._server.connections.discard(self)
        session = self._session
        if session is not None:
            session.close()
            stream = session.stream and access_log.named(session.stream)
            close = self._websocket.close_sent or self._websocket.close_rcvd
            log.info(
                "websocket_closed",
                request_id=self._request_id.decode(),
                route=self.route,
                code=CloseCode.ABNORMAL_CLOSURE.value if close is None else close.code,
                model=session.model,
                **({} if stream is None else {"stream": stream}),
                chunks=session.chunks,
                errors=session.errors,
                received_bytes=self._received_bytes,
                sent_bytes=self._sent_bytes,
                ms=round((self._loop.time() - self._opened_s) * 1000, 2),
            )
            self._session = None
