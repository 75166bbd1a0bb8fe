"""Responses of the routes: encoded documents, the ETag and Server-Timing headers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.codec.media import Media, dumps
from service.codec.pieces import LONG_VALUES, count_values, encode_pieces
from service.core.values import StreamHead
from service.server.interface import UNSENT, UnsentReply
from service.transports.common.disconnects import cancel_on_disconnect

Header = tuple[bytes, bytes]

WRITE_BYTES: Final = 32 * 1024
"""Minimum number of bytes that a long response writes at once."""

_CONTENT_TYPE = {media: (b"content-type", media.value.encode()) for media in Media}


class Answer(Response):
    """A response with encoded body and headers, without the cost of Starlette's constructor.

    Args:
        body: the whole body.
        content_type: header of that name, as bytes.
        headers: further ones, their names in lower case.
    """

    def __init__(
        self, body: bytes, content_type: Header, status: int = 200, headers: Iterable[Header] = ()
    ):
        # not the base's own, which encodes and searches the headers each time
        self.body = body
        self.status_code = status
        self.background = None
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body)), content_type]


VALUE_BYTES: Final = 4
"""Memory of one value of a reply before it is encoded."""


class LongAnswer(Response):
    """A response in JSON that is encoded in pieces as the client reads them.

    Unsent data is held as values, not as bytes, which take several times the memory.
    """

    def __init__(self, document: Any, status: int, headers: Iterable[Header]):
        self.status_code = status
        self.background = None
        self.raw_headers = [*headers, _CONTENT_TYPE[Media.JSON]]
        self._document = document

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response until the client disconnects."""
        unsent = scope.get("state", {}).get(UNSENT) or UnsentReply()
        kept_bytes = VALUE_BYTES * count_values(self._document)
        unsent.kept_bytes += kept_bytes
        try:
            with suppress(ClientDisconnect):
                await cancel_on_disconnect(Request(scope, receive), self._send(scope, send))
        finally:
            unsent.kept_bytes -= kept_bytes

    async def _send(self, scope: Scope, send: Send) -> None:
        if scope["http_version"] == "1.0":
            # HTTP/1.0 has no chunked transfer coding: the length must be known first
            written: list[bytes] = []
            for piece in encode_pieces(self._document):
                written.append(piece)
                await asyncio.sleep(0)
            body = b"".join(written)
            self.raw_headers.append((b"content-length", b"%d" % len(body)))
            parts = iter([body[at : at + WRITE_BYTES] for at in range(0, len(body), WRITE_BYTES)])
        else:
            parts = encode_pieces(self._document)
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        gathered: list[bytes] = []
        size = 0
        for part in parts:
            gathered.append(part)
            size += len(part)
            if size >= WRITE_BYTES:
                body, size = b"".join(gathered), 0
                gathered.clear()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"".join(gathered)})


def reply(
    media: Media, document: Any, status: int = 200, headers: Iterable[Header] = ()
) -> Response:
    """A response with a document in the negotiated media type; long JSON is sent in pieces."""
    if media is Media.JSON and count_values(document) > LONG_VALUES:
        return LongAnswer(document, status, headers)
    return Answer(dumps(media, document), _CONTENT_TYPE[media], status, headers)


def etag(head: StreamHead) -> Header:
    """The ETag header of a stream's state."""
    return b"etag", f'"{head.etag}"'.encode()
