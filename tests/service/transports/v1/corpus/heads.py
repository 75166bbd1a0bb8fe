"""Raw requests whose end two readers could see in different places, with the answers they get.

The first line of every exchange is a request with an oddity of its head. What it carries as a
body, or what follows it, is itself a chunk request to the stream `HIDDEN`: a server that frames
the first one wrongly executes it. Each exchange is followed by `LAST`, whose answer ends the
connection, so that what came back is complete when the connection ends.
"""

from __future__ import annotations

from typing import Final, NamedTuple

HIDDEN: Final = "hidden"
"""The stream that no exchange may create."""

CHUNK: Final = b'{"position": 0, "inputs": [[0.5]]}'
HOST: Final = b"Host: localhost\r\n"
LAST: Final = b"GET /health/live HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
MODEL: Final = b"/v1/models/post-lstm"


def chunk(*lines: bytes, body: bytes = CHUNK, stream: str = HIDDEN) -> bytes:
    """A whole request for one chunk."""
    path = b"%b/streams/%b/chunks" % (MODEL, stream.encode())
    return post(*lines, b"Content-Length: %d" % len(body), path=path) + body


def post(*lines: bytes, path: bytes = MODEL + b"/predict", version: bytes = b"1.1") -> bytes:
    """The head of a POST, with a Host."""
    head = b"".join([line + b"\r\n" for line in lines])
    return b"POST %b HTTP/%b\r\n" % (path, version) + HOST + head + b"\r\n"


def length(body: bytes) -> bytes:
    """The header that frames a body."""
    return b"Content-Length: %d" % len(body)


def chunked(body: bytes, trailers: bytes = b"", extension: bytes = b"") -> bytes:
    """A body in the chunked transfer coding."""
    return b"%x%b\r\n%b\r\n0\r\n%b\r\n" % (len(body), extension, body, trailers)


class Exchange(NamedTuple):
    """Bytes that a client sends, and the statuses of all answers but that to `LAST`.

    Attributes:
        closes: the connection ends with the last of `statuses`, and `LAST` gets no answer.
    """

    sent: bytes
    statuses: tuple[int, ...]
    closes: bool = False


INNER: Final = chunk()
LONG: Final = INNER + b" " * (3 * 8192)
"""More bytes than the server's parser gets at once."""
TE: Final = b"Transfer-Encoding: chunked"


def _upgrade(connection: bytes, upgrade: bytes, body: bytes = INNER) -> bytes:
    return post(b"Connection: " + connection, b"Upgrade: " + upgrade, length(body)) + body


def _rejected(sent: bytes, status: int = 400) -> Exchange:
    return Exchange(sent, (status,), closes=True)


PREDICT: Final = b'{"sequences": [{"inputs": [[0.5]]}]}'

LIST: Final = b"a," * 5000
LISTED: Final = (
    b"Accept", b"Accept-Encoding", b"Authorization", b"Baggage", b"Connection", b"Content-Encoding",
    b"Content-Type", b"Forwarded", b"If-Match", b"If-None-Match", b"Origin",
    b"Sec-WebSocket-Extensions", b"Sec-WebSocket-Protocol", b"Traceparent", b"Tracestate",
    b"Upgrade", b"X-Forwarded-For",
)  # fmt: skip
"""Headers that are split or matched, here or by others."""

