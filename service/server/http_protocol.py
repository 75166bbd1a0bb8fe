"""The service's HTTP protocol: uvicorn's, with a fast path for well-formed chunk requests.

Between two requests, received bytes are shown to the fast routes first; what one of them parses is
answered with one write. Everything else is uvicorn's and FastAPI's (the slow path), from its first
byte. While a request is being answered, or responses wait for the client to read them, further
(pipelined) requests are buffered, and beyond a bound not even read (backpressure). So responses
keep the order of their requests, and a connection's memory is bounded: buffered requests, one piece
in the parser, unsent responses, and one head.

A request with ambiguous framing (request smuggling) is rejected and the connection closed, so that
no byte after it is parsed as a request (`framing`). `Connections` enforces the limits of all
connections together and their timeouts. A connection becomes a WebSocket only by a GET without a
body, and with nothing received after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog

from service.core.errors import CarryError, Overloaded
from service.core.values import Reply
from service.server.connections import Connections, Phase
from service.server.errors import MalformedRequest, RequestTimeout, TooManyConnections
from service.server.fast_route import (
    MAX_FAST_REQUEST_BYTES,
    FastRequest,
    FastRoute,
    IncompleteRequest,
)
from service.server.flow_control import BackpressureFlow
from service.server.framing import FramingProtocol
from service.server.origins import AcceptsHost, accept_any_host
from service.server.reading_turns import LONG_BODY_BYTES
from service.server.unsent_reply import UNSENT, UnsentReply
from service.server.websocket_protocol import PROBE_S, WebSocketProtocol, WebSockets

HTTP_STATE: Final = "carry_http"
"""Key of `HttpState` in the lifespan's state, where uvicorn's connections find it."""

MAX_REJECTED: Final = 64
"""Connections over the limit that get an error; further ones are closed at once."""

_BODY_HEADERS: Final = (b"content-length", b"transfer-encoding")

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

log = structlog.get_logger(__name__)


class HttpState(NamedTuple):
    """What the connections of a worker share.

    Attributes:
        error_response: makes the whole response to a request that is not read to its end.
        fast_routes: parse and answer chunk requests; none if the fast path is disabled.
        websockets: those of the application; None ignores every `Upgrade`.
        accepts_host: whether requests for a host name are answered.
    """

    connections: Connections
    error_response: Callable[[CarryError], bytes]
    fast_routes: tuple[FastRoute, ...]
    websockets: WebSockets | None = None
    accepts_host: AcceptsHost = accept_any_host


class CycleTransport(NamedTuple):
    """The transport as uvicorn's request cycle sees it; the protocol decides how it is closed."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]
    close: Callable[[], None]


