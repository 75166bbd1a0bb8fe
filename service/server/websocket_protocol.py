"""One WebSocket: uvicorn's protocol, with the limits, backpressure and closes of the service.

The application is called once, in ASGI's way: it accepts the handshake, then receives messages, one
at a time. What it is not ready for stays unparsed, and while anything is unparsed the connection is
not read (backpressure through TCP): a connection buffers one read, one incomplete message and
unsent ones. It sends messages by `send_now`, without waiting, since outcomes come by callbacks.

`Connections` enforces timeouts and the limits of all connections together. A connection is closed
only after the client had time to read what was sent last (lingering close).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidHeader, InvalidUpgrade
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from service.core.errors import CarryError
from service.server.connections import Connections, Phase
from service.server.errors import MalformedRequest, UpgradeRequired

PIECE_BYTES: Final = 4 * 1024
"""Maximum bytes given to the parser before other tasks run: it allocates an object for each frame,
and one read may have ten thousands of them, which takes tens of milliseconds."""

PROBE_S: Final = 0.5
"""Time between two writes to a client that closed its sending side."""

MAX_LIST_ITEMS: Final = 64
"""Maximum items of the lists in a handshake: the library takes a microsecond for each."""

STOPPING: Final = "the service is stopping: connect again, and continue at your position"

_LISTS: Final = ("Connection", "Upgrade", "Sec-WebSocket-Protocol")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Session(Protocol):
    """What the protocol asks of the application."""

    @property
    def unanswered(self) -> int:
        """Messages that have not been answered."""

    def cancel(self) -> None:
        """Drop them: nobody waits for the answers any more."""


class WebSockets(NamedTuple):
    """The WebSockets of an application.

    Attributes:
        serves: whether an address, with its query, is one of a WebSocket.
        app: serves one, until it is closed; its `scope` has the protocol as `scope["socket"]`.
        max_bytes: largest message.
        idle_s: one without a message for this long is closed; 0 never.
    """

    serves: Callable[[bytes], object]
    app: Callable[[Message, Receive, Send], Awaitable[None]]
    max_bytes: int
    idle_s: float


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


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket, from its handshake on.

    Args:
        error_response: as of `http_protocol.HttpState`.
        options: of uvicorn's protocol.

    Attributes:
        session: set by the application before it accepts the handshake.
        received_bytes, sent_bytes: of frames.
        transport_name, progress, body_bytes, body_began_s: see `connections.Connection`.
    """

    transport_name = "websocket"

    def __init__(
        self,
        websockets: WebSockets,
        connections: Connections,
        error_response: Callable[[CarryError], bytes],
        **options: Any,
    ):
        super().__init__(**options)
        # its lines at `info` name streams, or repeat those of the service
        self.logger = logging.getLogger("websockets.server")
        self.logger.setLevel(logging.WARNING)
        self.conn = _Library(max_size=websockets.max_bytes, logger=self.logger)
        self.app = websockets.app
        self._idle_s = websockets.idle_s
        self._connections = connections
        self._error_response = error_response
        self.session: Session | None = None
        self._message: bytearray | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._unparsed = b""
        self._parsed_bytes = 0
        self._half_closed = False
        self._has_ended = False
        self._is_lingering = False
        self._has_pinged = False
        self._last_message_s = self.loop.time()
        self.received_bytes = self.sent_bytes = 0
        self.progress = 0
        self.body_bytes = 0
        self.body_began_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the connection of an upgrade."""
        super().connection_made(transport)
        self._connections.add(self, self.loop, transport.get_extra_info("peername"))
        # nothing is read before the handshake is answered
        self._set_reading()

    def open(self, head: bytes) -> None:
        """Start the handshake with this head."""
        self.conn.receive_data(head)
        self.handle_events()
        if not (self.handshake_initiated or self._is_lingering):
            self.reject(self._error_response(MalformedRequest("expected a WebSocket handshake")))

    def handle_connect(self, event: Request) -> None:
        """Start the application, unless the handshake is wrong."""
        try:
            super().handle_connect(event)
        except CarryError as error:
            self.reject(self._error_response(error))
        else:
            self.scope["socket"] = self  # type: ignore[typeddict-unknown-key]

    def reject(self, response: bytes) -> None:
        """Answer the handshake with an error, and close the connection."""
        self.transport.write(response)
        self._linger()

    async def accept(self, subprotocol: str | None, headers: list[tuple[bytes, bytes]]) -> None:
        """Accept the handshake, unless the client disconnected."""
        with suppress(ClientDisconnected):
            await self.send(
                {"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers}
            )

    async def run_asgi(self) -> None:
        """Run the application, and close the connection after it."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except Exception:
            self.logger.exception("a WebSocket failed")
            self.fail(CloseCode.INTERNAL_ERROR, "")
        finally:
            self._linger()

    def data_received(self, data: bytes) -> None:
        """Keep received bytes until the application is ready for a message."""
        self.progress += 1
        self._has_pinged = False
        self.received_bytes += len(data)
        if not self._is_lingering:
            self._unparsed = self._unparsed[self._parsed_bytes :] + data if self._unparsed else data
            self._parsed_bytes = 0
            self._set_reading()
            self._wake()

    async def receive(self) -> Any:
        """The next message, or the disconnect; one in each iteration of the event loop."""
        if not self.queue.empty():
            await asyncio.sleep(0)
        while self.queue.empty():
            if self._unparsed and not self.writable.is_set():
                # a client that reads no pongs gets no more of them
                await self.writable.wait()
            elif self._unparsed:
                self._parse_piece()
                if self.queue.empty():
                    await asyncio.sleep(0)
            elif self._half_closed:
                self._end(CloseCode.NORMAL_CLOSURE)
            else:
                self._set_reading()
                self._waiter = self.loop.create_future()
                await self._waiter
        return self.queue.get_nowait()

    def _wake(self) -> None:
        """Wake the task that waits in `receive`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _parse_piece(self) -> None:
        start, self._parsed_bytes = self._parsed_bytes, self._parsed_bytes + PIECE_BYTES
        piece = self._unparsed[start : self._parsed_bytes]
        if self._parsed_bytes >= len(self._unparsed):
            self._unparsed = b""
        self.conn.receive_data(piece)
        self.handle_events()
        if self.conn.parser_exc is not None:
            self._finish_close()
        incomplete = len(self.conn.reader.buffer) + len(self._message or b"".join(self.frames))
        if (incomplete or self.body_bytes) and not self._is_lingering:
            if not self.body_bytes:
                self.body_began_s = self.loop.time()
            self._connections.set_body_bytes(self, incomplete)
        self._set_reading()

    def _set_reading(self) -> None:
        """Read the socket exactly when nothing is unparsed: also while the application does not
        receive, since only a socket that is read notices a disconnect."""
        is_waiting = bool(self._unparsed) or not self.handshake_complete
        pauses = is_waiting and not self._is_lingering
        if pauses == self.read_paused or self.transport.is_closing():
            return
        self.read_paused = pauses
        if pauses:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def handle_cont(self, event: Frame) -> None:
        """Add a fragment to its message, in one buffer: each object would take 40 bytes more."""
        if self._message is None:
            self._message = bytearray(self.frames.pop())
        self._message += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        """Queue a complete message for the application."""
        data = self.frames.pop() if self._message is None else self._message
        self._message = None
        self._last_message_s = self.loop.time()
        if self.curr_msg_data_type == "bytes":
            self.queue.put_nowait({"type": "websocket.receive", "bytes": bytes(data)})
            return
        try:
            self.queue.put_nowait({"type": "websocket.receive", "text": data.decode()})
        except UnicodeDecodeError as error:
            self.fail(CloseCode.INVALID_DATA, f"expected UTF-8 in text frames: {error.reason}")

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
        self.conn.fail(code, reason)
        self._finish_close()

    def _finish_close(self) -> None:
        self._flush()
        self._end(CloseCode.NORMAL_CLOSURE)
        self._linger()

    def _end(self, code: int) -> None:
        """Let the application receive no further message but those that are complete."""
        if not self._has_ended:
            self._has_ended = True
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
            self._wake()

    def _linger(self) -> None:
        """Lingering close: flush, send FIN, and discard further input for a moment."""
        if self._is_lingering:
            return
        self._is_lingering = True
        self._unparsed = b""
        self.frames, self._message = [], None
        if self.session is not None:
            self.session.cancel()
        self._connections.set_body_bytes(self, 0)
        if self.transport.is_closing():
            return
        is_last = self._half_closed or self.conn.close_rcvd is not None
        if is_last or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self._set_reading()
            self.transport.write_eof()

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self.conn.state is State.OPEN and not self.transport.is_closing()

    @property
    def phase(self) -> Phase:
        """What the connection is waiting for."""
        is_closing = self._is_lingering or self.transport.is_closing()
        if not self.writable.is_set() or (is_closing and self.transport.get_write_buffer_size()):
            return Phase.SEND
        if is_closing or self.conn.state is State.CLOSING:
            return Phase.LINGER
        if not self.handshake_complete or self.requests:
            return Phase.SERVICE
        return Phase.BODY if self.body_bytes else Phase.LIVE

    @property
    def requests(self) -> int:
        """Messages that have not been answered."""
        return 0 if self.session is None else self.session.unanswered

    @property
    def unsent_bytes(self) -> int:
        """Bytes of messages that wait for the client to read."""
        return self.transport.get_write_buffer_size()

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
        elif self._idle_s and self.loop.time() - self._last_message_s > self._idle_s:
            self.close(CloseCode.GOING_AWAY, f"no chunk for {self._idle_s:g} s")
        else:
            self._has_pinged = True
            self.progress += 1
            self._ping()

    def _ping(self) -> None:
        self.conn.send_ping(b"carry")
        self._flush()

    def shed_body(self) -> None:
        """Reject the message that is being received: all bodies together exceed the limit."""
        self.fail(CloseCode.TRY_AGAIN_LATER, "too many bytes of incomplete messages")

    def abort(self) -> None:
        """Close the connection at once and drop unsent messages."""
        self.transport.abort()

    def resume_writing(self) -> None:
        """Resume sending: the client reads again."""
        super().resume_writing()
        self.progress += 1

    def shutdown(self) -> None:
        """Graceful shutdown: the application answers what it has received, then closes."""
        self._end(CloseCode.SERVICE_RESTART)

    def retire(self) -> None:
        """As `shutdown`; the client then reconnects to the process that replaces this one."""
        self.shutdown()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Handle a half-close: the client disconnected, or waits for its outcomes."""
        if not self.is_open or not (self.requests or self._unparsed or self.queue.qsize()):
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
        super().connection_lost(exc)
        self._wake()
