"""A request for a model, read as its route declares it; and its body, when it is its turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import Verb
from service.codec.field_rules import stream_name
from service.codec.media import Media
from service.codec.reply_writer import ReplyOptions
from service.core.values import StreamKey
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.replies import Header, reply
from service.transports.v1.request_fields import (
    body_media,
    deadline,
    if_match,
    query,
    read_body,
    reply_media,
    reply_options,
)

if TYPE_CHECKING:
    from service.transports.v1.route import Route

T = TypeVar("T")


class Call:
    """A request for one model. Access is checked first, then what the route declares is read.

    Raises:
        Unauthenticated, Forbidden, ModelNotFound: see `caller_of` and `Pipeline.model`.
        InvalidName, InvalidInput, DuplicateField, UnsupportedMediaType, NotAcceptable,
            InvalidPrecondition

    Attributes:
        answer_media: media type of the reply.
        codec: reader and writer of the model.
        key: of the stream, if the address names one.
        deadline_s: when the client stops waiting, on the monotonic clock.
        parameters: those of the query.
        precondition: If-Match; None if there is none, or the route does not read it.
    """

    __slots__ = (
        "_key",
        "_media",
        "_request",
        "answer_media",
        "api",
        "caller",
        "codec",
        "deadline_s",
        "key",
        "parameters",
        "precondition",
        "served",
    )

    def __init__(self, request: Request, route: Route):
        path = request.path_params
        stream = path.get("stream")
        self._request = request
        self.api = api = api_of(request)
        self.caller = caller_of(request)
        self.served = api.pipeline.model(self.caller, route.verbs, path["model"], stream)
        self.codec = api.codecs[self.served.name]
        has_timeout = "Carry-Timeout" in route.header_names
        self.deadline_s = deadline(request if has_timeout else None, api.limits)
        self._key = None
        if stream is not None:
            self._key = self.key = StreamKey(self.served.name, stream_name(stream))
        self.parameters = query(request, route.query_names)
        self._media = Media.JSON if route.body is None else body_media(request)
        self.answer_media = self._media
        if route.reply is not None:
            self.answer_media = reply_media(request, self._media)
        self.precondition = if_match(request) if "If-Match" in route.header_names else None

    def header(self, name: str) -> str | None:
        """A header of the request."""
        return self._request.headers.get(name)

    def reply_options(self) -> ReplyOptions:
        """The options of the reply that the query asks for.

        Raises:
            InvalidInput: a value is invalid, or the model does not support the option.
            Forbidden: the caller may not read states.
        """
        options = reply_options(self.parameters, self.codec.writer)
        if options.return_state:
            stream = self._request.path_params.get("stream")
            name = self.served.name
            self.api.pipeline.model(self.caller, (Verb.READ_STATE,), name, stream)
        return options

    async def read(self, read: Callable[..., T], *args: Any, queues: bool = False) -> T:
        """Receive the body, and read it by a method of the model's reader.

        Args:
            args: further ones of the method.
            queues: whether the body has chunks: a long one is then rejected before it is decoded,
                if the queue would reject its chunks afterwards.

        Raises:
            BodyTooLarge, UnsupportedMediaType, ClientDisconnect
            Overloaded, DeadlineExceeded: a long body was not read in time.
        """
        api = self.api
        content = await read_body(self._request, api.limits.max_body_bytes)
        decode = partial(read, content, self._media, *args)
        if len(content) < LONG_BYTES:
            return decode()
        if queues:
            left_s = self.deadline_s - time.monotonic()
            rejection = api.pipeline.check_admission(
                self.caller, self.served.name, self._key, left_s
            )
            if rejection is not None:
                raise rejection.copy()
        return await self.until_disconnect(
            api.long_bodies.read(len(content), self.deadline_s, decode)
        )

    async def until_disconnect(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work, which is cancelled if the client disconnects.

        Raises:
            ClientDisconnect
        """
        return await cancel_on_disconnect(self._request, work)

    def reply(self, document: Any, status: int = 200, headers: Iterable[Header] = ()) -> Response:
        """A response with a document, in the media type that the request accepts."""
        return reply(self.answer_media, document, status, headers)
