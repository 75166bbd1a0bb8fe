"""The interface between the server and its application.

The application is an ASGI application; its lifespan's state has an `HttpState` and a `Lifecycle`.
`FastRoute` answers requests that can be read without uvicorn and FastAPI (the slow path), and
`WebSockets` serves live sockets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from service.core.errors import CarryError
from service.core.values import Reply
from service.server.connections import Connections
from service.server.heads import AcceptsHost, accept_any_host

if TYPE_CHECKING:
    from service.server.websocket_protocol import WebSocketProtocol

HTTP_STATE: Final = "carry_http"
"""Key of `HttpState` in the lifespan's state, where uvicorn's connections find it."""

LIFECYCLE: Final = "lifecycle"
"""Key of the application's `Lifecycle` in the lifespan's state."""

UNSENT: Final = "unsent_reply"
"""Key of `UnsentReply` in a request's state, where the server's protocol puts it."""

MAX_FAST_REQUEST_BYTES: Final = 64 * 1024
"""Longest request of a fast route; also the most bytes of pipelined requests that a connection
buffers before it stops reading."""

OnResult = Callable[[Reply | CarryError], None]


class IncompleteRequest:
    """A request whose body is still arriving."""


class FastRequest(Protocol):
    """A complete request.

    Attributes:
        route: which parsed it.
        total_bytes: its length, head and body.
    """

    @property
    def route(self) -> FastRoute: ...

    @property
    def total_bytes(self) -> int: ...


class FastRoute(Protocol):
    """Recognises, starts and answers the requests of one route; nothing here waits.

    The requests that it is given are those that it parsed.
    """

    def parse(self, data: bytes) -> FastRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None leaves it to the next route, and at
        last to the slow path."""

    def start(self, request: Any, on_result: OnResult) -> bytes | None:
        """Start a request, at once after `parse`.

        Returns:
            The whole response to a rejected request; None if `on_result` will get its result.
        """

    def response(self, request: Any, result: Reply | CarryError, *, closes: bool) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""

    def cancel(self, request: Any) -> None:
        """Drop a request whose client disconnected."""


class Session(Protocol):
    """The session of a live socket, as the protocol uses it."""

    @property
    def unanswered(self) -> int:
        """Messages that have not been answered."""

    def cancel(self) -> None:
        """Drop the unanswered messages: the client disconnected."""


class WebSockets(NamedTuple):
    """The WebSockets of an application.

    Attributes:
        serves: whether an address, with its query, is one of a WebSocket.
        serve: answers a handshake, and serves the socket until it is closed.
        max_bytes: largest message.
        idle_s: one without a message for this long is closed; 0 never.
    """

    serves: Callable[[bytes], object]
    serve: Callable[[WebSocketProtocol], Awaitable[None]]
    max_bytes: int
    idle_s: float


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


class Lifecycle(NamedTuple):
    """Functions of the application that its server calls: the load, and the phases of a shutdown.

    Attributes:
        measure_load: returns the load that new connections are balanced by.
        on_lame_duck, on_retire, on_drain: called when these phases begin.
    """

    measure_load: Callable[[], int]
    on_lame_duck: Sequence[Callable[[], None]]
    on_retire: Sequence[Callable[[], None]]
    on_drain: Sequence[Callable[[], None]]


@dataclass(slots=True)
class UnsentReply:
    """Memory that a connection holds for replies, besides its transport's buffer."""

    kept_bytes: int = 0
