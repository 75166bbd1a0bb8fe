"""Topology of a store with several servers; that of a Redis Cluster is parsed from CLUSTER SLOTS.

The client library's cluster client keeps such a map too, but with connections, retries and locks of
its own that do not keep the order of commands. CLUSTER SLOTS is answered by every version of Redis
and Valkey.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from service.core.errors import StoreRefused
from service.store.redis.address import Address

SLOTS: Final = 16_384


@dataclass(frozen=True, slots=True)
class Topology:
    """The servers as one of a cluster's nodes, or a Sentinel, reports them.

    Attributes:
        owners: the primary of each slot, of which there is one without a cluster; None if the slot
            has none.
        primaries: the primaries that have slots, ordered by node id.
        replicas: all other nodes.
        version: changes when a slot moves or a primary is replaced.
    """

    owners: tuple[Address | None, ...]
    primaries: tuple[Address, ...]
    replicas: tuple[Address, ...]
    version: str

    @property
    def uncovered_slots(self) -> int:
        """Number of slots without a primary."""
        return self.owners.count(None)


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
