"""The body of a request: received completely, and decoded when it is its turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from starlette.requests import Request

from service.access.caller import Caller
from service.codec.media import Media
from service.core.values import StreamKey
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.common.long_bodies import LONG_BYTES
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

    async def read(
        self,
        read: Callable[Concatenate[bytes, Media, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Read the body by a method of its model's reader.

        Raises:
            Overloaded, DeadlineExceeded: a long body was not read in time.
            ClientDisconnect: the client disconnected while a long body waited.
        """
        decode = partial(read, self.content, self.media, *args, **kwargs)
        if len(self.content) < LONG_BYTES:
            return decode()
        long_bodies = api_of(self.request).long_bodies
        reading = long_bodies.read(len(self.content), self.deadline_s, decode)
        return await cancel_on_disconnect(self.request, reading)

    def check_capacity(self, caller: Caller, model: str, key: StreamKey | None) -> None:
        """Reject a long body before it is decoded, if the queue would reject its chunks afterwards.

        Raises:
            Overloaded
        """
        if len(self.content) < LONG_BYTES:
            return
        left_s = self.deadline_s - time.monotonic()
        rejection = api_of(self.request).pipeline.check_admission(caller, model, key, left_s)
        if rejection is not None:
            raise rejection.copy()


async def receive_body(request: Request, media: Media, deadline_s: float) -> RequestBody:
    """Receive the whole body of a request.

    Raises:
        BodyTooLarge, UnsupportedMediaType, ClientDisconnect
    """
    content = await read_body(request, api_of(request).limits.max_body_bytes)
    return RequestBody(request, content, media, deadline_s)
