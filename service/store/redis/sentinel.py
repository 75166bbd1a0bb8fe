"""Connections to a primary that Redis Sentinel monitors; its address is resolved at every connect.

    redis+sentinel://user:password@host:port,host:port/NAME/db     the hosts are Sentinels

A connection asks the Sentinels for the primary, connects, and verifies the server's role: a
Sentinel that was partitioned may name a server that is a replica now, whose reads would be stale.
After a failover the connections to the old primary break (Sentinel closes them when it demotes a
server), so that the next attempt finds the new one. While no Sentinel answers, the last known
primary is used: without Sentinels there is no failover.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.store.redis.address import SENTINEL_OPTIONS
from service.store.redis.topology import Address, parse_nodes, split_address

DEFAULT_PORT: Final = 26379
MAX_TIMEOUT_S: Final = 1.0
"""How long one Sentinel may take to answer before another is asked."""

RETRY_S: Final = 5.0
"""How long the last known primary is used without asking, after no Sentinel has answered. The
router asks once a second and moves the connections."""


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """An address of this scheme, in its parts.

    Attributes:
        sentinels: some of the Sentinels.
        name: by which they know the primary.
        database: of the servers.
        credentials: user and password of the servers, with their @.
        options: the query for the servers.
        sentinel_options: user and password of the Sentinels.
    """

    is_tls: bool
    sentinels: tuple[Address, ...]
    name: str
    database: int
    credentials: str
    options: str
    sentinel_options: dict[str, str]

    @classmethod
    def parse(cls, url: str) -> SentinelAddress:
        """Parse an address that passed `check_address`.

        Raises:
            StoreRefused: a host is invalid.
        """
        credentials, hosts, tail = split_address(url)
        path, _, query = tail.partition("?")
        name, _, database = path.removeprefix("/").partition("/")
        options = parse_qsl(query)
        return cls(
            url.startswith("rediss"),
            tuple(parse_nodes(hosts, DEFAULT_PORT)),
            name,
            int(database or 0),
            credentials,
            urlencode([option for option in options if option[0] not in SENTINEL_OPTIONS]),
            {
                option.removeprefix("sentinel_"): value
                for option, value in options
                if option in SENTINEL_OPTIONS
            },
        )

    def server_url(self, server: Address) -> str:
        """The address of one server."""
        scheme = "rediss" if self.is_tls else "redis"
        query = f"?{self.options}" if self.options else ""
        return f"{scheme}://{self.credentials}{server}/{self.database}{query}"

    def __str__(self) -> str:
        """The address without secrets and options."""
        scheme = "rediss+sentinel" if self.is_tls else "redis+sentinel"
        return f"{scheme}://{','.join(map(str, self.sentinels))}/{self.name}/{self.database}"


class NoSentinelAnswers(RedisConnectionError):
    """No Sentinel that answers knows the primary."""


class SentinelResolver:
    """Asks the Sentinels of an address for its servers, with new connections each time."""

    def __init__(self, address: SentinelAddress, response_timeout_s: float):
        self._address = address
        timeout_s = min(MAX_TIMEOUT_S, response_timeout_s / (len(address.sentinels) + 1))
        # the options of the servers are those of TLS, and a user, which the Sentinels do not know
        options = _server_options(address)
        self._options: dict[str, Any] = {
            **{name: value for name, value in options.items() if name.startswith("ssl_")},
            **address.sentinel_options,
            "ssl": address.is_tls,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
        }
        self._last_primary: Address | None = None
        self._ask_again_s = 0.0

    async def resolve(self) -> Address:
        """Resolve the primary to connect to; the last known one while no Sentinel answers.

        Raises:
            RedisConnectionError: a Sentinel considers it down, or none was ever named.
        """
        last = self._last_primary
        if last is not None and time.monotonic() < self._ask_again_s:
            return last
        try:
            return await self.find_primary()
        except NoSentinelAnswers:
            if last is None:
                raise
            return last

    async def find_primary(self) -> Address:
        """The primary that a Sentinel considers to be up.

        Raises:
            NoSentinelAnswers
            RedisConnectionError: a Sentinel considers it down.
        """
        name, errors = self._address.name, list[str]()
        kind: type[RedisConnectionError] = NoSentinelAnswers
        nodes = self._shuffled()
        # the errors of `discover_master` would show the options of its connections
        async with Sentinel(nodes, sentinel_kwargs=self._options) as sentinels:
            for node, sentinel in zip(nodes, sentinels.sentinels, strict=True):
                try:
                    # by name, in version 2 of the protocol
                    primaries: Any = await sentinel.sentinel_masters()
                except (RedisError, OSError) as error:
                    errors.append(f"Sentinel {node}: {str(error) or type(error).__name__}")
                    continue
                state = primaries.get(name)
                if state is not None and sentinels.check_master_state(state, name):
                    self._ask_again_s = 0.0
                    self._last_primary = Address(str(state["ip"]), int(state["port"]))
                    return self._last_primary
                if state is not None:
                    kind = RedisConnectionError
                reason = "does not know" if state is None else "considers down"
                errors.append(f"Sentinel {node} {reason} the primary {name!r}")
        has_answer = kind is not NoSentinelAnswers
        self._ask_again_s = 0.0 if has_answer else time.monotonic() + RETRY_S
        raise kind("; ".join(errors))

    async def find_replicas(self) -> list[Address]:
        """Its replicas that a Sentinel considers to be up; empty if none answers."""
        async with Sentinel(self._shuffled(), sentinel_kwargs=self._options) as sentinels:
            found = await sentinels.discover_replicas(self._address.name)
        return [Address(str(host), int(port)) for host, port in found]

    def _shuffled(self) -> list[Address]:
        return random.sample(self._address.sentinels, len(self._address.sentinels))


class _ResolvingConnection(AbstractConnection):
    """Connects to what the Sentinels name."""

    host: str
    port: int

    def __init__(self, *, resolver: SentinelResolver, **options: Any):
        super().__init__(**options, redis_connect_func=_verify_role)
        self._resolver = resolver

    async def connect(self) -> None:
        """Resolve and connect, unless it is connected."""
        if not self.is_connected:
            self.host, self.port = await self._resolver.resolve()
            await super().connect()  # type: ignore[no-untyped-call]


class PrimaryConnection(_ResolvingConnection, Connection):
    """A connection to the primary."""


class PrimarySSLConnection(_ResolvingConnection, SSLConnection):
    """A connection to the primary over TLS."""


async def _verify_role(connection: Any) -> None:
    await connection.on_connect()
    await connection.send_command("INFO", "replication")
    if b"role:master" not in await connection.read_response():
        raise RedisConnectionError(f"{connection.host}:{connection.port} is not a primary")


def sentinel_options(address: SentinelAddress, response_timeout_s: float) -> dict[str, Any]:
    """Connection options like those of `parse_url`.

    Raises:
        ValueError: the address has an invalid option.
    """
    return {
        **_server_options(address),
        "connection_class": PrimarySSLConnection if address.is_tls else PrimaryConnection,
        "resolver": SentinelResolver(address, response_timeout_s),
    }


def _server_options(address: SentinelAddress) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(address.server_url(Address("unresolved", 0))))
    return options
