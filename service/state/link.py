"""What a store asks of its server: requests in order on one lane, and single ones beside it.

Everything about streams goes through the lane, so that a load sees every commit that was asked
before it. Listings, checks and probes change nothing and may take long; they take a connection
of a bounded pool, and are tried again while the server is away, until the call's time is up.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff
from redis.exceptions import RedisError

from service.errors import StoreUnavailable
from service.state.connections import Backend, is_passing, text
from service.state.lane import MAX_PAUSE_S, PAUSE_S, Answer, Lane, ReplyLost
from service.state.settings import StoreSettings

__all__ = ["Answer", "ReplyLost", "Script", "ServerLink"]


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
        self._backend = Backend(settings)
        self.where = self._backend.where
        self._lane = Lane(self._backend)
        self._pool = self._backend.pool()

    async def close(self) -> None:
        """Close every connection; once, after the last call returned."""
        await self._lane.close()
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
            if is_passing(error):
                raise StoreUnavailable(f"{self.where}: {text(error)}") from error
            raise self._backend.refused(error) from error

    async def read(self, *command: str | bytes | int) -> Any:
        """The reply to a command that changes nothing, or that may be repeated at will.

        Raises:
            StoreUnavailable: no answer in time.
            StoreRefused: the server refuses the command.
        """
        backoff, failures = EqualJitterBackoff(cap=MAX_PAUSE_S, base=PAUSE_S), 0
        last: BaseException | None = None
        try:
            async with asyncio.timeout(self._backend.wait_s):
                while True:
                    try:
                        async with self._pooled() as connection:
                            return await _exchange(connection, command)
                    except (RedisError, OSError) as error:
                        if not is_passing(error):
                            raise self._backend.refused(error) from error
                        last = error
                    await asyncio.sleep(backoff.compute(failures))
                    failures += 1
        except TimeoutError as error:
            raise self._backend.unavailable(last or error) from (last or error)

    async def read_in_order(self, *command: str | bytes | int) -> Any:
        """As `read`, seeing whatever was asked by `run` before it.

        Raises:
            StoreUnavailable, StoreRefused
        """
        try:
            return (await self._lane.ask(command)).value
        except ReplyLost as lost:
            cause = lost.__cause__ or lost
            if isinstance(cause, TimeoutError) or is_passing(cause):
                raise self._backend.unavailable(cause) from lost
            raise self._backend.refused(cause) from lost

    async def run(
        self, script: Script, keys: list[str], arguments: list[str | bytes | int]
    ) -> Answer:
        """The reply of a script that writes, carried out in the order of the calls.

        Raises:
            StoreUnavailable: the server could not be reached in time, nothing was sent.
            ReplyLost: it was sent, and whether it ran is not known.
            StoreRefused: the server refuses to run it.
        """
        rest = (len(keys), *keys, *arguments)
        return await self._lane.ask(("EVALSHA", script.sha, *rest), ("EVAL", script.text, *rest))

    def reconnect(self) -> None:
        """Look the address up anew for the next requests: the server's role has changed."""
        self._lane.reconnect()

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[AbstractConnection]:
        connection: AbstractConnection = await self._pool.get_connection()
        try:
            yield connection
        finally:
            await self._pool.release(connection)


async def _exchange(connection: AbstractConnection, command: tuple[str | bytes | int, ...]) -> Any:
    await connection.send_command(*command)
    return await connection.read_response()
