"""Counts the connections of the gRPC servers in this process, in bounded time.

grpcio reports them through channelz, whose Python interface is private; the public package
`grpcio-channelz` only serves it over gRPC. Without the interface there is no count.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import msgspec

MAX_PAGES: Final = 20
"""Pages of connections that are read of one server, each of up to `PAGE`."""

PAGE: Final = 500


def count_connections() -> int | None:
    """The open connections of all servers; None if the library does not report them."""
    try:
        library = import_module("grpc._cython.cygrpc")
        servers = msgspec.json.decode(library.channelz_get_servers(0)).get("server", ())
        return sum(_connections_of(library, int(server["ref"]["serverId"])) for server in servers)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        return None


def _connections_of(library: Any, server: int) -> int:
    count, start = 0, 0
    for _ in range(MAX_PAGES):
        page = msgspec.json.decode(library.channelz_get_server_sockets(server, start, PAGE))
        sockets = page.get("socketRef", ())
        count += len(sockets)
        if page.get("end") or not sockets:
            break
        start = int(sockets[-1]["socketId"]) + 1
    return count
