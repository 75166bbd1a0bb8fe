"""Checks of HTTP heads: against request smuggling, and against pages of other sites.

`llhttp`, uvicorn's parser, rejects malformed lines, folded lines, bare line feeds, invalid lengths,
and a length beside a transfer coding. `check_head` rejects what it accepts although a proxy and
this service could frame or interpret it differently, and bounds the sizes of heads.

A browser lets any page send some requests to any address, also to one that only its machine
reaches, and marks them with the page's `Origin`. Programs send none. A page may also let its own
host name resolve to the service's address (DNS rebinding); then the origin of the page is the
service's. So a service on a loopback address rejects such host names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from service.core.errors import CarryError
from service.server.errors import (
    DuplicateField,
    ExpectationFailed,
    HeadTooLarge,
    HostNotAllowed,
    MalformedRequest,
    OriginNotAllowed,
)

MAX_HEAD_BYTES: Final = 64 * 1024
"""Largest head of a request, and largest trailer section."""

MAX_FIELD_BYTES: Final = 8 * 1024
"""Longest URL, and longest value of a header, all its lines together: they are split, matched and
quoted in errors."""

MAX_HEADERS: Final = 128
"""Maximum header lines, and query parameters, of a request."""

PIECE_BYTES: Final = 8 * 1024
"""Maximum bytes given to the parser at once: uvicorn allocates an object for each request."""

MAX_DRAIN_BYTES: Final = 1024 * 1024
"""Maximum bytes that are discarded of a body whose request was answered early."""

BODY_HEADERS: Final = (b"content-length", b"transfer-encoding")

Headers = Sequence[tuple[bytes, bytes]]

_VERSIONS: Final = ("1.0", "1.1")
_ONCE: Final = {
    b"host": "Host",
    b"content-type": "Content-Type",
    b"content-encoding": "Content-Encoding",
    b"expect": "Expect",
}
"""Headers that may come once; of two, one would be silently ignored."""
is_host = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*").fullmatch

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


def check_head(
    method: bytes,
    url: bytes,
    version: str,
    headers: Headers,
    accepts_host: AcceptsHost = accept_any_host,
) -> None:
    """Reject a head that is ambiguous, too large, or names another host.

    Args:
        headers: names in lower case.

    Raises:
        HeadTooLarge, MalformedRequest, DuplicateField, HostNotAllowed, ExpectationFailed
    """
    head_bytes = len(url) + sum([len(name) + len(value) for name, value in headers])
    if head_bytes > MAX_HEAD_BYTES:
        raise HeadTooLarge(f"head: expected at most {MAX_HEAD_BYTES} bytes")
    if head_bytes > MAX_FIELD_BYTES:
        _check_fields(url, headers)
    if url.count(b"&") > MAX_HEADERS:
        raise HeadTooLarge(f"URL: expected at most {MAX_HEADERS} query parameters")
    if version not in _VERSIONS:
        raise MalformedRequest(f"expected HTTP/1.1, got {version}", expected="1.1", got=version)
    if method == b"CONNECT":
        raise MalformedRequest("expected a method other than CONNECT: this is no proxy")
    fields: dict[bytes, bytes] = {}
    codings: list[bytes] = []
    for name, value in headers:
        if name == b"transfer-encoding":
            codings.append(value)
        elif name in _ONCE:
            if name in fields:
                at = _ONCE[name]
                raise DuplicateField(f"{at}: expected once, got it again", at=at, expected="once")
            fields[name] = value
    if codings and (version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked"):
        expected = "chunked" if version == "1.1" else "none in HTTP/1.0"
        raise _wrong_field(MalformedRequest, "Transfer-Encoding", expected, b", ".join(codings))
    host = fields.get(b"host")
    if host is None and version == "1.1":
        raise MalformedRequest("Host: expected one, got none", at="Host", expected="one")
    if host is not None and not is_host(host):
        raise MalformedRequest("Host: expected a host and a port", at="Host", expected="host:port")
    if host is not None and not accepts_host(host):
        expected = "localhost, 127.0.0.1 or a name in CARRY_ALLOWED_HOSTS"
        raise _wrong_field(HostNotAllowed, "Host", expected, host)
    expectation = fields.get(b"expect", b"100-continue").lower()
    if expectation != b"100-continue":
        raise _wrong_field(ExpectationFailed, "Expect", "100-continue", expectation)


def _wrong_field(kind: type[CarryError], at: str, expected: str, value: bytes) -> CarryError:
    got = value[:300].decode("latin-1")
    detail = f"{at}: expected {expected}, got {got!r}"
    return kind(detail, at=at, expected=expected, got=got)


def _check_fields(url: bytes, headers: Headers) -> None:
    """Reject a head with a long field; cookies may be long, since nothing reads them.

    Raises:
        HeadTooLarge
    """
    sizes = Counter(URL=len(url))
    for name, value in headers:
        sizes[name.decode("latin-1")] += len(value)
    del sizes["cookie"]
    at, size = max(sizes.items(), key=lambda item: item[1])
    if size > MAX_FIELD_BYTES:
        raise HeadTooLarge(f"{at[:300]}: expected at most {MAX_FIELD_BYTES} bytes, got {size}")


def serialize_head(
    method: bytes, url: bytes, version: str, headers: Headers, *, without: bytes
) -> bytes:
    """A parsed head without one of its headers.

    No field contains a line end, so that it is parsed to the same head again.
    """
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    lines += [b"%b: %b" % header for header in headers if header[0] != without]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def check_origin(headers: Headers, allowed: frozenset[str]) -> None:
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
