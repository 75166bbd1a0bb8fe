"""The limit on open files, of which every connection is one.

A process that is at its limit accepts no connection and logs nothing: clients wait in the kernel's
queue. So the limit is raised as far as it goes, and connections are bounded to what it leaves room
for.
"""

from __future__ import annotations

import sys
from typing import Final

import structlog

log = structlog.get_logger(__name__)

RESERVED: Final = 256
"""Files that are no connections of clients: models, logs, the store's connections. At most a
quarter of all."""


def raise_open_files_limit() -> None:
    """Raise the soft limit of this process, and of those that it starts, to the hard limit."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:
        # a system may allow less than it says
        log.warning("open_files_limit_not_raised", limit=soft, hard_limit=hard, reason=str(error))


def connections_within_open_files(wanted: int) -> int:
    """How many of so many connections the limit on open files leaves room for; logged where that
    is fewer."""
    if sys.platform == "win32":
        return wanted
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    most = limit - min(RESERVED, limit // 4)
    if most < wanted:
        log.warning("connections_limited_by_open_files", limit=limit, max_connections=most)
    return min(wanted, most)
