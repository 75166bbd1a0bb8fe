"""Fast path for well-formed chunk requests: parsed from the socket buffer, no ASGI scope.

`FastPath.parse` reads a request for one chunk, complete, from the received bytes. It accepts a
strict subset: the one route, no query, common headers in their usual form, and a body that the fast
decoder reads. Anything else, invalid or only unusual, is None: uvicorn and FastAPI (the slow path)
read it from its first byte and make the errors. A response of the fast path has the same bytes as
the slow path's (`test_fast_path.py` compares them). Nothing here waits.

Load shedding: a request that admission control would reject is rejected before its body is decoded.
"""

from __future__ import annotations

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from structlog.contextvars import bound_contextvars

from service.core.errors import CarryError, Forbidden, Overloaded
from service.core.tracing import PROPAGATED, RequestSpan
from service.core.values import Chunk, Precondition, Reply, StreamKey
from service.ops.logs import RequestIds
from service.ops.request_lines import CLIENT_DISCONNECTED, log_request
from service.pipeline.scoped_pipeline import PipelineInterface
from service.transports.common.failure_log import log_client_disconnect, log_failure
from service.transports.http.connection.framing import MAX_HEADERS, is_host
from service.transports.http.connection.rejections import CLOSE, OverloadResponses, error_response
from service.transports.http.context import ApiContext, ModelWire
from service.transports.http.field_rules import STREAM_NAME
from service.transports.http.limits import LONG_BYTES, ApiLimits
from service.transports.http.media import Media, accepted, media_of
from service.transports.http.problems import status_of
from service.transports.http.replies.pieces import LONG_VALUES
from service.transports.http.replies.reply_writer import server_timing
from service.transports.http.request_fields import TIMEOUT_HEADER, parse_if_match, parse_timeout
from service.transports.http.request_log import REQUEST_ID_HEADER, is_request_id
from service.transports.http.statuses import STATUS

MAX_REQUEST_BYTES: Final = LONG_BYTES
"""Longer requests take the slow path, which decodes their bodies in blocks."""

MAX_HEADERS_BYTES: Final = 4096
"""Longer headers take the slow path; it bounds the memory of the cache of parsed headers."""

ROUTE: Final = "/v1/models/{model}/streams/{stream}/chunks"

_REQUEST_LINE = re.compile(
    rb"POST /v1/models/([a-z0-9_-]{1,64})/streams/(%b)/chunks HTTP/1\.1\r\n"
    % STREAM_NAME[1:-1].encode()
)
_HEADER_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e]+(?:[ \t]+[\x21-\x7e]+)*)[ \t]*"
)
_SLOW_PATH_HEADERS = frozenset(
    {
        b"transfer-encoding",
        b"content-encoding",
        b"expect",
        b"origin",
        b"upgrade",
        b"proxy-connection",
        b"te",
        b"trailer",
    }
)
_RESPONSE_HEADS = {
    media: b'HTTP/1.1 200 OK\r\netag: "%%b"\r\nserver-timing: %%b\r\ncontent-length: %%d\r\n'
    b"content-type: %b\r\nx-request-id: %%b\r\n%%b\r\n" % media.value.encode()
    for media in Media
}
_TIMEOUT = TIMEOUT_HEADER.encode()
END_OF_HEAD: Final = b"\r\n\r\n"

PendingReply = asyncio.Future[list[Reply | CarryError]]
"""Resolves to one reply or error."""


class IncompleteRequest(NamedTuple):
    """A request whose body is still arriving; `total_bytes` is its length when complete."""

    total_bytes: int


class RejectedRequest(NamedTuple):
    """A request that admission control rejected; attributes as those of `FastRequest`."""

    wire: ModelWire
    stream: str
    error: Overloaded
    reply_media: Media
    request_id: bytes
    received_s: float
    body_bytes: int
    total_bytes: int
    span: RequestSpan | None


class ParsedRequest(Protocol):
    """Attributes of a parsed request on every fast route; see `FastRequest`."""

    @property
    def pipeline(self) -> PipelineInterface:
        """The pipeline in the scope of the client's access key."""

    @property
    def chunk(self) -> Chunk:
        """The chunk."""

    @property
    def request_id(self) -> bytes:
        """The id of the request."""

    @property
    def body_bytes(self) -> int:
        """The length of its body."""

    @property
    def received_s(self) -> float:
        """When the request was complete, on the monotonic clock."""

    @property
    def deadline_s(self) -> float:
        """When the client stops waiting, on the monotonic clock."""


R = TypeVar("R", bound=ParsedRequest)


