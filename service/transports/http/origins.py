"""Origins of web pages that may open WebSockets, and send what may change streams without a key.

A browser lets any page send some requests to any address, also to one that only its machine
reaches, and marks them with the page's `Origin`. Programs send none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from service.core.errors import OriginNotAllowed

ANY_ORIGIN: Final = "*"
_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#@\\\s]+)")


def parse_origins(text: str) -> frozenset[str]:
    """The origins of a list that is separated by commas."""
    return frozenset(part for part in re.split(r"[,\s]+", text.strip()) if part)


def check_origin(origins: Sequence[str], host: str, allowed: frozenset[str]) -> None:
    """Reject a request of a page of another site.

    Args:
        origins: the values of its header Origin.
        host: the value of its header Host.
        allowed: origins besides that host; `ANY_ORIGIN` allows all.

    Raises:
        OriginNotAllowed
    """
    if not origins or ANY_ORIGIN in allowed:
        return
    origin = origins[0]
    is_own = _host(origin) == host.lower()
    if len(origins) > 1 or not (origin in allowed or is_own):
        raise OriginNotAllowed(
            f"Origin: expected the service's own host or an allowed origin, got {origin!r}",
            at="Origin",
            got=origin[:300],
        )


def _host(origin: str) -> str | None:
    """Host and port of an origin; None for another string, such as a URL with a fragment."""
    match = _ORIGIN.fullmatch(origin)
    return None if match is None else match[1].lower()
