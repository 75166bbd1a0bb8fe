"""Router of a primary behind Redis Sentinel: a single server, whose address may change.

The connections resolve the address by themselves (`sentinel`); commands that are pending in a
failover are resent to the new primary as retries. A primary that is replaced while it is up (a
failover by command, or by Sentinels that cannot reach it) keeps its connections for some seconds,
in which it would acknowledge writes that are lost when it is demoted. So the router also asks for
the primary once a second, and moves the connections.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final, cast

import structlog
from redis.exceptions import RedisError

from service.store.redis.connections import describe_error
from service.store.redis.redis_server import RedisServer
from service.store.redis.router import Layout, SingleServerRouter
from service.store.redis.sentinel import NoSentinelAnswers, SentinelAddress, SentinelResolver
from service.store.redis.topology import Address
from service.store.settings import StoreSettings

CHECK_INTERVAL_S: Final = 1.0
"""Time between two checks of which server is the primary."""

log = structlog.get_logger(__name__)


class SentinelRouter(SingleServerRouter):
    """Router of the primary that the Sentinels of an address know.

    Raises:
        StoreRefused: the address cannot be used.
    """

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._settings = settings
        self._address = SentinelAddress.parse(settings.url)
        # shared with the connections, so that both know the same last primary
        self._resolver = cast("SentinelResolver", self._server.resolver)
        self._no_answer = ""
        self._replicas_at_start: list[RedisServer] = []
        self._primary: Address | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Find the replicas, and begin to follow the primary."""
        self._replicas_at_start = [
            RedisServer(self._settings.at(self._address.server_url(replica)))
            for replica in await self._resolver.find_replicas()
        ]
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
        for server in (self._server, *self._replicas_at_start):
            await server.close()

    async def layout(self) -> Layout:
        """The primary; the version changes with every failover, since cursors of a listing belong
        to one server."""
        # while no Sentinel answers, only the watcher waits for them: readiness checks do not
        error = self._no_answer or await self._follow()
        version = "" if self._primary is None else _version(self._primary)
        return Layout(version, [self._server], error)

    def replicas(self) -> list[RedisServer]:
        """The replicas at the start."""
        return self._replicas_at_start

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._follow()

    async def _follow(self) -> str:
        """Move the connections to the present primary; returns why none is known, if so."""
        try:
            primary = await self._resolver.find_primary()
        except (RedisError, OSError) as error:
            reason = f"{self.redacted_url}: {describe_error(error)}"
            self._no_answer = reason if isinstance(error, NoSentinelAnswers) else ""
            return reason
        self._no_answer = ""
        if primary != self._primary:
            log.info("primary_resolved", store=self.redacted_url, primary=str(primary))
            is_known, self._primary = self._primary is not None, primary
            if is_known:
                await self._server.move_to(primary)
        return ""


def _version(primary: Address) -> str:
    return hashlib.sha256(str(primary).encode()).hexdigest()[:12]
