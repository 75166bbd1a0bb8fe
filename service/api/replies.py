"""Replies of the routes: negotiated bytes, the ETag and the Server-Timing header."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.media import Media, dumps
from service.domain import Mark, Timing

Header = tuple[bytes, bytes]

_CONTENT_TYPE = {media: (b"content-type", media.value.encode()) for media in Media}


class Answer(Response):
    """A response whose bytes and headers are there already: Starlette's, without its making.

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self.body})


def reply(media: Media, document: Any, status: int = 200, headers: Iterable[Header] = ()) -> Answer:
    """A document in the media type that was negotiated."""
    return written(media, dumps(media, document), status, headers)


def written(media: Media, body: bytes, status: int = 200, headers: Iterable[Header] = ()) -> Answer:
    """A document whose bytes are there already."""
    return Answer(body, _CONTENT_TYPE[media], status, headers)


def etag(mark: Mark) -> Header:
    """The ETag header of a stream's state."""
    return b"etag", f'"{mark.etag}"'.encode()


def server_timing(timing: Timing) -> str:
    """Where a chunk's time went, in milliseconds, as Server-Timing writes it."""
    return _TIMES % (
        timing.queue_s * 1000,
        timing.load_s * 1000,
        timing.infer_s * 1000,
        timing.commit_s * 1000,
    )


_TIMES = "queue;dur=%.3f, load;dur=%.3f, infer;dur=%.3f, commit;dur=%.3f"
