"""Which node of a cluster has which slots, as a node says; pure, and addresses of nodes.

The client library's own cluster client keeps such a map too, with connections, retries and
locks of its own, none of which know of the order that a store needs; so the map is read here,
from CLUSTER SLOTS, which Redis and Valkey of every version answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from service.core.errors import StoreRefused
from service.store.settings import CLUSTER_SCHEMES

SLOTS: Final = 16_384
DEFAULT_PORT: Final = 6379


class Address(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Topology:
    """A cluster as one of its nodes sees it.

    Attributes:
        owners: for each slot its primary; None where nobody has it.
        primaries: those that have slots, in the order of their ids.
        replicas: all the others.
        layout: changes when a slot moves, or a primary does.
    """

    owners: tuple[Address | None, ...]
    primaries: tuple[Address, ...]
    replicas: tuple[Address, ...]
    layout: str

    @property
    def uncovered(self) -> int:
        """How many slots nobody has."""
        return self.owners.count(None)


def read_topology(reply: Any, asked: Address) -> Topology:
    """A topology out of the reply to CLUSTER SLOTS.

    Args:
        reply: for each range its first and last slot, its primary and its replicas; each node a
            host, a port and an id.
        asked: the node that gave it; it stands for the host that a node does not know of itself.

    Raises:
        StoreRefused: it is not such a reply.
    """
    owners: list[Address | None] = [None] * SLOTS
    primaries: dict[bytes, Address] = {}
    others: dict[Address, None] = {}
    ranges: list[tuple[int, int, bytes]] = []
    try:
        for first, last, *nodes in reply:
            primary, *replicas = nodes
            address = _address(primary, asked)
            owners[first : last + 1] = [address] * (last + 1 - first)
            primaries[primary[2]] = address
            others.update(dict.fromkeys(_address(node, asked) for node in replicas))
            ranges.append((first, last, primary[2]))
    except (TypeError, ValueError, IndexError) as error:
        raise StoreRefused(f"{asked} gave no cluster's slots: {reply!r}") from error
    ordered = tuple(primaries[name] for name in sorted(primaries))
    layout = hashlib.sha256(repr(sorted(ranges)).encode()).hexdigest()[:12]
    return Topology(tuple(owners), ordered, tuple(others), layout)


def _address(node: list[Any], asked: Address) -> Address:
    host = node[0]
    known = host not in (None, b"", b"?")
    return Address(host.decode() if known else asked.host, int(node[1]))


def seeds(url: str) -> list[Address]:
    """The nodes that a cluster's address names.

    Raises:
        StoreRefused: it names none, or something that is no node, or a database.
    """
    _, hosts, tail = _parts(url)
    if tail.partition("?")[0].strip("/0"):
        raise StoreRefused("a cluster has database 0 only, expected no other in its address")
    found: list[Address] = []
    for number, each in enumerate(hosts.split(","), start=1):
        try:
            parsed = urlsplit(f"//{each}")
            if not parsed.hostname:
                raise ValueError("no host")
            found.append(Address(parsed.hostname, parsed.port or DEFAULT_PORT))
        except ValueError:
            # not shown: it may be part of a password with an @ or ? that is not encoded
            raise StoreRefused(
                "expected host:port[,host:port...] as a cluster's address, and node "
                f"{number} of it is none"
            ) from None
    return found


def node_url(url: str, node: Address) -> str:
    """The address of one node: that of its cluster with one host, credentials and options kept."""
    scheme = url.partition("://")[0]
    credentials, _, tail = _parts(url)
    return f"{scheme.removesuffix('+cluster')}://{credentials}{node}{tail}"


def _parts(url: str) -> tuple[str, str, str]:
    """Credentials with their @, hosts, and path and query of a cluster's address."""
    scheme, _, rest = url.partition("://")
    if scheme not in CLUSTER_SCHEMES:
        raise StoreRefused(f"expected a cluster's address, got {scheme}://")
    authority, mark, query = rest.partition("?")
    credentials, at, place = authority.rpartition("@")
    hosts, slash, database = place.partition("/")
    return credentials + at, hosts, slash + database + mark + query
