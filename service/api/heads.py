"""What a request's head has to be before anything is made of it, beyond what the parser demands.

`llhttp` refuses malformed lines, folded lines, bare line ends, lengths that are no number, and a
length beside a transfer coding. Here it is what it lets pass although two readers could understand
it differently, a proxy and this service for example.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

from service.errors import DuplicateField, ExpectationFailed, HeadTooLarge, MalformedRequest

MAX_HEAD_BYTES: Final = 64 * 1024
"""Most that may come of a request's head, or of what follows its body, before it is whole."""

MAX_HEADERS: Final = 128
"""Most lines of a head."""

Headers = Sequence[tuple[bytes, bytes]]

_VERSIONS: Final = ("1.0", "1.1")
_ONCE: Final = {
    b"host": "Host",
    b"content-type": "Content-Type",
    b"content-encoding": "Content-Encoding",
    b"expect": "Expect",
}
"""Of which one would win in silence, if there were two."""
is_host = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*").fullmatch


def check_head(method: bytes, url: bytes, version: str, headers: Headers) -> None:
    """Refuse what could be framed or understood in two ways, and what is too much.

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
    found: dict[bytes, bytes] = {}
    codings: list[bytes] = []
    for name, value in headers:
        if name == b"transfer-encoding":
            codings.append(value)
        elif name in _ONCE:
            if name in found:
                at = _ONCE[name]
                raise DuplicateField(f"{at}: expected once, got it again", at=at, expected="once")
            found[name] = value
    if codings and (version == "1.0" or len(codings) > 1 or codings[0].lower() != b"chunked"):
        got = b", ".join(codings)[:300].decode("latin-1")
        expected = "chunked" if version == "1.1" else "none in HTTP/1.0"
        raise MalformedRequest(
            f"Transfer-Encoding: expected {expected}, got {got!r}",
            at="Transfer-Encoding",
            expected=expected,
            got=got,
        )
    host = found.get(b"host")
    if host is None and version == "1.1":
        raise MalformedRequest("Host: expected one, got none", at="Host", expected="one")
    if host is not None and not is_host(host):
        raise MalformedRequest("Host: expected a host and a port", at="Host", expected="host:port")
    expectation = found.get(b"expect", b"100-continue").lower()
    if expectation != b"100-continue":
        got = expectation[:300].decode("latin-1")
        raise ExpectationFailed(
            f"Expect: expected 100-continue, got {got!r}",
            at="Expect",
            expected="100-continue",
            got=got,
        )


class ParsedHead(Protocol):
    """uvicorn's protocol after its parser has met a head."""

    parser: Any
    url: bytes
    headers: list[tuple[bytes, bytes]]


def head_without_upgrade(head: ParsedHead) -> bytes:
    """The bytes of a head that was parsed, without its `Upgrade`: no field of it holds a line's
    end, so that it is parsed as the same again."""
    version = head.parser.get_http_version().encode()
    lines = [b"%b %b HTTP/%b" % (head.parser.get_method(), head.url, version)]
    lines += [b"%b: %b" % header for header in head.headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
