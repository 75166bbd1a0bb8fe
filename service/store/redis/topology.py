"""Topology of a Redis Cluster, parsed from CLUSTER SLOTS, and addresses of its nodes; pure.

The client library's cluster client keeps such a map too, but with connections, retries and locks of
its own that do not keep the order of commands. CLUSTER SLOTS is answered by every version of Redis
and Valkey.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from service.core.errors import StoreRefused
from service.store.redis.address import CLUSTER_SCHEMES

SLOTS: Final = 16_384
DEFAULT_PORT: Final = 6379


class Address(NamedTuple):
    """Host and port of a node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Topology:
    """A cluster as one of its nodes reports it.

    Attributes:
        owners: the primary of each slot; None if the slot has none.
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


def parse_startup_nodes(url: str) -> list[Address]:
    """Parse the nodes that a cluster's address names.

    Raises:
        StoreRefused: it names no node, an invalid one, or a database.
    """
    _, hosts, tail = _split(url)
    if tail.partition("?")[0].strip("/0"):
        raise StoreRefused("a cluster has database 0 only, expected no other in its address")
    return parse_nodes(hosts, DEFAULT_PORT)


def parse_nodes(hosts: str, default_port: int) -> list[Address]:
    """Parse a list of hosts, separated by commas, with or without ports.

    Raises:
        StoreRefused: one is invalid.
    """
    nodes: list[Address] = []
    for number, text in enumerate(hosts.split(","), start=1):
        try:
            parsed = urlsplit(f"//{text}")
            if not parsed.hostname:
                raise ValueError("no host")
            nodes.append(Address(parsed.hostname, parsed.port or default_port))
        except ValueError:
            # not shown: it may be part of a password with an @ or ? that is not encoded
            raise StoreRefused(
                f"expected host:port[,host:port...] in the store's address, and node {number} of "
                "it is invalid"
            ) from None
    return nodes


def node_url(url: str, node: Address) -> str:
    """The address of one node: the cluster's address with one host, credentials and options."""
    scheme = url.partition("://")[0]
    credentials, _, tail = _split(url)
    return f"{scheme.removesuffix('+cluster')}://{credentials}{node}{tail}"


def _split(url: str) -> tuple[str, str, str]:
    scheme = url.partition("://")[0]
    if scheme not in CLUSTER_SCHEMES:
        raise StoreRefused(f"expected a cluster's address, got {scheme}://")
    return split_address(url)


def split_address(url: str) -> tuple[str, str, str]:
    """Split an address into credentials with their @, hosts, and path with query."""
    rest = url.partition("://")[2]
    authority, question_mark, query = rest.partition("?")
    credentials, at, location = authority.rpartition("@")
    hosts, slash, database = location.partition("/")
    return credentials + at, hosts, slash + database + question_mark + query
