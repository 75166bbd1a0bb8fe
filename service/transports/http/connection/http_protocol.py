"""uvicorn's HTTP protocol, with a fast path past it for well-formed chunk requests.

Every connection is uvicorn's. Between its requests, bytes are first shown to `Express`: what that
takes is answered with one write; all else is uvicorn's, with every byte that came. While either
has a request under way, or answers wait for the client to read them, further requests are held,
and beyond a bound not even read. So a connection's answers keep their order, and what it makes the
process keep is bounded: held requests, one piece with uvicorn, answers that wait, and one head.

A request with ambiguous framing (request smuggling) is rejected and the connection closed, so that
no byte after it is parsed as a request. `Upgrade` is ignored, as RFC 9110 (7.8) allows, and its
request is framed as one without it. `Connections` limits all connections together, and their times.

The application offers its `Express` and its `Connections` through the lifespan's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.core.errors import (
    CarryError,
    HeadTooLarge,
    MalformedRequest,
    Overloaded,
    RequestTimeout,
    TooManyConnections,
)
from service.transports.http.connection.connections import CONNECTIONS, Connections, Phase
from service.transports.http.connection.fast_path import (
    EXPRESS,
    MAX_BYTES,
    Begun,
    Express,
    More,
    Refused,
    Taken,
)
from service.transports.http.connection.heads import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    check_head,
    serialize_without_upgrade,
)
from service.transports.http.replies.replies import UNSENT, UnsentReply

PIECE_BYTES: Final = 8 * 1024
"""What uvicorn is given at once: it makes something of every request therein."""

MAX_DRAIN_BYTES: Final = 1024 * 1024
"""Most bytes that are discarded of a body whose request was answered early."""

MAX_REFUSED: Final = 64
"""Connections over the limit that get an error; further ones are closed at once."""

PROBE_S: Final = 0.5
"""Time between two interim responses to a client that closed its sending side."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class HoldingFlow(FlowControl):
    """uvicorn's control of a connection, which reads nothing on while requests are held.

    Attributes:
        holds: whether there are more of them than may be.
    """

    holds = False

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if not self.holds:
            super().resume_reading()


