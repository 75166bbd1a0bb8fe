"""Reads a request for a model: what its route declares, and the body, long ones in turns.

Names, preconditions and query parameters are validated here, before anything is looked up. An
unknown query parameter is rejected, so that a misspelt one is noticed.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.access.caller import Verb
from service.codec.decoding import decode
from service.codec.field_rules import parse_if_match, stream_name
from service.codec.media import Media, media_of, negotiate_media
from service.codec.reply_writer import EVERY_STEP, ReplyOptions, ReplyWriter
from service.codec.settings import RequestSettings
from service.core.errors import BodyTooLarge, InvalidInput, UnsupportedMediaType
from service.core.values import Precondition, StreamKey
from service.server.errors import DuplicateField
from service.transports.common.disconnects import cancel_on_disconnect
from service.transports.common.long_bodies import LONG_BYTES
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.replies import Header, reply

if TYPE_CHECKING:
    from service.transports.v1.route import Route

T = TypeVar("T")

TIMEOUT_HEADER = "carry-timeout"
TIMEOUT_EXPECTED = "decimal seconds above 0, such as 2.5"
SECONDS = r"^[0-9]{1,9}(?:\.[0-9]{0,9})?$"
_SECONDS = re.compile(SECONDS, re.ASCII)
MAX_PARAMETERS = 16
"""Maximum parameters of a query."""
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

REPLY_PARAMETERS = ("return_sequences", "return_state", "return_attention")
"""Names of the query parameters that `reply_options` reads."""


class Call:
    """A request for one model. Access is checked first, then what the route declares is read.

    Raises:
        Unauthenticated, Forbidden, ModelNotFound: see `caller_of` and `Pipeline.model`.
        InvalidName, InvalidInput, DuplicateField, UnsupportedMediaType, NotAcceptable,
            InvalidPrecondition

    Attributes:
        answer_media: media type of the reply.
        codec: reader and writer of the model.
        path: the parameters of the address.
        key: of the stream, if the address names one.
        deadline_s: when the client stops waiting, on the monotonic clock.
        parameters: those of the query.
        precondition: If-Match; None if there is none, or the route does not read it.
    """

    def __init__(self, request: Request, route: Route):
        self.path = path = request.path_params
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
        read_content = partial(read, content, self._media, *args)
        if len(content) < LONG_BYTES:
            return read_content()
        if queues:
            left_s = self.deadline_s - time.monotonic()
            rejection = api.pipeline.check_admission(
                self.caller, self.served.name, self._key, left_s
            )
            if rejection is not None:
                raise rejection.copy()
        return await self.until_disconnect(
            api.long_bodies.read(len(content), self.deadline_s, read_content)
        )

    async def read_as(self, kind: type[T], empty: T | None = None) -> T:
        """Receive the body, and decode it as a type.

        Args:
            empty: what an empty body stands for; None if it is malformed.

        Raises:
            MalformedBody, InvalidInput, and what `read` raises
        """

        def read(content: bytes, media: Media) -> T:
            return empty if empty is not None and not content else decode(media, content, kind)

        return await self.read(read)

    async def until_disconnect(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work, which is cancelled if the client disconnects.

        Raises:
            ClientDisconnect
        """
        return await cancel_on_disconnect(self._request, work)

    def reply(self, document: Any, status: int = 200, headers: Iterable[Header] = ()) -> Response:
        """A response with a document, in the media type that the request accepts."""
        return reply(self.answer_media, document, status, headers)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: by its Content-Length, or as soon as more than the limit is received.
        UnsupportedMediaType: it is compressed.
        ClientDisconnect: the client disconnected while sending.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(
            f"Content-Encoding: expected none, got {encoding!r}", expected="none", got=encoding
        )
    return await read_encoded_body(request, limit_bytes)