EXCHANGES: Final[dict[str, Exchange]] = {
    # An upgrade is ignored: the request is framed as one without it.
    "upgrade websocket": Exchange(_upgrade(b"Upgrade", b"websocket"), (400,)),
    "upgrade h2c": Exchange(_upgrade(b"Upgrade, HTTP2-Settings", b"h2c"), (400,)),
    "upgrade in lower case": Exchange(_upgrade(b"upgrade", b"x"), (400,)),
    "upgrade and keep-alive": Exchange(_upgrade(b"keep-alive, Upgrade", b"x"), (400,)),
    "upgrade, long body": Exchange(_upgrade(b"Upgrade", b"x", LONG), (400,)),
    "upgrade and close": _rejected(_upgrade(b"close, Upgrade", b"x") + INNER),
    "upgrade by a proxy": Exchange(
        post(b"Proxy-Connection: Upgrade", b"Upgrade: x", length(INNER)) + INNER, (400,)
    ),
    "upgrade in two lines": Exchange(
        post(b"Connection: keep-alive", b"Connection: Upgrade", b"Upgrade: x", length(INNER))
        + INNER,
        (400,),
    ),
    "upgrade, chunked": Exchange(
        post(b"Connection: Upgrade", b"Upgrade: h2c", TE) + chunked(INNER), (400,)
    ),
    "upgrade, good body": Exchange(_upgrade(b"Upgrade", b"h2c", PREDICT), (200,)),
    "upgrade without a body": Exchange(
        b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        (200,),
    ),
    "two upgrades": Exchange(_upgrade(b"Upgrade", b"h2c", PREDICT) * 2, (200, 200)),
    "CONNECT": _rejected(
        b"CONNECT carry:80 HTTP/1.1\r\n" + HOST + length(INNER) + b"\r\n\r\n" + INNER
    ),
    "HTTP/2 preface": _rejected(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + INNER),
    # Bodies with ambiguous framing end the connection.
    "length and chunked": _rejected(post(length(INNER), TE) + chunked(b"") + INNER),
    "chunked and length": _rejected(post(TE, length(INNER)) + chunked(b"") + INNER),
    "gzip, chunked": _rejected(post(b"Transfer-Encoding: gzip, chunked") + chunked(PREDICT)),
    "identity": _rejected(post(b"Transfer-Encoding: identity") + INNER),
    "identity, then chunked": _rejected(
        post(b"Transfer-Encoding: identity", TE) + chunked(PREDICT) + INNER
    ),
    "chunked twice": _rejected(post(TE, TE) + chunked(PREDICT) + INNER),
    "chunked in HTTP/1.0": _rejected(post(TE, version=b"1.0") + chunked(PREDICT) + INNER),
    "folded coding": _rejected(post(b"Transfer-Encoding:\r\n chunked") + chunked(PREDICT)),
    "coding with a tab": _rejected(post(b"Transfer-Encoding:\x0bchunked") + chunked(PREDICT)),
    "two lengths": _rejected(post(length(INNER), b"Content-Length: 0") + INNER),
    "the same length twice": _rejected(post(length(INNER), length(INNER)) + INNER),
    "list of lengths": _rejected(post(b"Content-Length: 0, %d" % len(INNER)) + INNER),
    "signed length": _rejected(post(b"Content-Length: +%d" % len(INNER)) + INNER),
    "length in hexadecimal": _rejected(post(b"Content-Length: 0x10") + INNER),
    "empty length": _rejected(post(b"Content-Length:") + INNER),
    "length over 64 bits": _rejected(post(b"Content-Length: 18446744073709551617") + INNER),
    "space before the colon": _rejected(post(b"Content-Length : %d" % len(INNER)) + INNER),
    "bare line feeds": _rejected(b"POST /x HTTP/1.1\nHost: c\nContent-Length: 1\n\nx" + INNER),
    "bare line feed in a line": _rejected(post(b"X: 1\nContent-Length: 0") + INNER),
    "bare carriage return": _rejected(post(b"X: 1\rContent-Length: 0") + INNER),
    "folded line": _rejected(post(b"X: 1\r\n 2", length(PREDICT)) + PREDICT + INNER),
    "chunk size with 0x": _rejected(post(TE) + b"0x1\r\nx\r\n0\r\n\r\n" + INNER),
    "chunk size of 65 bits": _rejected(post(TE) + b"10000000000000000\r\n" + INNER),
    "chunk without its end": _rejected(post(TE) + b"1\r\nx0\r\n\r\n" + INNER),
    "line feed after a chunk size": _rejected(post(TE) + b"1\nx\r\n0\r\n\r\n" + INNER),
    "line feed in an extension": _rejected(post(TE) + b"1;a\nx\r\n0\r\n\r\n" + INNER),
    # Trailers are not headers.
    "trailers": Exchange(
        post(TE) + chunked(PREDICT, b"Carry-Timeout: x\r\nContent-Encoding: gzip\r\n"), (200,)
    ),
    "upgrade in a trailer": Exchange(
        post(TE) + chunked(PREDICT, b"Connection: upgrade\r\nUpgrade: x\r\n"), (200,)
    ),
    "length in a trailer": _rejected(
        post(TE) + chunked(PREDICT, b"Content-Length: %d\r\n" % len(INNER)) + INNER
    ),
    "coding in a trailer": _rejected(post(TE) + chunked(PREDICT, TE + b"\r\n") + INNER),
    "chunk extensions": Exchange(post(TE) + chunked(PREDICT, extension=b';a="b"'), (200,)),
    # White space around a value is not part of it.
    "white space": Exchange(
        post(
            b"Host:\tlocalhost \t", b"Carry-Timeout: 62.5 ", b"Expect: 100-continue ",
            length(PREDICT),
        ).replace(HOST, b"") + PREDICT,
        (100, 200),
    ),
    "white space after a coding": Exchange(
        post(b"Transfer-Encoding:  chunked ") + chunked(PREDICT), (200,)
    ),
    # One host, one version, one value of headers that may come once.
    "no host": _rejected(INNER.replace(HOST, b"")),
    "two hosts": _rejected(post(HOST[:-2], length(PREDICT)) + PREDICT),
    "bad host": _rejected(post(length(PREDICT)).replace(HOST, b"Host: a b/c\r\n") + PREDICT),
    "HTTP/1.0": Exchange(post(length(PREDICT), version=b"1.0") + PREDICT + INNER, (200,), True),
    "HTTP/1.0, kept alive": Exchange(
        post(b"Connection: keep-alive", length(PREDICT), version=b"1.0") + PREDICT + INNER,
        (200,),
        True,
    ),
    "HTTP/1.0 without a host": Exchange(
        post(length(PREDICT), version=b"1.0").replace(HOST, b"") + PREDICT, (200,), True
    ),
    "HTTP/0.9": _rejected(b"GET /health/live\r\n\r\n" + INNER),
    "HTTP/2.0": _rejected(post(length(PREDICT), version=b"2.0") + PREDICT + INNER),
    "close": Exchange(post(b"Connection: close", length(PREDICT)) + PREDICT + INNER, (200,), True),
    "close in a list": Exchange(
        post(b"Connection: x, close", length(PREDICT)) + PREDICT + INNER, (200,), True
    ),
    "two content types": _rejected(
        chunk(b"Content-Type: application/json", b"Content-Type: application/msgpack")
    ),
    "two content encodings": _rejected(
        chunk(b"Content-Encoding: identity", b"Content-Encoding: gzip")
    ),
    # A page whose host name resolves to this machine has the same origin as the service.
    "host of a page": _rejected(
        chunk(b"Origin: http://evil.example:8000").replace(b"localhost", b"evil.example:8000"), 421
    ),
    "host of a page, no origin": _rejected(chunk().replace(b"localhost", b"evil.example"), 421),
    "host of a page, GET": _rejected(LAST.replace(b"localhost", b"evil.example"), 421),
    "host of a page, upgrade": _rejected(
        _upgrade(b"Upgrade", b"websocket").replace(b"localhost", b"evil.example"), 421
    ),
    "host behind a request": Exchange(
        post(length(PREDICT)) + PREDICT + chunk().replace(b"localhost", b"evil.example"),
        (200, 421),
        True,
    ),
    # Expect: the body is read, or the connection ends.
    "expects 100": Exchange(
        post(b"Expect: 100-continue", length(PREDICT)) + PREDICT, (100, 200)
    ),
    "expects 100 in HTTP/1.0": Exchange(
        post(b"Expect: 100-continue", length(PREDICT), version=b"1.0") + PREDICT, (200,), True
    ),
    "expects something else": _rejected(post(b"Expect: tea", length(INNER)) + INNER, 417),
    # Limits of a head.
    "a head of 70 KB": _rejected(post(b"X: " + b"v" * 70_000, length(PREDICT)) + INNER, 431),
    "a body after a long head": _rejected(
        post(b"X: " + b"v" * 70_000, length(INNER), path=b"/x") + INNER, 431
    ),
    "many lines": _rejected(post(*[b"X: 1"] * 300, length(PREDICT)) + PREDICT + INNER, 431),
    "an address of 70 KB": _rejected(post(path=b"/" + b"a" * 70_000) + INNER, 431),
    "a long list in many lines": _rejected(
        post(*[b"Accept: " + LIST[:1000]] * 9, length(PREDICT)) + PREDICT + INNER, 431
    ),
    "a long list of connection options": _rejected(_upgrade(b"Upgrade," + LIST, b"x"), 431),
    "many parameters": _rejected(post(length(PREDICT), path=b"/v1/models?" + b"a=1&" * 200), 431),
    "long cookies": Exchange(
        post(b"Cookie: " + b"a=1; " * 4000, length(PREDICT)) + PREDICT, (200,)
    ),
    # Errors that are answered before the body arrives; the body is drained.
    "no such model": Exchange(
        post(length(LONG), path=b"/v1/models/none/predict") + LONG, (404,)
    ),
    "no such route": Exchange(post(length(LONG), path=b"/v3") + LONG, (404,)),
    "wrong method": Exchange(
        b"PUT %b/predict HTTP/1.1\r\n" % MODEL + HOST + length(LONG) + b"\r\n\r\n" + LONG, (405,)
    ),
    "GET with a body": Exchange(
        b"GET /v1/models HTTP/1.1\r\n" + HOST + length(INNER) + b"\r\n\r\n" + INNER, (200,)
    ),
    "compressed": Exchange(
        post(b"Content-Encoding: gzip", length(INNER)) + INNER, (415,)
    ),
    # A malformed request behind a valid one is answered after it.
    "garbage after a request": Exchange(
        post(length(PREDICT)) + PREDICT + b"\x00garbage\r\n\r\n" + INNER, (200, 400), True
    ),
    "bad chunk size after a request": Exchange(
        post(length(PREDICT)) + PREDICT + post(TE) + b"x\r\n" + INNER, (200, 400), True
    ),
    # Names that clients remove from a URL.
    "dot": Exchange(chunk(stream="."), (400,)),
    "two dots": Exchange(chunk(stream=".."), (400,)),
    "escaped dots": Exchange(chunk(stream="%2e%2E"), (400,)),
}  # fmt: skip