class CycleTransport(NamedTuple):
    """The transport as uvicorn's request cycle sees it; the protocol decides how it is closed."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]
    close: Callable[[], None]


class ExpressProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        progress, body_bytes, body_began_s: see `connections.Connection`.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._express: Express = self.app_state[EXPRESS]
        self._connections: Connections = self.app_state[CONNECTIONS]
        self._ours: tuple[Taken, Begun] | None = None
        self._running_cycle: Any = None
        self._held = b""
        self._message_whole = True
        self._head_complete = False
        self._upgrades = False
        self._kept_bytes = 0
        self._drained_bytes = 0
        self._unsent = UnsentReply()
        self._leaving = False
        self._is_lingering = False
        self._half_closed = False
        self._failure: CarryError | None = None
        self._rejection: CarryError | None = None
        self.progress = 0
        self.body_bytes = 0
        self.body_began_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._flow = self.flow = HoldingFlow(transport)
        if self._connections.add(self, self.loop):
            return
        limit = self._connections.limits.max_connections
        if len(self._connections) > limit + MAX_REFUSED:
            self.abort()
        else:
            self._refuse(TooManyConnections(f"expected at most {limit} connections of a worker"))

    def data_received(self, data: bytes) -> None:
        """Process received bytes, after those that were held back."""
        if self._held:
            data = self._held + data
            self._held = b""
        self._process_all(data)

    def _process_all(self, data: bytes) -> None:
        while data and not (self._is_lingering or self._failure or self.transport.is_closing()):
            data = self._process(data)

    def _process(self, data: bytes) -> bytes:
        """Process received bytes as far as possible now; returns the bytes of the next request."""
        if self._has_to_wait:
            self._hold(data)
            return b""
        found = self._express.take(data) if self._message_whole else None
        if found is None:
            return self._parse(data)
        if isinstance(found, More):
            self._hold(data)
            return b""
        if isinstance(found, Refused):
            self.transport.write(self._express.refuse(found))
            self._complete_request()
        else:
            self._begin(found)
        return data[found.whole_bytes :]

    @property
    def _has_to_wait(self) -> bool:
        """Whether what comes next is not part of the request that is under way."""
        unread = self.flow.write_paused and self._message_whole and not self._theirs
        return self._is_busy or unread

    @property
    def _theirs(self) -> bool:
        """Whether uvicorn has a request to answer."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_busy(self) -> bool:
        """Whether a complete request is being answered."""
        if self._theirs:
            return bool(self.pipeline) or not self.cycle.more_body
        return self._ours is not None

    @property
    def _has_pending_replies(self) -> bool:
        """Whether replies to complete requests are still to be sent."""
        return self._is_busy or bool(self._held and self.flow.write_paused)

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
        if not self._message_whole and self._head_complete:
            return Phase.BODY if self._theirs else Phase.REJECTED_BODY
        if self._held:
            return Phase.BODY
        return Phase.IDLE if self._message_whole else Phase.HEAD

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies that wait for the client to read."""
        return self._unsent.kept_bytes + self.transport.get_write_buffer_size()

    def _parse(self, data: bytes) -> bytes:
        """Give uvicorn what it can do something with now; the rest is left.

        Its parser keeps a line until it is whole, however long.
        """
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._kept_bytes += len(piece)
            self._feed(piece)
            if self._kept_bytes > MAX_HEAD_BYTES:
                self._fail(HeadTooLarge(f"head: expected at most {MAX_HEAD_BYTES} bytes"))
            if self._is_lingering or self._failure or self.transport.is_closing():
                break
            if self._message_whole or self._has_to_wait:
                return data[start + PIECE_BYTES :]
        return b""

    def _feed(self, data: bytes) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    # the parser treats the body of an upgrade as another protocol: restart with
                    # a new parser and the same head without `Upgrade`
                    [head_bytes] = upgrade.args
                    data = serialize_without_upgrade(self) + data[head_bytes:]
                    self._upgrades = False
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        except httptools.HttpParserError as error:
            # not its `__context__`, which is what the application is handling, if it is
            self._fail(
                self._rejection or MalformedRequest(f"expected a request of HTTP/1.1: {error}")
            )

    def _reject(self, error: CarryError) -> None:
        """Stop the parser and remember why, since its own error does not say."""
        self._rejection = error
        raise error

    def _hold(self, data: bytes) -> None:
        if not self._is_busy and not self.body_bytes:
            self.body_began_s = self.loop.time()
        self._held = data
        self._connections.set_body_bytes(self, max(len(data), self.body_bytes))
        if len(data) > MAX_BYTES:
            # a client that sends on before it has its answers; it has to wait
            self._flow.holds = True
            self._flow.pause_reading()

    def _begin(self, taken: Taken) -> None:
        begun = self._express.begin(taken)
        self._ours = taken, begun

        def answer(done: Begun) -> None:
            self._ours = None
            if done.cancelled() or self.transport.is_closing():
                return
            [result] = done.result()
            self.transport.write(self._express.reply(taken, result, last=self._leaving))
            if self._leaving:
                self.transport.close()
                return
            self._complete_request()
            if self._held or self._half_closed or self._flow.holds:
                self._process_held()

        begun.add_done_callback(answer)

    def _complete_request(self) -> None:
        """Record that a request of the fast path was answered."""
        self.progress += 1
        self.server_state.total_requests += 1
        if self.body_bytes:
            self._connections.set_body_bytes(self, 0)

    def _process_held(self) -> None:
        """Process the bytes that were held back."""
        held, self._held = self._held, b""
        if self._flow.holds:
            self._flow.holds = False
            self._flow.resume_reading()
        self._process_all(held)
        if self._half_closed and not self._has_pending_replies:
            self.transport.close()

    def _fail(self, error: CarryError) -> None:
        """Answer the request that is being read with an error, and close the connection.

        Requests before it are answered first; nothing after it is read, because its end is not
        known.
        """
        if self._is_lingering or self._failure:
            return
        self._held = b""
        if self._message_whole or not self._head_complete:
            if self._theirs or self._ours is not None:
                self._failure = error
            else:
                self._refuse(error)
        elif self.pipeline:
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running_cycle
            self._failure = error
        elif self._theirs and not self.cycle.response_started:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._refuse(error)
        else:
            # it has been answered, or is being answered: there is no second answer
            self._linger()

    def _refuse(self, error: CarryError) -> None:
        """Send an error and close the connection."""
        self.transport.write(self._express.refuse_unread(error))
        self._linger()

    def _end(self) -> None:
        """Close the connection after the last reply, without a reset that could destroy it."""
        if self._message_whole and not self._held:
            self.transport.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Lingering close: flush, send FIN, and discard further input for a moment."""
        if self._is_lingering or self.transport.is_closing():
            return
        self._is_lingering = True
        self._held = b""
        self.pipeline.clear()
        self._connections.set_body_bytes(self, 0)
        self._flow.holds = False
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
        """Close the connection at once and drop what is not sent."""
        self.transport.abort()

    def resume_writing(self) -> None:
        """The client reads its answers again."""
        super().resume_writing()
        self.progress += 1
        if not self._has_to_wait:
            self._process_held()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running_cycle = cycle
        transport = self.transport
        cycle.transport = CycleTransport(transport.write, transport.is_closing, self._end)
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """uvicorn's parser has met the beginning of a request."""
        self._message_whole = self._head_complete = False
        self._drained_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """uvicorn's parser has met a header, or a trailer, which is dropped."""
        if self._head_complete:
            return
        if len(self.headers) == MAX_HEADERS:
            self._reject(HeadTooLarge(f"head: expected at most {MAX_HEADERS} lines"))
        # the parser does not strip trailing white space
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """uvicorn's parser has met the end of a head."""
        version = self.parser.get_http_version()
        try:
            check_head(self.parser.get_method(), self.url, version, self.headers)
        except CarryError as error:
            self._reject(error)
        self._upgrades = self.parser.should_upgrade()
        if self._upgrades:
            return
        self._kept_bytes = 0
        if version == "1.0":
            self.expect_100_continue = False
        self.scope["state"][UNSENT] = self._unsent
        super().on_headers_complete()
        self._head_complete = True
        if self.expect_100_continue:
            # the body may never come, and the next bytes would then be ambiguous
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """uvicorn's parser has met a part of a body."""
        self._kept_bytes = 0
        if self.cycle.response_complete:
            self._drained_bytes += len(body)
            if self._drained_bytes > MAX_DRAIN_BYTES:
                self._reject(MalformedRequest("the body of a request that was answered goes on"))
            return
        if not self.body_bytes:
            self.body_began_s = self.loop.time()
        super().on_body(body)
        self._connections.set_body_bytes(self, self.body_bytes + len(body))
        if self._is_lingering:
            raise Overloaded("this body was refused")

    def on_message_complete(self) -> None:
        """uvicorn's parser has met the end of a request."""
        if self._upgrades:
            return
        self._kept_bytes = 0
        self._message_whole = True
        if self.expect_100_continue:
            self.cycle.keep_alive = self.parser.should_keep_alive()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn has answered a request, and begun the next one that it has."""
        # no cycle of references is left behind
        self._running_cycle.transport = self.transport
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self.progress += 1
        if not self._theirs:
            self._connections.set_body_bytes(self, len(self._held))
        if self._failure is not None and not self._theirs:
            self._refuse(self._failure)
        elif not self._has_to_wait:
            self._process_held()

    def shutdown(self) -> None:
        """The server stops: finish the request that is under way, then close."""
        if self._is_lingering:
            self.transport.close()
        elif self._ours is None:
            super().shutdown()
        else:
            self._leaving = True

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client closed its sending side: it may be gone, or wait for its replies."""
        self._half_closed = True
        if self._is_lingering or not self._has_pending_replies:
            return None
        self.loop.call_later(PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Write an interim response to detect a client that is gone: it resets the connection upon
        the first one, so that the next write fails."""
        if self.transport.is_closing() or not self._is_busy:
            return
        if self._ours is not None or not (
            self._running_cycle.response_started
            or self._running_cycle.scope["http_version"] == "1.0"
        ):
            self.transport.write(CONTINUE)
        self.loop.call_later(PROBE_S, self._probe)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or the connection was closed."""
        self._connections.remove(self)
        if self._ours is not None:
            self._express.leave(*self._ours)
        if self._running_cycle is not None:
            self._running_cycle.transport = self.transport
            # uvicorn notifies only the last request that it has parsed
            self._running_cycle.disconnected |= not self._running_cycle.response_complete
            self._running_cycle.message_event.set()
        super().connection_lost(exc)
