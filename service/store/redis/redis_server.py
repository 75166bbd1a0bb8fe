"""One server: a pipelined connection for chunks, and another for everything that is only read.

Loads, commits and deletions use the first one, so that a load sees every earlier commit. Listings,
counts and checks may take long and must not delay them.

Use from one event loop. Errors of the client library do not leave this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from service.core.errors import CarryError
from service.store.capabilities import StoreTelemetry
from service.store.redis.commands import Command, PendingCommand
from service.store.redis.connections import ConnectionFactory, OnConnect
from service.store.redis.outcomes import Outcome, read_value
from service.store.redis.pipelined_connection import PipelinedConnection, RedirectHandler
from service.store.settings import StoreSettings


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
        self._reads = PipelinedConnection(self.factory)

    async def close(self) -> None:
        """Close both connections; once, after the last call returned."""
        await self.connection.close()
        await self._reads.close()

    async def execute_once(self, timeout_s: float, *command: str | bytes | int) -> Any:
        """Send a command once, without retries; returns the reply.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        pending = PendingCommand.of(*command)
        pending.is_once = True
        (outcome,) = await self._execute([pending], timeout_s)
        return read_value(outcome)

    async def read(self, *command: str | bytes | int) -> Any:
        """Send a read-only command and return its reply; it is sent again if a connection breaks.

        Raises:
            StoreUnavailable: no reply in time.
            StoreRefused: the server rejects the command.
        """
        (outcome,) = await self._execute([PendingCommand.of(*command)], self.factory.wait_s)
        return read_value(outcome)

    async def read_many(self, commands: Sequence[Command]) -> list[Any]:
        """Send read-only commands in one round trip; the reply to a rejected one is its error.

        Raises:
            StoreUnavailable: no reply in time.
        """
        pending = [PendingCommand.of(*command) for command in commands]
        replies: list[Any] = []
        for outcome in await self._execute(pending, self.factory.wait_s):
            try:
                replies.append(read_value(outcome))
            except CarryError as error:
                replies.append(error)
        return replies

    async def _execute(self, commands: Sequence[PendingCommand], timeout_s: float) -> list[Outcome]:
        self._reads.send(commands)
        try:
            async with asyncio.timeout(timeout_s):
                return [await command.future for command in commands]
        except TimeoutError as timeout:
            error = self._reads.last_error or timeout
            raise self.factory.unavailable_error(error, timeout_s) from error
        finally:
            for command in commands:
                command.future.cancel()
