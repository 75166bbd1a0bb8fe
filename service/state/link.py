"""The connections to one Redis or Valkey server, and the patience with it.

Every call is one request and its reply. A server that is away, restarting or loading is tried
again, with growing and jittered pauses, until the call's time is up. Calls made `in_order` share
one connection and wait for each other, so that the server sees them in the order in which
they were made; all others take a connection from a bounded pool.

A request whose reply was lost may have been carried out. The answer to a later try says so
(`repeated`), and if no try was answered in time, `ReplyLost` says so; the caller knows what
that means for its request. What the server itself refuses is never tried again here.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import structlog
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StoreRefused, StoreUnavailable
from service.state.settings import REDIS_SCHEMES, StoreSettings

RETRY_AFTER_S: Final = 1
PAUSE_S: Final = 0.01
MAX_PAUSE_S: Final = 0.5
TRIES: Final = 3
"""A connection that is silent for a third of a call's time is given up and made anew: longer
than a server hesitates, and early enough to reach the server that took its place."""

_URL_OPTIONS: Final = frozenset(
    {"host", "port", "db", "username", "password", "path", "connection_class"}
)

log = structlog.get_logger(__name__)


class ReplyLost(Exception):
    """The request was sent, perhaps carried out, and no try was answered in time; or a later
    try was refused, which says nothing about the earlier ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's reply.

    Attributes:
        value: as the protocol gives it: bytes, int, None or a list of these.
        repeated: an earlier try of the same request may have been carried out.
    """

    value: Any
    repeated: bool


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the SHA-1 the server knows it by."""

    text: bytes
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        """Read `lua/{name}.lua` of this package."""
        text = files("service.state").joinpath("lua", f"{name}.lua").read_bytes()
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


class ServerLink:
    """Connections to the server of some settings; none is opened before the first call.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        options = _connection_options(settings)
        self.where = _where(options)
        self._wait_s = settings.wait_s
        self._pool = BlockingConnectionPool(
            max_connections=settings.max_connections, timeout=settings.wait_s, **options
        )
        self._ordered: AbstractConnection = self._pool.make_connection()
        self._order = asyncio.Lock()
        self._away_since_s: float | None = None

    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""
        await self._ordered.disconnect()
        await self._pool.disconnect()

    async def ping(self, timeout_s: float) -> None:
        """One try, without patience.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server refuses.
        """
        try:
            async with asyncio.timeout(timeout_s), self._pooled() as connection:
                await _exchange(connection, ("PING",))
        except TimeoutError as error:
            raise StoreUnavailable(f"{self.where} did not answer in {timeout_s} s") from error
        except (RedisError, OSError) as error:
            if _is_passing(error):
                raise StoreUnavailable(f"{self.where}: {_text(error)}") from error
            raise self._refused(error) from error

    async def read(self, *command: str | bytes | int) -> Any:
        """The reply to a command that changes nothing, or that may be repeated at will.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server refuses the command.
        """
        try:
            return (await self._call(command, None, in_order=False)).value
        except ReplyLost as lost:
            cause = lost.__cause__ or lost
            if _is_passing(cause) or isinstance(cause, TimeoutError):
                raise self._unavailable(cause) from lost
            raise self._refused(cause) from lost

    async def run(
        self,
        script: Script,
        keys: list[str],
        arguments: list[str | bytes | int],
        *,
        in_order: bool,
    ) -> Answer:
        """The reply of a script that writes.

        Raises:
            StoreUnavailable: the server could not be reached in time, nothing was sent.
            ReplyLost: it was sent, and whether it ran is not known.
            StoreRefused: the server refuses to run it.
        """
        rest = (len(keys), *keys, *arguments)
        fallback = ("EVAL", script.text, *rest)
        return await self._call(("EVALSHA", script.sha, *rest), fallback, in_order=in_order)

    def reconnect(self) -> None:
        """Let the next ordered call look the address up anew: the server's role has changed."""
        self._ordered.mark_for_reconnect()

    async def _call(
        self,
        command: tuple[str | bytes | int, ...],
        fallback: tuple[str | bytes | int, ...] | None,
        *,
        in_order: bool,
    ) -> Answer:
        """Try until an answer, a refusal, or the end of the time."""
        backoff = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S)
        sent, failures = False, 0
        last: BaseException | None = None
        try:
            async with asyncio.timeout(self._wait_s), self._turn(in_order):
                while True:
                    reached = False
                    try:
                        async with self._connection(in_order) as connection:
                            reached = True
                            value = await _exchange(connection, command, fallback)
                        self._note_back()
                        return Answer(value, sent)
                    except (RedisError, OSError) as error:
                        if not _is_passing(error):
                            if sent:
                                raise ReplyLost(f"{self.where}: {_text(error)}") from error
                            raise self._refused(error) from error
                        last = error
                        sent = sent or (reached and not isinstance(error, BusyLoadingError))
                        self._note_away(error)
                    except asyncio.CancelledError:
                        sent = sent or reached
                        raise
                    await asyncio.sleep(backoff.compute(failures))
                    failures += 1
        except TimeoutError as error:
            cause = last or error
            if sent:
                raise ReplyLost(f"{self.where}: {_text(cause)}") from cause
            raise self._unavailable(cause) from cause

    @asynccontextmanager
    async def _turn(self, in_order: bool) -> AsyncIterator[None]:
        """Hold the order for a whole call, its later tries included."""
        if in_order:
            async with self._order:
                yield
        else:
            yield

    @asynccontextmanager
    async def _connection(self, in_order: bool) -> AsyncIterator[AbstractConnection]:
        if not in_order:
            async with self._pooled() as connection:
                yield connection
            return
        if self._ordered.should_reconnect():
            await self._ordered.disconnect(nowait=True)
        # Also notices a connection that the server closed meanwhile, before anything is sent.
        await self._pool.ensure_connection(self._ordered)
        yield self._ordered

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AbstractConnection]:
        connection: AbstractConnection = await self._pool.get_connection()
        try:
            yield connection
        finally:
            await self._pool.release(connection)

    def _note_away(self, error: BaseException) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            log.warning("store_away", store=self.where, reason=_text(error))

    def _note_back(self) -> None:
        if self._away_since_s is not None:
            away_s = round(time.monotonic() - self._away_since_s, 3)
            self._away_since_s = None
            log.info("store_back", store=self.where, away_s=away_s)

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        return StoreUnavailable(
            f"the store at {self.where} did not answer within {self._wait_s:g} s: {_text(error)}",
            retry_after_s=RETRY_AFTER_S,
        )

    def _refused(self, error: BaseException) -> StoreRefused:
        return StoreRefused(
            f"the store at {self.where} refused: {_text(error)}", retry_after_s=RETRY_AFTER_S
        )


