"""The body of a request, and the one decision how to read it: at once, or in blocks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from starlette.requests import Request

from service.codec.limits import LONG_BYTES
from service.codec.long_bodies.admission import Checkpoint
from service.codec.media import Media
from service.server.disconnects import cancel_on_disconnect
from service.transports.v1.context import api_of
from service.transports.v1.request_fields import read_body

P = ParamSpec("P")
T = TypeVar("T")


class RequestBody(NamedTuple):
    """The body of a request, received completely.

    Attributes:
        deadline_s: when the client stops waiting, on the monotonic clock.
    """

    request: Request
    content: bytes
    media: Media
    deadline_s: float

    @property
    def is_long(self) -> bool:
        """Whether it is read in blocks."""
        return len(self.content) >= LONG_BYTES

    async def read(
        self,
        read_at_once: Callable[Concatenate[bytes, Media, P], T],
        read_in_blocks: Callable[Concatenate[bytes, Media, Checkpoint, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Read the body: a short one at once, a long one in blocks once it is admitted.

        Raises:
            Overloaded, DeadlineExceeded: a long body was not admitted, or not read in time.
            ClientDisconnect: the client disconnected while a long body was read.
        """
        if not self.is_long:
            return read_at_once(self.content, self.media, *args, **kwargs)

        async def read_admitted() -> T:
            long_bodies = api_of(self.request).long_bodies
            async with long_bodies.admit(self.content, self.deadline_s) as checkpoint:
                return await read_in_blocks(self.content, self.media, checkpoint, *args, **kwargs)

        return await cancel_on_disconnect(self.request, read_admitted())


async def receive_body(request: Request, media: Media, deadline_s: float) -> RequestBody:
    """Receive the whole body of a request.

    Raises:
        BodyTooLarge, UnsupportedMediaType, ClientDisconnect
    """
    content = await read_body(request, api_of(request).limits.max_body_bytes)
    return RequestBody(request, content, media, deadline_s)
