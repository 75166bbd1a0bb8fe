"""Where a store's server is, and connections to it that are not open yet.

The address comes from the settings; what it may not change (a reply decoded to text, say, would
not be a state) is fixed here. So is what the client library's errors mean: whether the server
may answer the same request later, and the service's own error where it will not.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.core.errors import StoreRefused, StoreUnavailable
from service.store.settings import StoreSettings

RETRY_AFTER_S: Final = 1
TRIES: Final = 3
"""A connection that is silent for a third of a call's time is given up and made anew: longer
than a server hesitates, and early enough to reach the server that took its place."""

_CODES: Final[Mapping[type[RedisError], str]] = {
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    MovedError: "MOVED",
    AskError: "ASK",
    BusyLoadingError: "LOADING",
    NoPermissionError: "NOPERM",
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
}
"""The first words of replies, which the client library takes off; they are what to search for."""

_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Idle seconds before the first probe, seconds between probes, and number of probes; each where the
platform supports it."""


class Backend:
    """The server of some settings.

    Attributes:
        where: its address without secrets.
        wait_s: how long a call waits for it.
        silence_s: how long one connection may be silent.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        self._options = _connection_options(settings)
        self._max_connections = settings.max_connections
        self.where = _where(self._options)
        self.wait_s = settings.wait_s
        self.silence_s = settings.wait_s / TRIES

    def pool(self) -> BlockingConnectionPool:
        """Connections for requests that need no order; their reads time out by themselves."""
        return BlockingConnectionPool(
            max_connections=self._max_connections,
            timeout=self.wait_s,
            socket_timeout=self.silence_s,
            **self._options,
        )

    def connection(self) -> AbstractConnection:
        """One connection of its own, whose user watches over its silence."""
        # Without a timeout of its own it writes at once, in the order of the calls.
        pool = BlockingConnectionPool(max_connections=1, socket_timeout=None, **self._options)
        connection: AbstractConnection = pool.make_connection()
        return connection

    def refused(self, error: BaseException) -> StoreRefused:
        """The server said no, and will say so again."""
        return StoreRefused(
            f"the store at {self.where} refused: {text(error)}", retry_after_s=RETRY_AFTER_S
        )

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """The server did not answer in time, and nothing was carried out."""
        return StoreUnavailable(
            f"the store at {self.where} did not answer within {self.wait_s:g} s: {text(error)}",
            retry_after_s=RETRY_AFTER_S,
        )


def writer_of(connection: AbstractConnection) -> asyncio.StreamWriter | None:
    """The stream writer of a connection, None if it is not open; private in the client library."""
    writer: asyncio.StreamWriter | None = connection._writer
    return writer


def drop_unsent_on_close(connection: AbstractConnection) -> None:
    """Make the kernel discard unsent bytes when a TCP connection ends, even by a crash of the
    process (SO_LINGER 0); by default it would continue to send them."""
    writer = writer_of(connection)
    sock = None if writer is None else writer.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def abort(connection: AbstractConnection) -> None:
    """Close a connection at once and discard its unsent bytes."""
    writer = writer_of(connection)
    if writer is not None:
        writer.transport.abort()
    await connection.disconnect(nowait=True)


def is_passing(error: BaseException) -> bool:
    """Whether the server may answer the same request later: it is away, loading, or held up."""
    # On unix sockets the client library wraps what the server said to AUTH.
    if type(error) is RedisConnectionError and isinstance(error.__cause__, RedisError):
        error = error.__cause__
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return False
    if isinstance(error, ResponseError):
        # MASTERDOWN is one of the latter. The client library has no class of its own for BUSY.
        return isinstance(error, ClusterDownError) or str(error).startswith("BUSY ")
    return isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError))


def is_reply(error: BaseException) -> bool:
    """Whether the server answered with this error, and so did not carry the request out."""
    return isinstance(error, (ResponseError, BusyLoadingError))


def text(error: BaseException) -> str:
    """What an error says, or its type where it says nothing."""
    said = str(error) or type(error).__name__
    for kind, code in _CODES.items():
        if isinstance(error, kind) and not said.startswith(code):
            return f"{code} {said}"
    return said


def _connection_options(settings: StoreSettings) -> dict[str, Any]:
    """What the client library is given: the address, and settings that the address may not
    change (a reply decoded to text, say, would not be a state)."""
    scheme = settings.url.partition("://")[0]
    try:
        address: Mapping[str, Any] = parse_url(settings.url)
    except ValueError as error:
        # after `check_address` the message contains at most the name of an option
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    if scheme == "unix" and not address.get("path"):
        raise StoreRefused("expected unix:///path/of/socket as the store's address")
    tcp_options: dict[str, Any] = {}
    if "path" not in address:
        # Unacknowledged bytes are dropped long before the tombstone of a deletion expires.
        unacknowledged_ms = min(round(settings.wait_s * 1000), settings.tombstone_ttl_ms)
        options = {**_KEEPALIVE, "TCP_USER_TIMEOUT": max(1, unacknowledged_ms)}
        tcp_options = {
            "socket_keepalive": True,
            "socket_keepalive_options": {
                getattr(socket, name): value
                for name, value in options.items()
                if hasattr(socket, name)
            },
        }
    return {
        **address,
        **tcp_options,
        "protocol": 2,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": settings.wait_s / TRIES,
    }


def _where(options: Mapping[str, Any]) -> str:
    """The address without its secrets."""
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if options.get("connection_class") else "redis"
    host, port = options.get("host", "localhost"), options.get("port", 6379)
    return f"{scheme}://{host}:{port}/{options.get('db', 0)}"