class HttpProtocol(FramingProtocol):
    """One connection.

    Attributes:
        transport_name, progress, body_bytes, body_began_s: see `connections.Connection`.
    """

    transport_name = "http"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        state: HttpState = self.app_state[HTTP_STATE]
        self._connections, self._error_response, self._fast_routes, *_ = state
        self._websockets, self._accepts_host = state.websockets, state.accepts_host
        self._pending: FastRequest | None = None
        self._running_cycle: Any = None
        self._buffered = b""
        self._unsent = UnsentReply()
        self._closes_after_reply = False
        self._is_lingering = False
        self._half_closed = False
        self._deferred_error: CarryError | None = None
        self.progress = 0
        self.body_bytes = 0
        self.body_began_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self._flow = self.flow = BackpressureFlow(transport)
        peer = transport.get_extra_info("peername")
        excess = self._connections.add(self, self.loop, peer)
        if excess is None:
            return
        if excess.number > excess.limit + MAX_REJECTED:
            self.abort()
        else:
            self._send_error(
                TooManyConnections(f"expected at most {excess.limit} connections {excess.scope}")
            )

    def data_received(self, data: bytes) -> None:
        """Process received bytes, after those that were buffered."""
        if self._buffered:
            data = self._buffered + data
            self._buffered = b""
        while data and not self._stops_reading:
            data = self._process(data)

    def _process(self, data: bytes) -> bytes:
        """Process received bytes as far as possible now; returns the bytes of the next request."""
        if self._is_blocked:
            self._buffer(data)
            return b""
        if not self._message_complete:
            return self._parse(data)
        request = None
        try:
            for route in self._fast_routes:
                request = route.parse(data)
                if request is not None:
                    break
        except Exception:
            # a defect; the slow path answers, with 500 if it has it too
            log.exception("fast_route_failed")
        if request is None:
            return self._parse(data)
        if isinstance(request, IncompleteRequest):
            self._buffer(data)
            return b""
        response = route.start(request, self._respond)
        if response is None:
            self._pending = request
        else:
            self.transport.write(response)
            self._complete_fast_request()
        return data[request.total_bytes :]

    @property
    def _stops_reading(self) -> bool:
        """Whether no further request of this connection is processed."""
        if self._is_lingering or self._deferred_error is not None:
            return True
        return self.transport.is_closing()

    @property
    def _is_blocked(self) -> bool:
        """Whether received bytes belong to a later request, which has to wait."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            return self._is_cycle_received
        return self._pending is not None or (self._message_complete and self._flow.write_paused)

    @property
    def _has_cycle(self) -> bool:
        """Whether the slow path has a request to answer."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete

    @property
    def _is_cycle_received(self) -> bool:
        """Whether the slow path has received its request to the end."""
        return bool(self.pipeline) or not self.cycle.more_body

    @property
    def _is_busy(self) -> bool:
        """Whether a complete request is being answered."""
        return self._is_cycle_received if self._has_cycle else self._pending is not None

    @property
    def requests(self) -> int:
        """Requests that are being answered."""
        return int(self._is_busy)

    @property
    def _has_pending_replies(self) -> bool:
        """Whether responses to complete requests are still to be sent."""
        return self._is_busy or bool(self._buffered and self.flow.write_paused)

    @property
    def phase(self) -> Phase:
        """What the connection is waiting for."""
        ends = self._is_lingering or self.transport.is_closing()
        if self.flow.write_paused or (ends and self.transport.get_write_buffer_size()):
            return Phase.SEND
        if ends:
            return Phase.LINGER
        if self._is_busy:
            return Phase.SERVICE
        if not self._message_complete and self._head_complete:
            return Phase.BODY if self._has_cycle else Phase.REJECTED_BODY
        if self._buffered:
            return Phase.BODY
        return Phase.IDLE if self._message_complete else Phase.HEAD

    @property
    def unsent_bytes(self) -> int:
        """Bytes of responses that wait for the client to read."""
        return self._unsent.kept_bytes + self.transport.get_write_buffer_size()

    def _buffer(self, data: bytes) -> None:
        if not self._is_busy and not self.body_bytes:
            self.body_began_s = self.loop.time()
        self._buffered = data
        self._connections.set_body_bytes(self, max(len(data), self.body_bytes))
        if len(data) > MAX_FAST_REQUEST_BYTES:
            # backpressure on a client that pipelines requests
            self._flow.buffer_is_full = True
            self._flow.pause_reading()

    def _process_buffered(self) -> None:
        """Process the bytes that were buffered."""
        buffered, self._buffered = self._buffered, b""
        if self._flow.buffer_is_full:
            self._flow.buffer_is_full = False
            self._flow.resume_reading()
        self.data_received(buffered)
        if self._half_closed and not self._has_pending_replies:
            self.transport.close()

    def _respond(self, result: Reply | CarryError) -> None:
        """Answer the pending request."""
        request, self._pending = self._pending, None
        if request is None or self.transport.is_closing():
            return
        closes = self._closes_after_reply or (
            self._connections.close_after_response and not self._buffered
        )
        try:
            response = request.route.response(request, result, closes=closes)
        except Exception:
            # otherwise the client would take the next response for this one
            self.abort()
            raise
        self.transport.write(response)
        if closes:
            self.transport.close()
            return
        self._complete_fast_request()
        if self._buffered or self._half_closed or self._flow.buffer_is_full:
            self._process_buffered()

    def _complete_fast_request(self) -> None:
        self.progress += 1
        self.server_state.total_requests += 1
        if self.body_bytes:
            self._connections.set_body_bytes(self, 0)

    def _fail(self, error: CarryError) -> None:
        """Answer the request that is being read with an error, and close the connection.

        Requests before it are answered first; nothing after it is read, because its end is not
        known.
        """
        if self._is_lingering or self._deferred_error:
            return
        self._buffered = b""
        if self._message_complete or not self._head_complete:
            if self._has_cycle or self._pending is not None:
                self._deferred_error = error
            else:
                self._send_error(error)
        elif self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running_cycle
            self._deferred_error = error
        elif self._has_cycle and not self.cycle.response_started:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._send_error(error)
        else:
            # it has been answered, or is being answered: there is no second response
            self._linger()

    def _send_error(self, error: CarryError) -> None:
        """Send an error and close the connection."""
        self.transport.write(self._error_response(error))
        self._linger()

    def _close(self) -> None:
        """Close the connection after the last response, without a reset that could destroy it."""
        if self._message_complete and not self._buffered:
            self.transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Lingering close: flush, send FIN, and discard further input for a moment."""
        if self._is_lingering or self.transport.is_closing():
            return
        self._is_lingering = True
        self._buffered = b""
        self.pipeline.clear()
        self._connections.set_body_bytes(self, 0)
        self._flow.buffer_is_full = False
        self._flow.resume_reading()
        if self._half_closed or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.write_eof()

    def expire(self, phase: Phase) -> None:
        """Handle the timeout of a phase."""
        if phase is Phase.HEAD or phase is Phase.BODY:
            part = "head" if phase is Phase.HEAD else "body"
            self._fail(RequestTimeout(f"the {part} of the request did not arrive in time"))
        elif phase is Phase.SEND or self.transport.is_closing():
            self.abort()
        else:
            self.transport.close()

    def shed_body(self) -> None:
        """Reject the body that is being received, because all bodies together exceed the limit."""
        limit = self._connections.limits.max_pending_body_bytes
        self._fail(Overloaded(f"bodies of more than {limit} bytes together are on their way"))

    def abort(self) -> None:
        """Close the connection at once and drop unsent responses."""
        self.transport.abort()

    def resume_writing(self) -> None:
        """The client reads its responses again."""
        super().resume_writing()
        self.progress += 1
        if not self._is_blocked:
            self._process_buffered()

    def _switch_protocols(self, *, has_more: bool) -> bool:
        """Become a WebSocket, if the request is certainly for one and the only one.

        A client must not send anything before the response to its upgrade; bytes after it are
        rejected, since a proxy could have framed them as another request.
        """
        is_alone = not (self._has_cycle or self._pending is not None or self._half_closed)
        has_body = any(name in _BODY_HEADERS for name, _ in self.headers)
        is_get = self.parser.get_method() == b"GET" and self.parser.get_http_version() == "1.1"
        websockets = self._websockets
        if websockets is None or not is_alone or has_body or not is_get:
            return False
        if not websockets.serves(self.url):
            return False
        if has_more:
            self._fail(MalformedRequest("expected nothing after a request for an upgrade"))
            return True
        # this object reads nothing more
        self._is_lingering = True
        self._connections.remove(self)
        self.connections.discard(self)
        socket = WebSocketProtocol(
            websockets,
            self._connections,
            self._error_response,
            config=self.config,
            server_state=self.server_state,
            app_state=self.app_state,
        )
        socket.connection_made(self.transport)
        self.transport.set_protocol(socket)
        # nothing reads cookies, which may be longer than the library accepts
        socket.open(self._serialize_head(without=b"cookie"))
        return True

    def on_headers_complete(self) -> None:
        """Parser callback: the head is complete; uvicorn starts the application."""
        self.scope["state"][UNSENT] = self._unsent
        super().on_headers_complete()
        if self._connections.close_after_response and self._has_cycle:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Parser callback: a part of a body, which is counted if its request is unanswered."""
        is_unanswered = not self.cycle.response_complete
        if is_unanswered and not self.body_bytes:
            self.body_began_s = self.loop.time()
        super().on_body(body)
        if is_unanswered:
            self._connections.set_body_bytes(self, self.body_bytes + len(body))
            if self._is_lingering:
                # it was shed just now; any exception stops the parser
                raise Overloaded("this body was shed")
            if self.body_bytes > LONG_BODY_BYTES and self.cycle.more_body:
                self._flow.wait_for_turn()
                self._connections.turns.wait(self, self._flow.take_turn)

    def on_response_complete(self) -> None:
        """uvicorn's callback: a request was answered, and the next pipelined one started."""
        # breaks a reference cycle
        self._running_cycle.transport = self.transport
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self.progress += 1
        if not self._has_cycle:
            self._connections.set_body_bytes(self, len(self._buffered))
        if self._deferred_error is not None and not self._has_cycle:
            self._send_error(self._deferred_error)
        elif not self._is_blocked:
            self._process_buffered()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running_cycle = cycle
        transport = self.transport
        cycle.transport = CycleTransport(transport.write, transport.is_closing, self._close)
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Graceful shutdown: finish the current request, then close."""
        self._connections.drain()
        if self._is_lingering:
            self.transport.close()
        elif self._pending is None:
            super().shutdown()
        else:
            self._closes_after_reply = True

    def retire(self) -> None:
        """Close after the current response, or after the next one; until then the client may send.

        Unlike `shutdown`, it does not close an idle connection, on which a request may be arriving.
        """
        if self._has_cycle:
            self.cycle.keep_alive = False

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client closed its sending side: it disconnected, or waits for its responses."""
        self._half_closed = True
        if self._is_lingering or not self._has_pending_replies:
            return None
        self.loop.call_later(PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Write an interim response: a client that disconnected resets the connection upon the
        first one, so that the next write fails."""
        if self.transport.is_closing() or not self._is_busy:
            return
        if self._pending is not None or not (
            self._running_cycle.response_started
            or self._running_cycle.scope["http_version"] == "1.0"
        ):
            self.transport.write(CONTINUE)
        self.loop.call_later(PROBE_S, self._probe)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client disconnected, or the connection was closed."""
        self._connections.remove(self)
        request, self._pending = self._pending, None
        if request is not None:
            # otherwise they would reference each other: the garbage collector skips `FastRequest`
            request.route.cancel(request)
        if self._running_cycle is not None:
            self._running_cycle.transport = self.transport
            # uvicorn notifies only the last request that it has parsed
            self._running_cycle.disconnected |= not self._running_cycle.response_complete
            self._running_cycle.message_event.set()
        super().connection_lost(exc)
