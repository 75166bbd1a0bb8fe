"""Origins of web pages that may open WebSockets, and send what may change streams without a key.

A browser lets any page send some requests to any address, also to one that only its machine
reaches, and marks them with the page's `Origin`. Programs send none.

A page may also let its own host name resolve to the service's address (DNS rebinding); then the
origin of the page is the service's. So a service on a loopback address rejects such host names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from service.server.errors import OriginNotAllowed

ANY_ORIGIN: Final = "*"

AcceptsHost = Callable[[bytes], object]
"""Whether the value of a Host header names the service."""

_LOOPBACK: Final = rb"(?:[a-z0-9-]+\.)*localhost\.?|127(?:\.[0-9]{1,3}){3}|\[::1\]"
_ADDRESS: Final = rb"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9a-f:.]+\]"
_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#@\\\s]+)")


def parse_origins(text: str) -> frozenset[str]:
    """The origins, or hosts, of a list that is separated by commas."""
    return frozenset(part for part in re.split(r"[,\s]+", text.strip()) if part)


def accept_any_host(host: bytes) -> bool:
    """The rule of a service that may have any name (`AcceptsHost`)."""
    return True


def host_rule(address: str, names: str) -> AcceptsHost:
    """Make the rule for the Host headers that a service on this address accepts.

    On a loopback address it accepts loopback names. On another one it accepts every name, unless
    `names` has some; then also IP addresses, which health checks use: no page can have the
    address of another machine as its host.

    Args:
        names: further ones, separated by commas; `*` for all.
    """
    listened = f"[{address}]" if ":" in address else address
    is_loopback = re.fullmatch(_LOOPBACK, listened.encode(), re.IGNORECASE) is not None
    allowed = parse_origins(names)
    if ANY_ORIGIN in allowed or not (allowed or is_loopback):
        return accept_any_host
    known = [_LOOPBACK, *([] if is_loopback else [_ADDRESS])]
    known += [re.escape(name.encode()) for name in sorted(allowed)]
    return re.compile(rb"(?:%b)(?::[0-9]*)?" % b"|".join(known), re.IGNORECASE).fullmatch


def check_origin(headers: Sequence[tuple[bytes, bytes]], allowed: frozenset[str]) -> None:
    """Reject a request of a page of another site.

    Args:
        headers: of the request, their names in lower case.
        allowed: origins besides the request's own host; `ANY_ORIGIN` allows all.

    Raises:
        OriginNotAllowed
    """
    texts: dict[bytes, list[str]] = {b"origin": [], b"host": [""], b"sec-fetch-site": []}
    for name, value in headers:
        if name in texts:
            texts[name].append(value.decode("latin-1"))
    origins = texts[b"origin"]
    # a page cannot set `Sec-Fetch-Site`, and a proxy may have changed the host
    is_own = texts[b"sec-fetch-site"] == ["same-origin"]
    if not origins or is_own or ANY_ORIGIN in allowed:
        return
    origin = origins[0]
    is_own = _host(origin) == texts[b"host"][-1].lower()
    if len(origins) > 1 or not (origin in allowed or is_own):
        raise OriginNotAllowed(
            f"Origin: expected the service's own host or one of CARRY_WEBSOCKET_ORIGINS, "
            f"got {origin!r}",
            at="Origin",
            got=origin[:300],
        )


def _host(origin: str) -> str | None:
    """Host and port of an origin; None for another string, such as a URL with a fragment."""
    match = _ORIGIN.fullmatch(origin)
    return None if match is None else match[1].lower()
