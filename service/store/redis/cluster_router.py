"""Router of a Redis Cluster: sends each command to the primary of its slot.

The topology is read from any node that answers, also after a redirect or a deferral. CLUSTER SLOTS
is answered by every version of Redis and Valkey.

    MOVED              the slot has another primary: the map is updated, the command goes there
    ASK                the slot is migrating and these keys have moved: sent there once, with ASKING
    TRYAGAIN           the slot is migrating and some of the keys have moved: retried with backoff
    CLUSTERDOWN        no majority, or a slot without a primary: retried with backoff
    node unavailable   as soon as the topology names another primary, pending commands of the lost
                       node go there, marked as retries
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from typing import Any, Final

from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, TryAgainError

from service.core.errors import CarryError, StoreRefused, StoreUnavailable
from service.store.redis.address import Address, StoreAddress
from service.store.redis.commands import PendingCommand
from service.store.redis.connections import ATTEMPTS_PER_CALL
from service.store.redis.pipelined_connection import PipelinedConnection
from service.store.redis.router import Router, Topology
from service.store.settings import StoreSettings

SLOTS: Final = 16_384
NO_NODE: Final = "none"

TOPOLOGY_TIMEOUT_S: Final = 1.0
"""How long one node may take to return the topology before another is asked."""


class ClusterRouter(Router):
    """Router of a cluster; its startup nodes are the nodes of the address."""

    def __init__(self, settings: StoreSettings):
        super().__init__(settings)
        self._address = StoreAddress.parse(settings.url)
        self.redacted_url = str(self._address)
        self._topology_timeout_s = min(
            TOPOLOGY_TIMEOUT_S, settings.store_wait_s / ATTEMPTS_PER_CALL
        )
        for node in self._address.nodes:
            self._server(node)

    def slot(self, key: str) -> int:
        return key_slot(key.encode())

    def node_of(self, slot: int) -> Address | str:
        """The address of a slot's primary; `NO_NODE` if it has none."""
        return (self._owners[slot] if self._owners else None) or NO_NODE

    def handle_redirect(self, command: PendingCommand, error: RedisError) -> bool:
        """Send a command to another node, or again later; the node did not execute it."""
        if not isinstance(error, (AskError, TryAgainError, ClusterDownError)):
            return False
        command.redirect_error = error
        command.needs_asking = False
        is_first = command.redirect_count == 0
        command.redirect_count += 1
        if isinstance(error, AskError):
            sender = self._address_of(command.connection)
            target = Address(error.host or (sender.host if sender else ""), error.port)
            if isinstance(error, MovedError):
                self._owners[error.slot_id] = target
                self.refresh()
                if not is_first:
                    # Two nodes may redirect it to each other until they agree.
                    self._retry_with_backoff(command)
                    return True
            else:
                command.needs_asking = True
            self._spawn(self._send(self._server(target).connection, command))
            return True
        if isinstance(error, ClusterDownError):
            self.refresh()
        self._retry_with_backoff(command)
        return True

    async def _discover(self) -> Topology:
        """Read the topology from the first node that returns it."""
        nodes = list({*self._servers, *self._address.nodes})
        random.shuffle(nodes)
        errors: list[CarryError] = []
        for address in nodes:
            try:
                reply = await self._server(address).execute_once(
                    self._topology_timeout_s, "CLUSTER", "SLOTS"
                )
                topology = parse_topology(reply, address)
            except CarryError as error:
                errors.append(error)
                continue
            if topology.primaries:
                return topology
            errors.append(StoreUnavailable(f"{address} knows of no node that has slots"))
        # An unavailable node may return it later; nodes that all reject will keep rejecting.
        raise next((error for error in errors if isinstance(error, StoreUnavailable)), errors[0])

    def _may_keep_pending(self, connection: PipelinedConnection) -> bool:
        """Keep them while the node responds: one without the slots redirects them."""
        return connection.is_responsive

    def _kept_servers(self, topology: Topology) -> Collection[Address]:
        return {*topology.replicas, *self._address.nodes}

    async def _send(self, connection: PipelinedConnection, command: PendingCommand) -> None:
        if not command.future.done():
            connection.send((command,))

    def _address_of(self, connection: PipelinedConnection | None) -> Address | None:
        return next(
            (at for at, each in self._servers.items() if each.connection is connection), None
        )


def parse_topology(reply: Any, sender: Address) -> Topology:
    """Parse the reply to CLUSTER SLOTS.

    Args:
        reply: for each range its first and last slot, its primary and its replicas; each node a
            host, a port and an id.
        sender: the node that replied; it replaces the host of a node that does not know its own.

    Raises:
        StoreRefused: the reply has another shape.
    """
    owners: list[Address | None] = [None] * SLOTS
    primaries: dict[bytes, Address] = {}
    replicas: dict[Address, None] = {}
    ranges: list[tuple[int, int, bytes]] = []
    try:
        for first, last, *nodes in reply:
            primary, *others = nodes
            address = _parse_node(primary, sender)
            owners[first : last + 1] = [address] * (last + 1 - first)
            primaries[primary[2]] = address
            replicas.update(dict.fromkeys(_parse_node(node, sender) for node in others))
            ranges.append((first, last, primary[2]))
    except (TypeError, ValueError, IndexError) as error:
        raise StoreRefused(f"{sender} did not return a cluster's slots: {reply!r}") from error
    ordered = tuple(primaries[node_id] for node_id in sorted(primaries))
    version = hashlib.sha256(repr(sorted(ranges)).encode()).hexdigest()[:12]
    return Topology(tuple(owners), ordered, tuple(replicas), version)


def _parse_node(node: list[Any], sender: Address) -> Address:
    host = node[0]
    is_known = host not in (None, b"", b"?")
    return Address(host.decode() if is_known else sender.host, int(node[1]))
