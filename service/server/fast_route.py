"""Fast routes: requests that are parsed from the socket buffer and answered with one write.

A transport implements `FastRoute` for requests that it can read without uvicorn and FastAPI (the
slow path). The protocol of a connection shows received bytes to its routes in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from service.core.errors import CarryError
from service.core.values import Reply

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
