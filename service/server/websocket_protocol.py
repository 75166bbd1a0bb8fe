"""One WebSocket: the sans-I/O protocol of `websockets`, with the limits and closes of the service.

The application is called once, with the socket: it accepts the handshake, then receives messages,
one at a time. What it is not ready for stays unparsed, and while anything is unparsed the
connection is not read (backpressure through TCP): a connection buffers one read or two, one
incomplete message and unsent ones. It sends messages by `send_now`, without waiting, since outcomes
come by callbacks.

`Connections` enforces timeouts and the limits of all connections together. A connection is closed
only after the client had time to read what was sent last (lingering close).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeader, InvalidUpgrade
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from service.core.errors import CarryError
from service.server.connections import Connection, Phase
from service.server.errors import MalformedRequest, UpgradeRequired
from service.server.interface import HTTP_STATE, Session, WebSockets

PIECE_BYTES: Final = 4 * 1024
"""Maximum bytes given to the parser before other tasks run: it allocates an object for each frame,
and one read may have ten thousands of them, which takes tens of milliseconds."""

PROBE_S: Final = 0.5
"""Time between two writes to a client that closed its sending side."""

MAX_LIST_ITEMS: Final = 64
"""Maximum items of the lists in a handshake: the library takes a microsecond for each."""

_LISTS: Final = ("Connection", "Upgrade", "Sec-WebSocket-Protocol")

_logger = logging.getLogger("websockets.server")
# its lines at `info` repeat those of the service
_logger.setLevel(logging.WARNING)


class _Library(ServerProtocol):
    """The library's protocol, whose handshake raises errors of the service."""

    def accept(self, request: Request) -> Response:
        """The response that switches the protocol.

        Raises:
            UpgradeRequired, MalformedRequest
        """
        lists = [value for name in _LISTS for value in request.headers.get_all(name)]
        items = sum([value.count(",") + 1 for value in lists])
        if items > MAX_LIST_ITEMS:
            raise MalformedRequest(
                f"{', '.join(_LISTS)}: expected at most {MAX_LIST_ITEMS} items, got {items}"
            )
        response = super().accept(request)
        if (failure := self.handshake_exc) is not None:
            versions = request.headers.get_all("Sec-WebSocket-Version")
            has_other_version = len(versions) == 1 and versions != ["13"]
            needs_upgrade = isinstance(failure, InvalidUpgrade) or has_other_version
            kind = UpgradeRequired if needs_upgrade else MalformedRequest
            reason = str(failure)[:300]
            if isinstance(failure, InvalidHeader) and failure.name == "Sec-WebSocket-Protocol":
                # the header may contain an access key
                reason = f"invalid {failure.name} header"
            raise kind(f"expected a WebSocket handshake: {reason}")
        return response


