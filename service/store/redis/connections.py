"""Connection options of one server, and classification of the client library's errors.

The address comes from the settings. Options that it must not change are fixed here: a reply that
is decoded to text, for example, would not be a state. Errors are either transient (the server may
accept the same command later) or become the service's own error.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine, Mapping
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
CANCEL_S: Final = 2.0
"""How long a task has to end before it is cancelled again."""
ATTEMPTS_PER_CALL: Final = 3
"""A connection that is unresponsive for a third of a call's timeout is closed and opened again:
longer than a healthy server pauses, and early enough to reach its replacement after a failover."""

MAX_CONNECTIONS: Final = 16
"""Size of the connection pool for reads outside the commit path."""

OnConnect = Callable[[Any], Awaitable[None]]

_ERROR_CODES: Final[Mapping[type[RedisError], str]] = {
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
"""Error codes that begin error replies. The client library removes them, and operators search
for them."""

_KEY_USAGE: Final = (
    "; from Python 3.13 on, a CA certificate (ssl_ca_certs) needs the extension keyUsage with "
    "keyCertSign"
)

_KEEPALIVE: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Idle seconds before the first probe, seconds between probes, and number of probes; each if the
platform supports it."""


class ConnectionFactory:
    """Makes connections to one server, and errors that name it.

    Args:
        settings: their address is this server's.
        on_connect: prepares each connection, in place of the client library's `on_connect`.

    Attributes:
        options: the client library's options of a connection.
        redacted_url: its address without secrets.
        wait_s: timeout of a call.
        response_timeout_s: a connection that owes a reply for this long is unresponsive.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings, on_connect: OnConnect | None = None):
        self.options = {**_connection_options(settings), "redis_connect_func": on_connect}
        self.redacted_url = _redacted_url(self.options)
        self.wait_s = settings.store_wait_s
        self.response_timeout_s = settings.store_wait_s / ATTEMPTS_PER_CALL

    def create_pool(self) -> BlockingConnectionPool:
        """Make a bounded pool for commands that need no order; its reads have a timeout."""
        return BlockingConnectionPool(
            max_connections=MAX_CONNECTIONS,
            timeout=self.wait_s,
            socket_timeout=self.response_timeout_s,
            **self.options,
        )

    def create_connection(self, protocol: int = 2) -> AbstractConnection:
        """Make a dedicated connection; its user has to detect an unresponsive server.

        Args:
            protocol: version of RESP.
        """
        # Without a socket timeout it writes at once, in the order of the calls.
        options = {**self.options, "protocol": protocol, "socket_timeout": None}
        pool = BlockingConnectionPool(max_connections=1, **options)
        connection: AbstractConnection = pool.make_connection()
        return connection

    def rejection_error(self, error: BaseException) -> StoreRefused:
        """The error for a command that the server rejects permanently."""
        return StoreRefused(
            f"the store at {self.redacted_url} refused: {describe_error(error)}",
            retry_after_s=RETRY_AFTER_S,
        )

    def unavailable_error(self, error: BaseException, timeout_s: float) -> StoreUnavailable:
        """The error for a command that was not answered in time."""
        return StoreUnavailable(
            f"the store at {self.redacted_url} did not answer within {timeout_s:g} s: "
            f"{describe_error(error)}",
            retry_after_s=RETRY_AFTER_S,
        )


def transport_of(connection: AbstractConnection) -> asyncio.Transport:
    """The transport of an open connection; private in the client library."""
    writer: Any = connection._writer
    transport: asyncio.Transport = writer.transport
    return transport


def drop_unsent_on_close(connection: AbstractConnection) -> None:
    """Make the kernel discard unsent bytes when a TCP connection ends, even by a crash of the
    process (SO_LINGER 0); by default it would continue to send them."""
    sock = transport_of(connection).get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def abort(connection: AbstractConnection) -> None:
    """Close a connection at once and discard its unsent bytes."""
    if connection.is_connected:
        transport_of(connection).abort()
    await connection.disconnect(nowait=True)


def is_transient(error: BaseException) -> bool:
    """Whether the server may accept the same command later: unavailable, loading, or busy."""
    # On unix sockets the client library wraps the error reply to AUTH.
    if type(error) is RedisConnectionError and isinstance(error.__cause__, RedisError):
        error = error.__cause__
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return False
    if isinstance(error, ResponseError):
        # MasterDownError derives from ClusterDownError. The client library has no class for BUSY.
        return isinstance(error, ClusterDownError) or str(error).startswith("BUSY ")
    return isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError))


def is_error_reply(error: BaseException) -> bool:
    """Whether the error is the server's reply, so that the command was not executed."""
    return isinstance(error, (ResponseError, BusyLoadingError))


def describe_error(error: BaseException) -> str:
    """The message of an error with its error code, or the name of its type if it has none."""
    message = str(error) or type(error).__name__
    if "key usage extension" in message:
        message += _KEY_USAGE
    for kind, code in _ERROR_CODES.items():
        if isinstance(error, kind) and not message.startswith(code):
            return f"{code} {message}"
    return message


def _connection_options(settings: StoreSettings) -> dict[str, Any]:
    """The client library's connection options: the address, and options it must not change."""
    scheme = settings.url.partition("://")[0]
    response_timeout_s = settings.store_wait_s / ATTEMPTS_PER_CALL
    try:
        address: Mapping[str, Any] = parse_url(settings.url)
    except ValueError as error:
        # after `check_address` the message contains at most the name of an option
        raise StoreRefused(f"the store's address cannot be used: {error}") from None
    if scheme == "unix" and not address.get("path"):
        raise StoreRefused("expected unix:///path/of/socket as the store's address")
    tcp_options: dict[str, Any] = {}
    if "path" not in address:
        # The kernel drops unacknowledged bytes before the tombstone of a deletion expires.
        unacknowledged_ms = round(1000 * min(settings.store_wait_s, settings.tombstone_ttl_s))
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
        "socket_connect_timeout": response_timeout_s,
    }


def _redacted_url(options: Mapping[str, Any]) -> str:
    """The address without user, password and options."""
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if options.get("connection_class") else "redis"
    host, port = options.get("host", "localhost"), options.get("port", 6379)
    return f"{scheme}://{host}:{port}/{options.get('db', 0)}"


async def end_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and wait for their end. Before Python 3.12 a call that completes at the same
    time may lose a cancellation, so it is repeated."""
    started = [task for task in tasks if task is not None]
    while running := [task for task in started if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_S)
    await asyncio.gather(*started, return_exceptions=True)


async def finish_closing(closing: Coroutine[Any, Any, None]) -> None:
    """Close connections of the client library also if the caller is cancelled meanwhile: it closes
    each in a task, which a cancellation would end before it begins. Its errors are ignored, since
    the connections are closed: a server may not answer the end of TLS."""
    closed = asyncio.gather(closing, return_exceptions=True)
    try:
        await asyncio.wait([closed])
    finally:
        await asyncio.wait([closed])
