"""The answers to requests that are refused as overloaded, ready but for the request's id.

While more comes than can be done, one refusal is said over and over: its document is written once,
and each answer is made of what stands around the two places of the id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from service.core.errors import Overloaded
from service.transports.http.media import Media

Write = Callable[[Overloaded, Media, bytes], bytes]
"""Makes the whole answer to the request of an id."""

LEAST_ID_BYTES: Final = 16
"""Shorter ids could look like something else in an answer."""


class Refusals:
    """The last refusal, as it was written so far.

    Args:
        write: makes an answer where there is none yet.
    """

    def __init__(self, write: Write):
        self._write = write
        self._error: Overloaded | None = None
        self._around: dict[tuple[Media, int], list[bytes]] = {}

    def answer(self, error: Overloaded, media: Media, request_id: bytes) -> bytes:
        """The whole answer, the same bytes as `write` gives."""
        length = len(request_id)
        if length < LEAST_ID_BYTES:
            return self._write(error, media, request_id)
        if error is not self._error:
            self._error = error
            self._around.clear()
        around = self._around.get((media, length))
        if around is None:
            stand_in = b"#" + b"~" * (length - 1)
            around = self._write(error, media, stand_in).split(stand_in)
            self._around[media, length] = around
        return request_id.join(around)
