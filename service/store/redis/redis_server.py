"""One server: a pipelined connection, and a bounded connection pool for everything else.

Loads, commits and deletions use the pipelined connection, so that a load sees every earlier commit.
Listings and readiness checks are read-only and may take long: they use a connection of the pool and
are retried with exponential backoff while the server is unavailable, until the call times out.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import structlog
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError, ResponseError

from service.core.errors import StoreUnavailable
from service.store.capabilities import StoreTelemetry
from service.store.redis.commands import Command, pack_command
from service.store.redis.connections import (
    ConnectionFactory,
    OnConnect,
    describe_error,
    is_transient,
)
from service.store.redis.pipelined_connection import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    PipelinedConnection,
    RedirectHandler,
)
from service.store.settings import StoreSettings

log = structlog.get_logger(__name__)


class RedisServer:
    """Connections to one server; none is opened before the first call.

    Args:
        settings: their address is this server's.
        redirect_handler: takes over redirected commands, if the server is a node of a cluster.
        telemetry: what the connection for chunks counts, of the whole store.
        on_connect: of `ConnectionFactory`.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(
        self,
        settings: StoreSettings,
        redirect_handler: RedirectHandler | None = None,
        telemetry: StoreTelemetry | None = None,
        on_connect: OnConnect | None = None,
    ):
        self.factory = ConnectionFactory(settings, on_connect)
        self.redacted_url = self.factory.redacted_url
        self.connection = PipelinedConnection(self.factory, redirect_handler, telemetry)
        self._pool = self.factory.create_pool()

    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""
        await self.connection.close()
        await self._pool.disconnect()

    async def execute_once(self, timeout_s: float, *command: str | bytes | int) -> Any:
        """Send a command once, without retries; returns the reply.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        try:
            async with asyncio.timeout(timeout_s), self._pooled() as connection:
                (reply,) = await _exchange(connection, [command])
        except TimeoutError as error:
            raise StoreUnavailable(
                f"{self.redacted_url} did not answer in {timeout_s} s"
            ) from error
        except (RedisError, OSError) as error:
            if is_transient(error):
                raise StoreUnavailable(f"{self.redacted_url}: {describe_error(error)}") from error
            raise self.factory.rejection_error(error) from error
        return self._accepted(reply)

    async def read(self, *command: str | bytes | int) -> Any:
        """Send a read-only command and return its reply.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        (reply,) = await self.read_many([command])
        return self._accepted(reply)

    async def read_many(self, commands: Sequence[Command]) -> list[Any]:
        """Send read-only commands in one round trip; the reply to a rejected one is its error.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server cannot be used.
        """
        backoff, failures = EqualJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S), 0
        last_error: BaseException | None = None
        try:
            async with asyncio.timeout(self.factory.wait_s):
                while True:
                    try:
                        async with (
                            self._pooled() as connection,
                            asyncio.timeout(self.factory.response_timeout_s),
                        ):
                            return await _exchange(connection, commands)
                    except (RedisError, OSError) as error:
                        if not is_transient(error):
                            raise self.factory.rejection_error(error) from error
                        if last_error is None:
                            log.warning(
                                "store_unavailable",
                                store=self.redacted_url,
                                reason=describe_error(error),
                            )
                        last_error = error
                    await asyncio.sleep(backoff.compute(failures))
                    failures += 1
        except TimeoutError as error:
            raise self.factory.unavailable_error(last_error or error) from (last_error or error)

    def _accepted(self, reply: Any) -> Any:
        if isinstance(reply, RedisError):
            raise self.factory.rejection_error(reply) from reply
        return reply

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AbstractConnection]:
        connection: AbstractConnection = await self._pool.get_connection()
        try:
            yield connection
        finally:
            await self._pool.release(connection)


async def _exchange(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    # Joined, because the event loop passes a list to the kernel as one buffer per command. The
    # client library would time every reply.
    packed = b"".join(map(pack_command, commands))
    await connection.send_packed_command(packed)
    replies: list[Any] = []
    transient: RedisError | None = None
    for _ in commands:
        try:
            replies.append(await connection.read_response(timeout=math.inf))
        except ResponseError as error:
            transient = error if is_transient(error) else transient
            replies.append(error)
    if transient is not None:
        raise transient
    return replies