async def read_encoded_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body as it was sent, whatever its Content-Encoding.

    Raises:
        BodyTooLarge, ClientDisconnect: as `read_body`.
    """
    length = request.headers.get("content-length", "")
    _check_size(int(length) if length.isdecimal() else 0, limit_bytes)
    # A BytesIO grows in place; joining a list of parts would hold the body twice.
    body = io.BytesIO()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        _check_size(body.tell() + len(part), limit_bytes)
        if not more and not body.tell():
            whole: bytes = part
            return whole
        body.write(part)
    return body.getvalue()


def _check_size(got_bytes: int, limit_bytes: int) -> None:
    if got_bytes > limit_bytes:
        raise BodyTooLarge(
            f"body: expected at most {limit_bytes} bytes, got {got_bytes} or more",
            expected=limit_bytes,
            got=got_bytes,
        )


def body_media(request: Request) -> Media:
    """The media type of the body."""
    return media_of(request.headers.get("content-type"))


def reply_media(request: Request, otherwise: Media = Media.JSON) -> Media:
    """The media type of the reply; `otherwise` if Accept allows both."""
    return negotiate_media(", ".join(request.headers.getlist("accept")), otherwise)


def if_match(request: Request) -> Precondition | None:
    """The If-Match header, if there is one.

    Raises:
        InvalidPrecondition
    """
    lines = request.headers.getlist("if-match")
    return parse_if_match(",".join(lines), "If-Match") if lines else None


def deadline(request: Request | None, limits: RequestSettings) -> float:
    """When the client stops waiting, on the monotonic clock: by its Carry-Timeout header, counted
    from now, or else by the setting.

    Args:
        request: None if the route does not read the header.

    Raises:
        InvalidInput
    """
    lines = [] if request is None else request.headers.getlist(TIMEOUT_HEADER)
    requested_s = None
    if lines:
        text = ", ".join(lines)
        requested_s = parse_timeout(text)
        if requested_s is None:
            raise invalid_value("Carry-Timeout", TIMEOUT_EXPECTED, text)
    return time.monotonic() + limits.effective_timeout_s(requested_s)


def parse_timeout(text: str) -> float | None:
    """The seconds of a Carry-Timeout header; None if it is invalid."""
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    return seconds if seconds > 0 else None


def query(request: Request, known: Collection[str] = ()) -> dict[str, str]:
    """The query parameters by name.

    Raises:
        InvalidInput: a parameter is unknown.
        DuplicateField: a parameter comes twice.
    """
    raw: bytes = request.scope["query_string"]
    return parse_query(raw, known) if raw else {}


def parse_query(raw: bytes, known: Collection[str]) -> dict[str, str]:
    """The parameters of a query string by name; raises as `query` does."""
    parameters: dict[str, str] = {}
    parts = raw.decode("latin-1").split("&", MAX_PARAMETERS)
    for name, value in parse_qsl("&".join(parts[:MAX_PARAMETERS]), keep_blank_values=True):
        if name not in known:
            expected = f"one of the parameters {sorted(known)}" if known else "no parameters"
            raise invalid_value(f"?{name[:300]}", expected, name)
        if name in parameters:
            at = f"?{name}"
            raise DuplicateField(f"{at}: expected once, got it again", at=at, expected="once")
        parameters[name] = value
    if len(parts) > MAX_PARAMETERS:
        raise invalid_value("?", f"at most {MAX_PARAMETERS} parameters", "more")
    return parameters


def flag(parameters: dict[str, str], name: str, *, default: bool) -> bool:
    """A parameter that is `true` or `false`."""
    text = parameters.get(name)
    if text is None:
        return default
    if text not in _FLAGS:
        raise invalid_value(f"?{name}", "true or false", text)
    return _FLAGS[text]


def reply_options(parameters: dict[str, str], writer: ReplyWriter) -> ReplyOptions:
    """The options of a reply that query parameters ask for.

    Raises:
        InvalidInput: a value is invalid, or the model does not support the option.
    """
    if not parameters:
        return EVERY_STEP
    options = ReplyOptions(
        return_sequences=flag(parameters, "return_sequences", default=True),
        return_state=flag(parameters, "return_state", default=False),
        return_attention=flag(parameters, "return_attention", default=False),
    )
    writer.check_options(options)
    return options


def count(
    parameters: dict[str, str], name: str, *, default: int, maximum: int, minimum: int = 1
) -> int:
    """A parameter that is a whole number from `minimum` to `maximum`."""
    text = parameters.get(name)
    if text is None:
        return min(default, maximum)
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) or not minimum <= int(text) <= maximum:
        raise invalid_value(f"?{name}", f"a whole number from {minimum} to {maximum}", text)
    return int(text)


def invalid_value(at: str, expected: str, got: str) -> InvalidInput:
    """The error for a value of a header or of a query parameter."""
    got = got[:300]
    return InvalidInput(
        f"{at}: expected {expected}, got {got!r}", at=at, expected=expected, got=got
    )
