"""Limit on open files: raises it, and limits connections to what it allows.

Every connection takes a file descriptor. A process at its limit accepts no connection and logs
nothing, while clients wait in the kernel's queue.
"""

from __future__ import annotations

import sys
from typing import Final

import structlog

log = structlog.get_logger(__name__)

RESERVED: Final = 256
"""Descriptors reserved for models, logs and store connections; at most a quarter of the limit."""


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
        # Some systems allow less than the hard limit.
        log.warning("open_files_limit_not_raised", limit=soft, hard_limit=hard, reason=str(error))


def limit_connections_to_open_files(wanted: int) -> int:
    """Reduce a number of connections to what the limit on open files allows, with a warning."""
    if sys.platform == "win32":
        return wanted
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    allowed = limit - min(RESERVED, limit // 4)
    if allowed < wanted:
        log.warning("connections_limited_by_open_files", limit=limit, max_connections=allowed)
    return min(wanted, allowed)
