"""Requests for one chunk, by what makes them well-formed, doubtful or ambiguous."""

from __future__ import annotations

from tests.service.transports.v1.raw_http import (
    PATH,
    chunk,
    packed,
    request,
)

FAST: dict[str, bytes] = {
    "created": request(chunk()),
    "appended": request(chunk(None), "Content-Type: application/json; charset=utf-8"),
    "ahead": request(chunk(9)),
    "packed": request(packed(0), "Content-Type: application/msgpack"),
    "packed for json": request(packed(0), "content-type: application/msgpack", "ACCEPT: */*"),
    "json for packed": request(chunk(), "Accept: application/msgpack"),
    "refused in packed": request(packed(3), "Content-Type: application/msgpack"),
    "own id": request(chunk(), "X-Request-Id: mine-1"),
    "kept alive": request(chunk(), "Connection: keep-alive", "User-Agent: a b\tc"),
    "own timeout": request(chunk(), "Carry-Timeout: 62.5"),
    "other state": request(chunk(), 'If-Match: "x", "y"'),
    "any state": request(chunk(), "If-Match: *"),
    "other epoch": request(chunk(0, epoch="0123456789abcdef")),
}
SLOW: dict[str, bytes] = {
    "no model": request(chunk(), first="POST /v1/models/none/streams/s/chunks HTTP/1.1"),
    "a query": request(chunk(), first=f"POST {PATH.format('s')}?return_state=1 HTTP/1.1"),
    "escaped": request(chunk(), first=f"POST {PATH.format('s%41')} HTTP/1.1"),
    "HTTP/1.0": request(chunk(), first=f"POST {PATH.format('s')} HTTP/1.0"),
    "weak ETag": request(chunk(), 'If-Match: W/"x"'),
    "empty If-Match": request(chunk(), "If-Match: "),
    "two lines of If-Match": request(chunk(), 'If-Match: "x"', 'If-Match: "y"'),
    "close": request(chunk(), "Connection: close"),
    "wrong body": request(b'{"inputs": [[1, 2]]}'),
    "empty body": request(b""),
    "not JSON": request(b"{"),
    "compressed": request(chunk(), "Content-Encoding: gzip"),
    "wrong type": request(chunk(), "Content-Type: text/plain"),
    "wrong accept": request(chunk(), "Accept: text/html"),
    "no timeout": request(chunk(), "Carry-Timeout: 0"),
    "two timeouts": request(chunk(), "Carry-Timeout: 1", "Carry-Timeout: 2"),
    "id of spaces": request(chunk(), "X-Request-Id: a b"),
    "chunked": request(
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunk()), chunk()), "Transfer-Encoding: chunked", length=""
    ),
    "a proxy's close": request(chunk(), "Proxy-Connection: close"),
    "a page of another site": request(chunk(), "Origin: https://evil.example"),
    "long headers": request(chunk(), "X-Long: " + "x" * 5000),
    "escaped slash": request(chunk(), first=f"POST {PATH.format('a%2Fb')} HTTP/1.1"),
    "escaped dot": request(chunk(), first=f"POST {PATH.format('%2E')} HTTP/1.1"),
    "escaped line end": request(chunk(), first=f"POST {PATH.format('s')}%0A HTTP/1.1"),
    "no stream": request(chunk(), first=f"POST {PATH.format('')} HTTP/1.1"),
    "slash at the end": request(chunk(), first=f"POST {PATH.format('s')}/ HTTP/1.1"),
    "double slash": request(chunk(), first=f"POST /{PATH.format('s')} HTTP/1.1"),
    "upper case": request(chunk(), first=f"POST {PATH.format('s').upper()} HTTP/1.1"),
    "PUT": request(chunk(), first=f"PUT {PATH.format('s')} HTTP/1.1"),
    "OPTIONS": request(b"", first=f"OPTIONS {PATH.format('s')} HTTP/1.1"),
    "other method": request(b"", first=f"GET {PATH.format('s')} HTTP/1.1"),
    "other route": request(b"", first="GET /v1/models HTTP/1.1"),
}
REJECTED: dict[str, bytes] = {
    "no name": request(chunk(), first=f"POST {PATH.format('a b')} HTTP/1.1"),
    "signed length": request(chunk(), length=f"Content-Length: +{len(chunk())}"),
    "two lengths": request(
        chunk(), f"Content-Length: {len(chunk())}", length=f"Content-Length: {len(chunk())}"
    ),
    "length and chunked": request(chunk(), "Transfer-Encoding: chunked"),
    "space before the colon": request(chunk(), "X-Odd : 1"),
    "folded": request(chunk(), "X-Odd: 1\r\n 2"),
    "bare newline": request(chunk(), "X-Odd: 1\nX-More: 2"),
    "no host": request(chunk()).replace(b"Host: carry\r\n", b""),
    "two hosts": request(chunk(), "Host: other"),
    "bad host": request(chunk()).replace(b"Host: carry", b"Host: a/b"),
}