class WebSocketProtocol(asyncio.Protocol, Connection):
    """One WebSocket, from its handshake on.

    Args:
        http: the protocol of the connection until now.

    Attributes:
        url, headers: of the handshake; no headers once it is accepted.
        session: set by the application before it accepts the handshake.
        read_paused: whether the socket is not read.
        end_code: the close code of a socket that receives nothing more; 0 until then.
        received_bytes, sent_bytes: of frames.
    """

    transport_name = "websocket"

    def __init__(self, http: HttpToolsProtocol, websockets: WebSockets):
        self.loop, self.transport = http.loop, http.transport
        self.url, self.headers = http.url, http.headers
        self.conn = _Library(state=State.OPEN, max_size=websockets.max_bytes, logger=_logger)
        self._server_state = http.server_state
        self._websockets = websockets
        self._connections, self._error_response, *_ = http.app_state[HTTP_STATE]
        self.session: Session | None = None
        self._response: Response | None = None
        self._has_accepted = False
        self.read_paused = False
        self._is_write_paused = False
        # an empty deque takes 0.7 KB of each idle socket
        self._received: list[tuple[bytes, bool] | None] = []
        self._message: bytearray | None = None
        self._is_text = False
        self._waiter: asyncio.Future[None] | None = None
        self._unparsed = b""
        self._parsed_bytes = 0
        self.end_code = 0
        self._has_pinged = False
        self._last_message_s = self.loop.time()
        self.received_bytes = self.sent_bytes = 0

    @classmethod
    def take_over(cls, http: HttpToolsProtocol, websockets: WebSockets) -> None:
        """Serve the connection of a request for an upgrade, and start the handshake."""
        socket = cls(http, websockets)
        http.transport.set_protocol(socket)
        # uvicorn calls `shutdown` of each
        http.server_state.connections.add(socket)  # type: ignore[arg-type]
        socket._connections.add(socket)
        # nothing is read before the handshake is answered
        socket._set_reading()
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in http.headers]
        try:
            socket._response = socket.conn.accept(Request(http.url.decode(), Headers(fields)))
        except CarryError as error:
            socket.reject(socket._error_response(error))
            return
        task, tasks = socket.loop.create_task(socket._serve()), http.server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def reject(self, response: bytes) -> None:
        """Answer the handshake with an error, and close the connection."""
        self.transport.write(response)
        self._linger()

    def accept(self, subprotocol: str | None, headers: list[tuple[bytes, bytes]]) -> None:
        """Accept the handshake, unless the client disconnected."""
        response, self._response, self.headers = self._response, None, []
        if response is None or self.transport.is_closing():
            return
        del response.headers["Date"]
        for name, value in headers:
            response.headers[name.decode()] = value.decode("latin-1")
        if subprotocol is not None:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        self._has_accepted = True
        self.transport.write(response.serialize())

    async def _serve(self) -> None:
        """Run the application, and close the connection after it."""
        try:
            await self._websockets.serve(self)
        except Exception:
            _logger.exception("a WebSocket failed")
            self.fail(CloseCode.INTERNAL_ERROR, "")
        finally:
            self._linger()

    def data_received(self, data: bytes) -> None:
        """Keep received bytes until the application is ready for a message."""
        # parts of a message do not extend its time
        self.progress += not self.body_bytes
        self._has_pinged = False
        self.received_bytes += len(data)
        if not self._is_lingering:
            self._unparsed = self._unparsed[self._parsed_bytes :] + data if self._unparsed else data
            self._parsed_bytes = 0
            # not paused for a moment: that would take two system calls
            if not self._wake():
                self._set_reading()

    async def receive(self) -> tuple[bytes, bool] | None:
        """The next message, and whether it is text; None at the end of all (`end_code`).

        One in each iteration of the event loop.
        """
        if self._received:
            await asyncio.sleep(0)
        while not self._received:
            # a client that reads no pongs gets no more of them
            if self._unparsed and not self._is_write_paused:
                self._parse_piece()
                if not self._received:
                    await asyncio.sleep(0)
            elif self._half_closed and not self._unparsed:
                self._end(CloseCode.NORMAL_CLOSURE)
            else:
                self._set_reading()
                self._waiter = self.loop.create_future()
                await self._waiter
        return self._received.pop(0)

    def _wake(self) -> bool:
        """Wake the task that waits in `receive`; returns whether there is one."""
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(None)
        return True

    def _parse_piece(self) -> None:
        start, self._parsed_bytes = self._parsed_bytes, self._parsed_bytes + PIECE_BYTES
        piece = self._unparsed[start : self._parsed_bytes]
        if self._parsed_bytes >= len(self._unparsed):
            self._unparsed = b""
        self.conn.receive_data(piece)
        for event in self.conn.events_received():
            if isinstance(event, Frame):
                self._receive_frame(event)
        self._flush()
        if self.conn.parser_exc is not None:
            self._finish_close()
        incomplete = len(self.conn.reader.buffer) + len(self._message or b"")
        if (incomplete or self.body_bytes) and not self._is_lingering:
            if not self.body_bytes:
                self.body_began_s = self.loop.time()
            self._connections.set_body_bytes(self, incomplete)
        self._set_reading()

    def _set_reading(self) -> None:
        """Read the socket exactly when nothing is unparsed: also while the application does not
        receive, since only a socket that is read notices a disconnect."""
        is_waiting = bool(self._unparsed) or not self._has_accepted
        pauses = is_waiting and not self._is_lingering
        if pauses == self.read_paused or self.transport.is_closing():
            return
        self.read_paused = pauses
        if pauses:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _receive_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            # the client closes the socket, or answers its close
            self._flush()
            self._end(CloseCode.NORMAL_CLOSURE)
            self.transport.close()
        elif frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._is_text = frame.opcode is Opcode.TEXT
            if frame.fin:
                self._receive_message(bytes(frame.data))
            else:
                # fragments are in one buffer: each object would take 40 bytes more
                self._message = bytearray(frame.data)
        elif frame.opcode is Opcode.CONT and self._message is not None:
            self._message += frame.data
            if frame.fin:
                data, self._message = bytes(self._message), None
                self._receive_message(data)

    def _receive_message(self, data: bytes) -> None:
        """Queue a complete message for the application."""
        self.progress += 1
        self._last_message_s = self.loop.time()
        try:
            if self._is_text and not data.isascii():
                data.decode()
        except UnicodeDecodeError as error:
            self.fail(CloseCode.INVALID_DATA, f"expected UTF-8 in text frames: {error.reason}")
        else:
            self._received.append((data, self._is_text))

    def send_now(self, message: bytes, *, is_text: bool) -> None:
        """Send a message, unless the socket is closing."""
        if not self.is_open:
            return
        if is_text:
            self.conn.send_text(message)
        else:
            self.conn.send_binary(message)
        self._flush()

    def _flush(self) -> None:
        """Write what the library has to send."""
        data = b"".join(self.conn.data_to_send())
        if data and not self.transport.is_closing():
            self.sent_bytes += len(data)
            self.transport.write(data)

    def close(self, code: int, reason: str) -> None:
        """Close the socket, once the application has received what is complete."""
        if self.is_open:
            self.conn.send_close(code, reason)
            self._flush()
            self._end(code)

    def fail(self, code: int, reason: str) -> None:
        """Close without waiting for the client's close frame."""
        if self._has_accepted:
            self.conn.fail(code, reason)
        self._finish_close()

    def _finish_close(self) -> None:
        self._flush()
        self._end(CloseCode.NORMAL_CLOSURE)
        self._linger()

    def _end(self, code: int) -> None:
        """Let the application receive no further message but those that are complete."""
        if not self.end_code:
            self.end_code = code
            self._received.append(None)
            self._wake()

    def _drop_received(self) -> None:
        self._unparsed, self._message = b"", None
        if self.session is not None:
            self.session.cancel()
        # nothing comes after the client's close frame
        self._half_closed |= self.conn.close_rcvd is not None
        self._set_reading()

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        is_connected = self._has_accepted and not self.transport.is_closing()
        return is_connected and self.conn.state is State.OPEN

    @property
    def phase(self) -> Phase:
        """What the connection is waiting for."""
        if (closing := self._closing_phase(write_paused=self._is_write_paused)) is not None:
            return closing
        if self.conn.state is State.CLOSING:
            return Phase.LINGER
        if not self._has_accepted or self.requests:
            return Phase.SERVICE
        return Phase.BODY if self.body_bytes else Phase.LIVE

    @property
    def requests(self) -> int:
        """Messages that have not been answered."""
        return 0 if self.session is None else self.session.unanswered

    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase; a live socket is pinged, and closed without an answer."""
        if phase is Phase.SEND or self._is_lingering:
            self.abort()
        elif phase is Phase.LINGER:
            self._linger()
        elif phase is Phase.BODY:
            self.fail(CloseCode.POLICY_VIOLATION, "the message did not arrive in time")
        elif self._has_pinged:
            self.fail(CloseCode.INTERNAL_ERROR, "no answer to a ping")
        elif 0 < self._websockets.idle_s < self.loop.time() - self._last_message_s:
            self.close(CloseCode.GOING_AWAY, f"no chunk for {self._websockets.idle_s:g} s")
        else:
            self._has_pinged = True
            self.progress += 1
            self._ping()

    def _ping(self) -> None:
        self.conn.send_ping(b"carry")
        self._flush()

    def shed_body(self) -> None:
        """Reject the message that it is receiving, because all bodies together exceed the limit."""
        self.fail(CloseCode.TRY_AGAIN_LATER, "too many bytes of incomplete messages")

    def pause_writing(self) -> None:
        """Parse nothing more: the client does not read."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """Continue to parse: the client reads again."""
        self._is_write_paused = False
        self.progress += 1
        self._wake()

    def shutdown(self) -> None:
        """Graceful shutdown: the application answers what it has received, then closes."""
        self._end(CloseCode.SERVICE_RESTART)

    def retire(self) -> None:
        """Close gracefully; the client then reconnects to the process that replaces this one."""
        self.shutdown()

    def eof_received(self) -> bool | None:
        """Handle a half-close: the client disconnected, or waits for its outcomes."""
        if not self.is_open or not (self.requests or self._unparsed or self._received):
            return None
        self._half_closed = True
        self._wake()
        self.loop.call_later(PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Write a ping: a disconnected client resets the connection upon the first one, so that the
        next write fails."""
        if self.is_open:
            self._ping()
            self.loop.call_later(PROBE_S, self._probe)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected, or the connection was closed."""
        self._linger()
        self._connections.remove(self)
        self._server_state.connections.discard(self)
        self._is_write_paused = False
        self._end(CloseCode.ABNORMAL_CLOSURE)
        self._wake()