class FastRoute(ABC, Generic[R]):
    """Recognises, starts and answers the requests of one route.

    Args:
        route: as it is logged.
        serialize: makes the whole response to an error, as for `OverloadResponses`.
    """

    def __init__(self, api: ApiContext, route: str, serialize: Callable[..., bytes]):
        self._api = api
        self._tracer = api.tracer
        self._route = route
        self._serialize = serialize
        self._overload_responses = OverloadResponses(serialize)

    @abstractmethod
    def parse(self, data: bytes) -> R | RejectedRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None leaves it to the next route, and at
        last to the slow path. A request has `total_bytes`."""

    @abstractmethod
    def response(self, request: R, result: Reply | CarryError, *, closes: bool) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""

    def start(self, request: R) -> PendingReply:
        """Hand the chunk to the pipeline, at once after `parse`, which checked its admission."""
        return request.pipeline.enqueue(request.chunk, request.deadline_s)

    def cancel(self, request: R, reply: PendingReply) -> None:
        """Drop a request whose client disconnected, unless its chunk is already in a batch."""
        request.pipeline.cancel(request.chunk, reply)
        with bound_contextvars(request_id=request.request_id.decode()):
            log_client_disconnect("POST")
        self.log(request, CLIENT_DISCONNECTED, END_OF_HEAD)

    def rejection(self, request: RejectedRequest) -> bytes:
        """The whole response to a rejected request."""
        error = request.error
        self._api.recorder.record_error(request.wire.served.name, error.code)
        response = self._overload_responses.response(error, request.reply_media, request.request_id)
        self.log(request, STATUS[Overloaded], response, error.code)
        return response

    def failure(
        self, request: R, wire: ModelWire, error: CarryError, media: Media, header_lines: bytes
    ) -> bytes:
        """The whole response to a request that failed."""
        self._api.recorder.record_error(wire.served.name, error.code)
        with bound_contextvars(request_id=request.request_id.decode()):
            log_failure(error)
        response = self._serialize(error, media, request.request_id, header_lines)
        self.log(request, status_of(error), response, error.code)
        return response

    def log(
        self,
        request: R | RejectedRequest,
        status: int,
        response: bytes,
        code: str | None = None,
    ) -> None:
        """Log that a request was answered, and end its span.

        Args:
            response: the whole one.
            code: of the error that answers it.
        """
        if isinstance(request, RejectedRequest):
            model, stream, span = request.wire.served.name, request.stream, request.span
        else:
            chunk = request.chunk
            (model, stream), span = chunk.key, chunk.span
        # `round` to digits takes four times as long
        ms = round((time.monotonic() - request.received_s) * 100_000) / 100
        log_request(
            request.request_id.decode(),
            "POST",
            self._route,
            status,
            ms,
            model=model,
            stream=stream,
            code=code,
            received_bytes=request.body_bytes,
            sent_bytes=len(response) - response.find(END_OF_HEAD) - len(END_OF_HEAD),
            span=span,
        )


class TracedHeaders(NamedTuple):
    """Headers without those that carry a trace, which differ from request to request."""

    block: bytes
    propagated: dict[str, str]


_TRACE_HEADER = re.compile(
    rb"\r\n(%b):[ \t]*([\x21-\x7e]+(?:[ \t]+[\x21-\x7e]+)*)[ \t]*(?=\r\n|\Z)"
    % "|".join(PROPAGATED).encode(),
    re.IGNORECASE,
)


def split_trace_headers(block: bytes) -> TracedHeaders:
    """Take the headers that carry a trace out of a block of lines.

    Repeated ones are not valid, and are ignored.
    """
    block = b"\r\n" + block
    lines = _TRACE_HEADER.findall(block)
    if not lines:
        return TracedHeaders(block[2:], {})
    propagated = {name.decode().lower(): value.decode() for name, value in lines}
    is_valid = len(propagated) == len(lines)
    return TracedHeaders(_TRACE_HEADER.sub(b"", block)[2:], propagated if is_valid else {})


class FastRequest(NamedTuple):
    """A complete request for one chunk.

    Attributes:
        received_s: when it was complete, on the monotonic clock.
        deadline_s: until when its client waits, on the monotonic clock.
        body_bytes: the length of its body.
        total_bytes: its length, head and body.
    """

    pipeline: PipelineInterface
    wire: ModelWire
    chunk: Chunk
    reply_media: Media
    request_id: bytes
    received_s: float
    deadline_s: float
    body_bytes: int
    total_bytes: int


class _Headers(NamedTuple):
    """Parsed headers of a request.

    Attributes:
        authorization: its key, which is not yet verified; None if there is no such header, as for
            `precondition` (If-Match) and `request_id`.
        timeout_s: the effective timeout of the request.
    """

    length: int
    authorization: bytes | None
    media: Media
    reply_media: Media
    precondition: Precondition | None
    request_id: bytes | None
    timeout_s: float


class FastPath(FastRoute[FastRequest]):
    """Parses and answers the chunk requests of one application."""

    def __init__(self, api: ApiContext, ids: RequestIds):
        super().__init__(api, ROUTE, error_response)
        self._ids = ids
        self._max_bytes = min(MAX_REQUEST_BYTES, api.limits.max_body_bytes)
        # cached, since clients repeat their headers
        self._parse_headers = lru_cache(maxsize=4096)(partial(_parse_headers, api.limits))

    def parse(self, data: bytes) -> FastRequest | RejectedRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None sends it to the slow path."""
        start = _REQUEST_LINE.match(data)
        if start is None:
            return None
        end = data.find(b"\r\n\r\n", start.end() - 2)
        if end < 0:
            return None
        block = data[start.end() : end]
        propagated: dict[str, str] = {}
        if self._tracer is not None:
            block, propagated = split_trace_headers(block)
        headers = None if len(block) > MAX_HEADERS_BYTES else self._parse_headers(block)
        if headers is None:
            return None
        length, authorization, media, reply_media, precondition, request_id, timeout_s = headers
        total_bytes = end + 4 + length
        if total_bytes > self._max_bytes:
            return None
        if len(data) < total_bytes:
            return IncompleteRequest(total_bytes)
        received_s = time.monotonic()
        model, stream = start[1].decode(), start[2].decode()
        api, access = self._api, self._api.access
        # the slow path verifies a new key, and answers what has none
        pipeline = access.open_pipeline or access.cached.get(authorization)
        if pipeline is None or (served := pipeline.models.get(model)) is None:
            return None
        wire = api.wires.get(model)
        if wire is None or wire.served is not served:
            wire = api.wire(served)
        request_id = request_id or self._ids.next()
        key = StreamKey(model, stream)
        try:
            error = pipeline.check_admission(model, key, timeout_s)
        except Forbidden:
            return None
        if error is not None:
            tracer = self._tracer
            span = None if tracer is None else tracer.start_request(propagated, received_s)
            return RejectedRequest(
                wire, stream, error, reply_media, request_id, received_s, length, total_bytes, span
            )
        chunk = wire.reader.decode_chunk(data[end + 4 : total_bytes], media, key, precondition)
        if chunk is None or chunk.steps.length * served.outputs.size > LONG_VALUES:
            # the slow path encodes long replies in pieces
            return None
        if self._tracer is not None:
            chunk = chunk._replace(span=self._tracer.start_request(propagated, received_s))
        deadline_s = received_s + timeout_s
        return FastRequest(
            pipeline,
            wire,
            chunk,
            reply_media,
            request_id,
            received_s,
            deadline_s,
            length,
            total_bytes,
        )

    def response(self, request: FastRequest, result: Reply | CarryError, *, closes: bool) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""
        header_lines = CLOSE if closes else b""
        if isinstance(result, CarryError):
            return self.failure(request, request.wire, result, request.reply_media, header_lines)
        body = request.wire.writer.reply_bytes(result, request.reply_media)
        head = _RESPONSE_HEADS[request.reply_media] % (
            result.head.etag.encode(),
            server_timing(result.timing),
            len(body),
            request.request_id,
            header_lines,
        )
        response = head + body
        self.log(request, 200, response)
        return response


