"""Validation of request heads (request line and headers) beyond what the parser checks.

`llhttp` rejects malformed lines, folded lines, bare line feeds, invalid lengths, and a length
beside a transfer coding. This module rejects what it accepts although a proxy and this service
could frame or interpret it differently (request smuggling).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

from service.core.errors import DuplicateField, ExpectationFailed, HeadTooLarge, MalformedRequest

MAX_HEAD_BYTES: Final = 64 * 1024
"""Largest head of a request, and largest trailer section."""

MAX_HEADERS: Final = 128
"""Most header lines of a request."""

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


def check_head(method: bytes, url: bytes, version: str, headers: Headers) -> None:
    """Reject a head that is ambiguous or too large.

    Args:
        headers: names in lower case.

    Raises:
        HeadTooLarge, MalformedRequest, DuplicateField, ExpectationFailed
    """
    if len(url) + sum([len(name) + len(value) for name, value in headers]) > MAX_HEAD_BYTES:
        raise HeadTooLarge(f"head: expected at most {MAX_HEAD_BYTES} bytes")
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
        got = b", ".join(codings)[:300].decode("latin-1")
        expected = "chunked" if version == "1.1" else "none in HTTP/1.0"
        raise MalformedRequest(
            f"Transfer-Encoding: expected {expected}, got {got!r}",
            at="Transfer-Encoding",
            expected=expected,
            got=got,
        )
    host = fields.get(b"host")
    if host is None and version == "1.1":
        raise MalformedRequest("Host: expected one, got none", at="Host", expected="one")
    if host is not None and not is_host(host):
        raise MalformedRequest("Host: expected a host and a port", at="Host", expected="host:port")
    expectation = fields.get(b"expect", b"100-continue").lower()
    if expectation != b"100-continue":
        got = expectation[:300].decode("latin-1")
        raise ExpectationFailed(
            f"Expect: expected 100-continue, got {got!r}",
            at="Expect",
            expected="100-continue",
            got=got,
        )


class ParsedHead(Protocol):
    """uvicorn's protocol after it has parsed a head."""

    parser: Any
    url: bytes
    headers: list[tuple[bytes, bytes]]


def serialize_without_upgrade(head: ParsedHead) -> bytes:
    """Serialize a parsed head without its `Upgrade` header.

    No field contains a line end, so that it is parsed to the same head again.
    """
    version = head.parser.get_http_version().encode()
    lines = [b"%b %b HTTP/%b" % (head.parser.get_method(), head.url, version)]
    lines += [b"%b: %b" % header for header in head.headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
