"""Checks of HTTP heads against request smuggling, and the bounds of their sizes.

`llhttp`, uvicorn's parser, rejects malformed lines, folded lines, bare line feeds, invalid lengths,
and a length beside a transfer coding. `check_head` rejects what it accepts although a proxy and
this service could frame or interpret it differently.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from service.core.errors import CarryError
from service.server.errors import (
    DuplicateField,
    ExpectationFailed,
    HeadTooLarge,
    HostNotAllowed,
    MalformedRequest,
)
from service.server.origins import AcceptsHost, accept_any_host

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
