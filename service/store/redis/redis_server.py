"""One server: its ordered lane, and a bounded pool beside it.

Everything about streams goes through the lane, so that a load sees every commit that was asked
before it. Listings, checks and probes change nothing and may take long; they take a connection
of the pool, and are tried again while the server is away, until the call's time is up.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import structlog
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError, ResponseError

from service.core.errors import StoreUnavailable
from service.store.redis.connections import Backend, is_passing, text
from service.store.redis.pipelined_connection import MAX_PAUSE_S, PAUSE_S, Lane, Router
from service.store.redis.store_request import Command
from service.store.settings import StoreSettings

log = structlog.get_logger(__name__)


class Server:
    """Connections to one server; none is opened before the first call.

    Args:
        settings: their address is this server's.
        router: told what the lane meets, where the server is one of several.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings, router: Router | None = None):
        self._backend = Backend(settings)
        self.where = self._backend.where
        self.lane = Lane(self._backend, router)
        self._pool = self._backend.pool()

    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""
        await self.lane.close()
        await self._pool.disconnect()

    async def try_once(self, timeout_s: float, *command: str | bytes | int) -> Any:
        """The reply of one try, without patience.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server refuses.
        """
        try:
            async with asyncio.timeout(timeout_s), self._pooled() as connection:
                return await _exchange(connection, command)
        except TimeoutError as error:
            raise StoreUnavailable(f"{self.where} did not answer in {timeout_s} s") from error
        except (RedisError, OSError) as error:
            if is_passing(error):
                raise StoreUnavailable(f"{self.where}: {text(error)}") from error
            raise self._backend.refused(error) from error

    async def read(self, *command: str | bytes | int) -> Any:
        """The reply to a read-only command.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server refuses the command.
        """
        (reply,) = await self.read_each([command])
        if isinstance(reply, RedisError):
            raise self._backend.refused(reply) from reply
        return reply

    async def read_each(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to read-only commands, in one round trip; an error in place of a refused one.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server cannot be used.
        """
        backoff, failures = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S), 0
        last: BaseException | None = None
        try:
            async with asyncio.timeout(self._backend.wait_s):
                while True:
                    try:
                        async with (
                            self._pooled() as connection,
                            asyncio.timeout(self._backend.silence_s),
                        ):
                            return await _exchange_each(connection, commands)
                    except (RedisError, OSError) as error:
                        if not is_passing(error):
                            raise self._backend.refused(error) from error
                        if last is None:
                            log.warning("store_away", store=self.where, reason=text(error))
                        last = error
                    await asyncio.sleep(backoff.compute(failures))
                    failures += 1
        except TimeoutError as error:
            raise self._backend.unavailable(last or error) from (last or error)

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AbstractConnection]:
        connection: AbstractConnection = await self._pool.get_connection()
        try:
            yield connection
        finally:
            await self._pool.release(connection)


async def _exchange_each(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    # The client library packs in Python, at four times the cost, and would time every reply.
    packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]
    await connection.send_packed_command(packed)
    replies: list[Any] = []
    passing: RedisError | None = None
    for _ in commands:
        try:
            replies.append(await connection.read_response(timeout=math.inf))
        except ResponseError as error:
            passing = error if is_passing(error) else passing
            replies.append(error)
    if passing is not None:
        raise passing
    return replies


async def _exchange(connection: AbstractConnection, command: Command) -> Any:
    await connection.send_command(*command)
    return await connection.read_response()
