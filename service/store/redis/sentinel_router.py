"""Router of a primary that Redis Sentinel monitors: a single server, whose address may change.

The Sentinels are asked for the primary at the start, whenever its connection breaks, and once a
second: a primary that is replaced while it is up (a failover by command, or by Sentinels that
cannot reach it) would acknowledge writes for some seconds that are lost when it is demoted. So its
connections are closed and pending commands go to the new primary, as retries. While no Sentinel
answers, the last known primary is used: without Sentinels there is no failover.

Each connection verifies the server's role: a Sentinel that was partitioned may name a server that
is a replica now, whose reads would be stale.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.core.errors import StoreUnavailable
from service.store.redis.address import Address, StoreAddress
from service.store.redis.connections import (
    ATTEMPTS_PER_CALL,
    ConnectionFactory,
    end_tasks,
    finish_closing,
)
from service.store.redis.pipelined_connection import RedisServer
from service.store.redis.router import Layout, Router, Topology
from service.store.settings import StoreSettings

CHECK_INTERVAL_S: Final = 1.0
"""Time between two checks of which server is the primary."""

MAX_TIMEOUT_S: Final = 1.0
"""How long one Sentinel may take to answer before another is asked."""


class SentinelRouter(Router):
    """Router of the primary that the Sentinels of an address know."""

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self.on_connect = self._verify_role
        self._address = address = StoreAddress.parse(settings.url)
        self.redacted_url = str(address)
        share_s = settings.store_wait_s / ATTEMPTS_PER_CALL / (len(address.nodes) + 1)
        # rejects wrong options; those of the servers are TLS, and a user that Sentinels do not know
        unresolved = settings.at(address.server_url(Address("unresolved", 0)))
        servers = ConnectionFactory(unresolved).options
        self._sentinel_options: dict[str, Any] = {
            **{name: value for name, value in servers.items() if name.startswith("ssl_")},
            **address.sentinel_options,
            "ssl": address.is_tls,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": min(MAX_TIMEOUT_S, share_s),
            "socket_connect_timeout": min(MAX_TIMEOUT_S, share_s),
        }
        self._is_down = False
        self._replicas_at_start: list[RedisServer] = []
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Find the servers, and begin to follow the primary."""
        await super().start()
        async with self._sentinels() as sentinels:
            replicas = await sentinels.discover_replicas(self._address.primary_name)
        for host, port in replicas:
            url = self._address.server_url(Address(str(host), int(port)))
            self._replicas_at_start.append(RedisServer(self.settings.at(url)))
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        await end_tasks(self._watcher)
        await super().close()
        for server in self._replicas_at_start:
            await server.close()

    async def layout(self) -> Layout:
        """The primary; the version changes with every failover, since cursors of a listing belong
        to one server."""
        # while no Sentinel answers, only the watcher waits for them: readiness checks do not
        error = self._topology_error or await self._read_topology()
        if self._topology is None:
            raise self._unavailable_error() from error
        return self._layout(self._topology, "" if error is None else error.detail)

    def replicas(self) -> list[RedisServer]:
        """The replicas at the start."""
        return self._replicas_at_start

    def refresh(self) -> None:
        """Connect again, and ask the Sentinels again: the server's role has changed."""
        for server in self._servers.values():
            server.connection.reconnect()
        super().refresh()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._read_topology()

    async def _discover(self) -> Topology:
        """Ask for the primary that a Sentinel considers to be up."""
        name, errors, is_down = self._address.primary_name, list[str](), False
        # the errors of `discover_master` would show the options of its connections
        async with self._sentinels() as sentinels:
            for sentinel in sentinels.sentinels:
                options = sentinel.connection_pool.connection_kwargs
                node = Address(options["host"], options["port"])
                try:
                    # by name, in version 2 of the protocol
                    primaries: Any = await sentinel.sentinel_masters()
                except (RedisError, OSError) as error:
                    errors.append(f"Sentinel {node}: {str(error) or type(error).__name__}")
                    continue
                state = primaries.get(name)
                if state is not None and sentinels.check_master_state(state, name):
                    self._is_down = False
                    primary = Address(str(state["ip"]), int(state["port"]))
                    version = hashlib.sha256(str(primary).encode()).hexdigest()[:12]
                    return Topology((primary,), (primary,), (), version)
                is_down = is_down or state is not None
                reason = "does not know" if state is None else "considers down"
                errors.append(f"Sentinel {node} {reason} the primary {name!r}")
        self._is_down = is_down
        raise StoreUnavailable("; ".join(errors))

    @asynccontextmanager
    async def _sentinels(self) -> AsyncIterator[Sentinel]:
        nodes = random.sample(self._address.nodes, len(self._address.nodes))
        sentinels = Sentinel(nodes, sentinel_kwargs=self._sentinel_options)
        try:
            yield sentinels
        finally:
            await finish_closing(sentinels.aclose())

    async def _verify_role(self, connection: Any) -> None:
        """Prepare a connection to the primary."""
        server = f"{connection.host}:{connection.port}"
        if self._is_down:
            raise RedisConnectionError(f"a Sentinel considers the primary {server} down")
        await connection.on_connect()
        await connection.send_command("INFO", "replication")
        if b"role:master" not in await connection.read_response():
            raise RedisConnectionError(f"{server} is not a primary")