async def _exchange(
    connection: AbstractConnection,
    command: tuple[str | bytes | int, ...],
    fallback: tuple[str | bytes | int, ...] | None = None,
) -> Any:
    """Send a command and read its reply; the fallback, where the script is not known."""
    await connection.send_command(*command)
    try:
        return await connection.read_response()
    except NoScriptError:
        if fallback is None:
            raise
    await connection.send_command(*fallback)
    return await connection.read_response()


def _is_passing(error: BaseException) -> bool:
    """Whether the server may answer the same request later: it is away or loading."""
    # On unix sockets the client library wraps what the server said to AUTH.
    if type(error) is RedisConnectionError and isinstance(error.__cause__, RedisError):
        error = error.__cause__
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return False
    return isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError))


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _connection_options(settings: StoreSettings) -> dict[str, Any]:
    """What the client library is given: the address, and settings that the address may not
    change (a reply decoded to text, say, would not be a state)."""
    scheme = settings.url.partition("://")[0]
    if scheme not in REDIS_SCHEMES:
        accepted = ", ".join(f"{name}://" for name in REDIS_SCHEMES)
        raise StoreRefused(f"expected a store address that begins with {accepted}, got {scheme}://")
    try:
        address: Mapping[str, Any] = parse_url(settings.url)
    except ValueError as error:
        raise StoreRefused(f"the store's address cannot be read: {error}") from error
    unknown = [name for name in address if name not in _URL_OPTIONS and not name.startswith("ssl_")]
    if unknown:
        raise StoreRefused(f"the store's address has options that are not taken: {unknown}")
    if scheme == "unix" and not address.get("path"):
        raise StoreRefused("expected unix:///path/of/socket as the store's address")
    return {
        **address,
        "protocol": 2,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": settings.wait_s / TRIES,
        "socket_connect_timeout": settings.wait_s / TRIES,
    }


def _where(options: Mapping[str, Any]) -> str:
    """The address without its secrets."""
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if options.get("connection_class") else "redis"
    host, port = options.get("host", "localhost"), options.get("port", 6379)
    return f"{scheme}://{host}:{port}/{options.get('db', 0)}"