def _parse_headers(limits: ApiLimits, block: bytes) -> _Headers | None:
    """The headers in a block of lines, or None if they are for the slow path."""
    common = parse_common_headers(limits, block)
    if common is None:
        return None
    values, length, authorization, request_id, timeout_s = common
    precondition = None
    try:
        media = media_of(_text(values.get(b"content-type")))
        reply_media = accepted(_text(values.get(b"accept")), media)
        if (etags := _text(values.get(b"if-match"))) is not None:
            precondition = parse_if_match(etags, "If-Match")
    except CarryError:
        return None
    return _Headers(length, authorization, media, reply_media, precondition, request_id, timeout_s)


class CommonHeaders(NamedTuple):
    """Headers of a request that mean the same on every fast route.

    Attributes:
        values: all headers, their names in lower case.
        authorization: its key, which is not yet verified; None if there is no such header.
        request_id: None if there is no such header.
        timeout_s: the effective timeout of the request.
    """

    values: dict[bytes, bytes]
    length: int
    authorization: bytes | None
    request_id: bytes | None
    timeout_s: float


def parse_common_headers(limits: ApiLimits, block: bytes) -> CommonHeaders | None:
    """The headers in a block of lines, or None if they are for the slow path."""
    values: dict[bytes, bytes] = {}
    lines = block.split(b"\r\n")
    if len(lines) > MAX_HEADERS:
        return None
    for text in lines:
        line = _HEADER_LINE.fullmatch(text)
        if line is None or (name := line[1].lower()) in values:
            return None
        values[name] = line[2]
    length = values.get(b"content-length", b"")
    keeps_alive = values.get(b"connection", b"keep-alive").lower() == b"keep-alive"
    if not length.isdigit() or len(length) > 9 or not keeps_alive:
        return None
    if _SLOW_PATH_HEADERS & values.keys() or not is_host(values.get(b"host", b"/")):
        return None
    request_id = values.get(REQUEST_ID_HEADER)
    if request_id is not None and not is_request_id(request_id):
        return None
    timeout_s = None
    if (timeout := _text(values.get(_TIMEOUT))) is not None:
        timeout_s = parse_timeout(timeout)
        if timeout_s is None:
            return None
    timeout_s = limits.effective_timeout_s(timeout_s)
    authorization = values.get(b"authorization")
    return CommonHeaders(values, int(length), authorization, request_id, timeout_s)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("ascii")
