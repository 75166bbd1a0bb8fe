"""The service's HTTP protocol: uvicorn's, with a fast path for well-formed chunk requests.

Between two requests, received bytes are shown to the fast routes first; what one of them parses is
answered with one write. Everything else takes the slow path, from its first byte. While a request
is being answered, or responses wait for the client to read them, further (pipelined) requests are
buffered, and beyond a bound not even read (backpressure). So responses keep the order of their
requests, and a connection's memory is bounded: buffered requests, one piece in the parser, unsent
responses, and one head.

A request with ambiguous framing (request smuggling) is rejected and the connection closed
(`heads`); trailers and bytes after an early response are bounded. `Upgrade` is ignored (RFC 9110,
7.8), and its request is framed as one without it, except for a WebSocket: a GET without a body.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Final

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.core.errors import CarryError, Overloaded
from service.core.values import Reply
from service.server.connections import Connection, Phase
from service.server.errors import HeadTooLarge, MalformedRequest, RequestTimeout
from service.server.heads import (
    BODY_HEADERS,
    MAX_DRAIN_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    PIECE_BYTES,
    check_head,
    serialize_head,
)
from service.server.interface import (
    HTTP_STATE,
    MAX_FAST_REQUEST_BYTES,
    UNSENT,
    FastRequest,
    HttpState,
    IncompleteRequest,
    UnsentReply,
)
from service.server.reading import BUFFER_FULL, LONG_BODY_BYTES, MAX_CHUNKS, ReadingFlow
from service.server.websocket_protocol import PROBE_S, WebSocketProtocol

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

log = structlog.get_logger(__name__)


class HttpProtocol(HttpToolsProtocol, Connection):
    """One HTTP connection: offers received bytes to the fast routes, then to uvicorn's parser."""

    transport_name = "http"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        state: HttpState = self.app_state[HTTP_STATE]
        self._connections, self._error_response, self._fast_routes = state[:3]
        self._websockets, self._accepts_host = state.websockets, state.accepts_host
        self._pending: FastRequest | None = None
        self._running_cycle: Any = None
        self._buffered = b""
        self._unsent = UnsentReply()
        self._closes_after_reply = False
        self._deferred_error: CarryError | None = None
        # these describe the request that uvicorn's parser is reading
        self._message_complete = True
        self._head_complete = False
        self._ignores_upgrade = False
        self._parser_bytes = 0
        self._drained_bytes = 0
        self._chunks = 0
        self._framing_error: CarryError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self._flow = self.flow = ReadingFlow(transport)
        error = self._connections.add(self)
        if error is not None and not transport.is_closing():
            self._send_error(error)

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
        stops = self._is_lingering or self._deferred_error is not None
        return stops or self.transport.is_closing()

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
    def requests(self) -> int:
        """Whether a complete request is being answered, as a number."""
        return int(self._is_cycle_received if self._has_cycle else self._pending is not None)

    @property
    def _has_pending_replies(self) -> bool:
        """Whether responses to complete requests are still to be sent."""
        return bool(self.requests or (self._buffered and self.flow.write_paused))

    @property
    def phase(self) -> Phase:
        """What the connection is waiting for."""
        if (closing := self._closing_phase(write_paused=self.flow.write_paused)) is not None:
            return closing
        if self.requests:
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
        if not self.requests and not self.body_bytes:
            self.body_began_s = self.loop.time()
        self._buffered = data
        self._connections.set_body_bytes(self, max(len(data), self.body_bytes))
        if len(data) > MAX_FAST_REQUEST_BYTES:
            # backpressure on a client that pipelines requests
            self._flow.pause_reading(BUFFER_FULL)

    def _process_buffered(self) -> None:
        """Process the bytes that were buffered."""
        buffered, self._buffered = self._buffered, b""
        if self._flow.pauses & BUFFER_FULL:
            self._flow.resume_reading(BUFFER_FULL)
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
            self._linger()
            return
        self._complete_fast_request()
        if self._buffered or self._half_closed or self._flow.pauses & BUFFER_FULL:
            self._process_buffered()

    def _complete_fast_request(self) -> None:
        self.progress += 1
        self.server_state.total_requests += 1
        if self.body_bytes:
            self._connections.set_body_bytes(self, 0)

    def _fail(self, error: CarryError) -> None:
        """Answer the request that is being read with an error, after those before it, and close."""
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
            self._linger()  # there is no second response

    def _send_error(self, error: CarryError) -> None:
        """Send an error and close the connection."""
        self.transport.write(self._error_response(error))
        self._linger()

    def _drop_received(self) -> None:
        self._buffered = b""
        self.pipeline.clear()
        if not self.transport.is_closing():
            self._flow.pauses = 0
            self._flow.resume_reading()

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
        """Reject the body that it is receiving, because all bodies together exceed the limit."""
        limit = self._connections.limits.max_pending_body_bytes
        self._fail(Overloaded(f"bodies of more than {limit} bytes together are on their way"))

    def resume_writing(self) -> None:
        """The client reads its responses again."""
        super().resume_writing()
        self.progress += 1
        if not self._is_blocked:
            self._process_buffered()

    def _switch_protocols(self, *, has_more: bool) -> bool:
        """Become a WebSocket, if the request is certainly for one and the only one; bytes after it
        are rejected, since a proxy could have framed them as another request."""
        is_alone = not (self._has_cycle or self._pending is not None or self._half_closed)
        has_body = any(name in BODY_HEADERS for name, _ in self.headers)
        is_get = self.parser.get_method() == b"GET" and self.parser.get_http_version() == "1.1"
        websockets = self._websockets
        if not (
            websockets and is_alone and is_get and not has_body and websockets.serves(self.url)
        ):
            return False
        if has_more:
            self._fail(MalformedRequest("expected nothing after a request for an upgrade"))
            return True
        # this object reads nothing more
        self._is_lingering = True
        self._connections.remove(self)
        self.connections.discard(self)
        WebSocketProtocol.take_over(self, websockets)
        return True

    def _parse(self, data: bytes) -> bytes:
        """Parse as far as possible now; returns the bytes of the next request."""
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            # the parser buffers an incomplete line, however long
            self._parser_bytes += len(piece)
            self._feed(piece, has_more=start + PIECE_BYTES < len(data))
            if self._parser_bytes > MAX_HEAD_BYTES:
                self._fail(HeadTooLarge(f"head: expected at most {MAX_HEAD_BYTES} bytes"))
            if self._stops_reading:
                break
            if self._message_complete or self._is_blocked:
                return data[start + PIECE_BYTES :]
            if self._chunks > MAX_CHUNKS:
                # the rest is processed when it is this connection's turn
                self._chunks = 0
                self._buffer(data[start + PIECE_BYTES :])
                self._connections.turns.wait(self._flow, self._process_buffered)
                break
        return b""

    def _feed(self, data: bytes, *, has_more: bool) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    # the parser treats the body of an upgrade as another protocol: restart with
                    # a new parser and the same head without `Upgrade`
                    [head_bytes] = upgrade.args
                    if self._switch_protocols(has_more=has_more or head_bytes < len(data)):
                        return
                    data = self._serialize_head(without=b"upgrade") + data[head_bytes:]
                    self._ignores_upgrade = False
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        except httptools.HttpParserError as error:
            # without `from error`: the application may be handling another exception
            malformed = MalformedRequest(f"expected an HTTP/1.1 request: {error}")
            self._fail(self._framing_error or malformed)

    def _serialize_head(self, *, without: bytes) -> bytes:
        parser = self.parser
        return serialize_head(
            parser.get_method(), self.url, parser.get_http_version(), self.headers, without=without
        )

    def _stop_parser(self, error: CarryError) -> None:
        """Raise through the parser; the error is kept, since the parser's own does not name it."""
        self._framing_error = error
        raise error

    def on_message_begin(self) -> None:
        """Parser callback: a request begins."""
        self._message_complete = self._head_complete = False
        self._drained_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser callback: a header, or a trailer, which is dropped."""
        if self._head_complete:
            return
        if len(self.headers) == MAX_HEADERS:
            self._stop_parser(HeadTooLarge(f"head: expected at most {MAX_HEADERS} lines"))
        # the parser does not strip trailing white space
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Parser callback: the head is complete; uvicorn starts the application."""
        version = self.parser.get_http_version()
        try:
            method = self.parser.get_method()
            check_head(method, self.url, version, self.headers, self._accepts_host)
        except CarryError as error:
            self._stop_parser(error)
        self._ignores_upgrade = self.parser.should_upgrade()
        if self._ignores_upgrade:
            return
        self._parser_bytes = 0
        if version == "1.0":
            self.expect_100_continue = False
        self.scope["state"][UNSENT] = self._unsent
        super().on_headers_complete()
        self._head_complete = True
        if self.expect_100_continue or self._connections.close_after_response:
            # the body may never come, so it is unknown whether the next bytes belong to it
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Parser callback: a chunk of a body begins."""
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        """Parser callback: a part of a body, which is counted if its request is unanswered."""
        self._parser_bytes = 0
        if self.cycle.response_complete:
            self._drained_bytes += len(body)
            if self._drained_bytes > MAX_DRAIN_BYTES:
                self._stop_parser(
                    MalformedRequest("the body of a request that was answered continues")
                )
            return
        if not self.body_bytes:
            self.body_began_s = self.loop.time()
        super().on_body(body)
        self._connections.set_body_bytes(self, self.body_bytes + len(body))
        if self._is_lingering:
            # the body was shed just now; any exception stops the parser
            raise Overloaded("this body was shed")
        if self.body_bytes > LONG_BODY_BYTES and self.cycle.more_body:
            self._connections.turns.wait(self._flow)

    def on_message_complete(self) -> None:
        """Parser callback: a request is complete."""
        if self._ignores_upgrade:
            return
        self._parser_bytes = 0
        self._message_complete = True
        if self.expect_100_continue and not self._connections.close_after_response:
            self.cycle.keep_alive = self.parser.should_keep_alive()
        super().on_message_complete()

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
        # the cycle uses the transport only to write and to close
        transport = self.transport
        cycle.transport = SimpleNamespace(
            write=transport.write, is_closing=transport.is_closing, close=self._linger
        )
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Graceful shutdown: finish the current request, then close."""
        if self._is_lingering:
            self.transport.close()
        elif self._pending is None:
            super().shutdown()
        else:
            self._closes_after_reply = True

    def retire(self) -> None:
        """Close after the current response, or the next: one may be arriving while it is idle."""
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
        """Write an interim response: a client that disconnected resets the connection upon it."""
        if self.transport.is_closing() or not self.requests:
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
        self._connections.turns.forget(self._flow)
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
