"""HTTP framing on the slow path: uvicorn's parser, with checks against request smuggling.

`llhttp` rejects malformed lines, folded lines, bare line feeds, invalid lengths, and a length
beside a transfer coding. `check_head` rejects what it accepts although a proxy and this service
could frame or interpret it differently. `Upgrade` is ignored, as RFC 9110 (7.8) allows, and its
request is framed as one without it, unless a subclass switches protocols. Heads, their
fields, trailers and bytes after an early response are bounded.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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


class FramingProtocol(HttpToolsProtocol, ABC):
    """uvicorn's protocol up to the boundaries of requests.

    A subclass decides what happens between requests, how a request is failed, and which upgrades
    are not ignored.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._message_complete = True
        self._head_complete = False
        self._ignores_upgrade = False
        self._parser_bytes = 0
        self._drained_bytes = 0
        self._framing_error: CarryError | None = None
        self._accepts_host: AcceptsHost = accept_any_host

    @property
    @abstractmethod
    def _is_blocked(self) -> bool:
        """Whether the next request has to wait for the current one."""

    @property
    @abstractmethod
    def _stops_reading(self) -> bool:
        """Whether no further request of this connection is processed."""

    @abstractmethod
    def _fail(self, error: CarryError) -> None:
        """Answer the request that is being read with an error, and close the connection."""

    @abstractmethod
    def _switch_protocols(self, *, has_more: bool) -> bool:
        """Switch to another protocol, if the parsed head asks for one that is served; otherwise the
        head's `Upgrade` is ignored.

        Args:
            has_more: whether bytes after the head were received.
        """

    def _parse(self, data: bytes) -> bytes:
        """Parse as far as possible now; returns the bytes of the next request.

        The parser buffers an incomplete line, however long; so what it buffers is counted.
        """
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self._parser_bytes += len(piece)
            self._feed(piece, has_more=start + PIECE_BYTES < len(data))
            if self._parser_bytes > MAX_HEAD_BYTES:
                self._fail(HeadTooLarge(f"head: expected at most {MAX_HEAD_BYTES} bytes"))
            if self._stops_reading:
                break
            if self._message_complete or self._is_blocked:
                return data[start + PIECE_BYTES :]
        return b""

    def _feed(self, data: bytes, *, has_more: bool) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    # the parser treats the body of an upgrade as another protocol: restart with
                    # a new parser and the same head without `Upgrade`
                    [head_bytes] = upgrade.args
                    if self._switch_protocols(has_more=has_more or head_bytes < len(data)):
                        return
                    data = self._serialize_head(without=b"upgrade") + data[head_bytes:]
                    self._ignores_upgrade = False
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        except httptools.HttpParserError as error:
            # without `from error`: the application may be handling another exception
            self._fail(
                self._framing_error or MalformedRequest(f"expected an HTTP/1.1 request: {error}")
            )

    def _serialize_head(self, *, without: bytes) -> bytes:
        """The parsed head without one of its headers.

        No field contains a line end, so that it is parsed to the same head again.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != without]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _stop_parser(self, error: CarryError) -> None:
        """Raise through the parser; the error is kept, since the parser's own does not name it."""
        self._framing_error = error
        raise error

    def on_message_begin(self) -> None:
        """Parser callback: a request begins."""
        self._message_complete = self._head_complete = False
        self._drained_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser callback: a header, or a trailer, which is dropped."""
        if self._head_complete:
            return
        if len(self.headers) == MAX_HEADERS:
            self._stop_parser(HeadTooLarge(f"head: expected at most {MAX_HEADERS} lines"))
        # the parser does not strip trailing white space
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Parser callback: the head is complete; uvicorn starts the application."""
        version = self.parser.get_http_version()
        try:
            method = self.parser.get_method()
            check_head(method, self.url, version, self.headers, self._accepts_host)
        except CarryError as error:
            self._stop_parser(error)
        self._ignores_upgrade = self.parser.should_upgrade()
        if self._ignores_upgrade:
            return
        self._parser_bytes = 0
        if version == "1.0":
            self.expect_100_continue = False
        super().on_headers_complete()
        self._head_complete = True
        if self.expect_100_continue:
            # the body may never come, and the next bytes would then be ambiguous
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Parser callback: a part of a body."""
        self._parser_bytes = 0
        if self.cycle.response_complete:
            self._drained_bytes += len(body)
            if self._drained_bytes > MAX_DRAIN_BYTES:
                self._stop_parser(
                    MalformedRequest("the body of a request that was answered continues")
                )
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Parser callback: a request is complete."""
        if self._ignores_upgrade:
            return
        self._parser_bytes = 0
        self._message_complete = True
        if self.expect_100_continue:
            self.cycle.keep_alive = self.parser.should_keep_alive()
        super().on_message_complete()
