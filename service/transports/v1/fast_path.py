"""Fast path for well-formed chunk requests: parsed from the socket buffer, no ASGI scope.

`FastPath.parse` reads a request for one chunk, complete, from the received bytes. It accepts a
strict subset: the one route, no query, common headers in their usual form, and a valid body.
Anything else, invalid or only unusual, is None: uvicorn and FastAPI (the slow path) read it from
its first byte and make the errors. A response of the fast path has the same bytes as the slow
path's (`test_fast_path.py` compares them). Nothing here waits.

Load shedding: a request that admission control would reject is rejected before its body is decoded.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from binascii import hexlify
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from structlog.contextvars import bound_contextvars

from models.spec.stream_name import STREAM_NAME
from service.access.caller import Caller
from service.codec.field_rules import parse_if_match
from service.codec.media import Media, encode_json, encode_msgpack, media_of, negotiate_media
from service.codec.pieces import LONG_VALUES
from service.codec.reply_writer import EVERY_STEP, server_timing
from service.core.errors import CarryError, Forbidden, Overloaded
from service.core.memo import Memo
from service.core.tracing import PROPAGATED, RequestSpan
from service.core.values import Chunk, Precondition, Reply, StreamKey
from service.pipeline.pipeline import EnqueuedChunk, OnReply
from service.server.heads import MAX_HEADERS, is_host
from service.server.interface import MAX_FAST_REQUEST_BYTES, FastRoute, IncompleteRequest
from service.telemetry.access_log import CLIENT_DISCONNECTED, RequestFacts, log_request
from service.telemetry.logs import RequestIds
from service.transports.common.failure_log import log_client_disconnect, log_failure
from service.transports.v1.call import TIMEOUT_HEADER, parse_timeout
from service.transports.v1.context import ApiContext, ModelCodec
from service.transports.v1.problems import CLOSE, OverloadResponses, error_response
from service.transports.v1.request_log import REQUEST_ID_HEADER, is_request_id

MAX_HEADERS_BYTES: Final = 4096
"""Longer headers take the slow path; it bounds the memory of the cache of parsed headers."""

CACHED_HEADERS: Final = 4096
"""Most header blocks that are cached with their parsed contents, since clients repeat them."""

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
    media: b'HTTP/1.1 200 OK\r\netag: "%%b-%%b"\r\nserver-timing: %%b\r\ncontent-length: %%d\r\n'
    b"content-type: %b\r\nx-request-id: %%b\r\n%%b\r\n" % media.value.encode()
    for media in Media
}
_TIMEOUT = TIMEOUT_HEADER.encode()
END_OF_HEAD: Final = b"\r\n\r\n"


class FastRequest(msgspec.Struct):
    """A complete request for one chunk.

    Attributes:
        received_s, deadline_s: when it was complete, and until when its client waits, on the
            monotonic clock.
        total_bytes: its length, head and body.
        chunk: None if admission control rejected the request.
        reply_media: of the reply, and of an error.
        details: further values that the route needs for the reply.
        job: the chunk in the pipeline, once it is started.
    """

    route: FastChunkRoute
    caller: Caller
    codec: ModelCodec
    request_id: bytes
    received_s: float
    deadline_s: float
    body_bytes: int
    total_bytes: int
    stream: str = ""
    chunk: Chunk | None = None
    rejection: Overloaded | None = None
    reply_media: Media = Media.JSON
    span: RequestSpan | None = None
    details: Any = None
    job: EnqueuedChunk | None = None


class FastChunkRoute(FastRoute, ABC):
    """Recognises, starts and answers the requests for chunks of one route.

    Args:
        route: as it is logged.
        request_line: matches a request line; its first group is the model.
        read_details: reads what the route needs from the headers; its result is cached with them,
            since clients repeat them. None leaves the request to the slow path.
        serialize: makes the whole response to an error, as for `OverloadResponses`.
    """

    def __init__(
        self,
        api: ApiContext,
        ids: RequestIds,
        route: str,
        request_line: re.Pattern[bytes],
        read_details: Callable[[dict[bytes, bytes]], Any],
        serialize: Callable[..., bytes],
    ):
        self._recorder = api.recorder
        self._access = api.access
        self._pipeline = api.pipeline
        self._codecs = api.codecs
        self._tracer = api.tracer
        self._ids = ids
        self._route = route
        self._match = request_line.match
        self._headers = Memo(partial(parse_headers, api, read_details), CACHED_HEADERS)
        self._max_bytes = min(MAX_FAST_REQUEST_BYTES, api.limits.max_body_bytes)
        self._serialize = serialize
        self._overload_responses = OverloadResponses(serialize)

    def parse(self, data: bytes) -> FastRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None leaves it to the next route, and at
        last to the slow path."""
        line = self._match(data)
        if line is None:
            return None
        lines_at = line.end()
        end = data.find(END_OF_HEAD, lines_at - 2)
        if end < 0 or end - lines_at > MAX_HEADERS_BYTES:
            return None
        block = data[lines_at:end]
        propagated: dict[str, str] = {}
        if self._tracer is not None:
            block, propagated = split_trace_headers(block)
        headers = self._headers[block]
        if headers is None:
            return None
        body_at = end + 4
        total_bytes = body_at + headers.length
        if total_bytes > self._max_bytes:
            return None
        if len(data) < total_bytes:
            return IncompleteRequest()
        received_s = time.monotonic()
        access = self._access
        # the slow path verifies a new key, and answers what has none
        caller = access.open_caller or access.cached.get(headers.authorization)
        codec = self._codecs.get(line[1].decode())
        if caller is None or codec is None:
            return None
        request = FastRequest(
            self,
            caller,
            codec,
            headers.request_id or self._ids.next(),
            received_s,
            received_s + headers.timeout_s,
            headers.length,
            total_bytes,
        )
        if not self._read(request, line, headers.details, data[body_at:total_bytes]):
            return None
        if self._tracer is not None:
            request.span = self._tracer.start_request(propagated, received_s)
            if request.chunk is not None:
                request.chunk = replace(request.chunk, span=request.span)
        return request

    @abstractmethod
    def _read(self, request: FastRequest, line: re.Match[bytes], details: Any, body: bytes) -> bool:
        """Set the stream of a request, and its chunk or rejection; False leaves it to the slow
        path. `details` are those of its headers."""

    @abstractmethod
    def _response(self, request: FastRequest, reply: Reply, header_lines: bytes) -> bytes:
        """The whole response to a request, with further lines in its head."""

    def start(self, request: FastRequest, on_result: OnReply) -> bytes | None:
        """Hand the chunk to the pipeline, at once after `parse`, which checked its admission.

        Returns:
            The whole response to a rejected request; None if `on_result` will get its result.
        """
        if request.chunk is None:
            rejection = request.rejection or Overloaded("the request was rejected")
            return self.response(request, rejection, closes=False)
        request.job = self._pipeline.enqueue(
            request.caller, request.chunk, request.deadline_s, on_result
        )
        return None

    def cancel(self, request: FastRequest) -> None:
        """Drop a request whose client disconnected, unless its chunk is already in a batch."""
        if request.job is not None:
            self._pipeline.cancel(request.caller, request.job)
        with bound_contextvars(request_id=request.request_id.decode()):
            log_client_disconnect("POST")
        self._log(request, CLIENT_DISCONNECTED, END_OF_HEAD)

    def response(self, request: FastRequest, result: Reply | CarryError, *, closes: bool) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""
        header_lines = CLOSE if closes else b""
        if not isinstance(result, CarryError):
            response = self._response(request, result, header_lines)
            self._log(request, 200, response)
            return response
        media, request_id = request.reply_media, request.request_id
        self._recorder.record_error(request.codec.served.name, result)
        if isinstance(result, Overloaded) and not closes:
            response = self._overload_responses.response(result, media, request_id)
        else:
            with bound_contextvars(request_id=request_id.decode()):
                log_failure(result)
            response = self._serialize(result, media, request_id, header_lines)
        self._log(request, result.status, response, result)
        return response

    def _log(
        self, request: FastRequest, status: int, response: bytes, error: CarryError | None = None
    ) -> None:
        """Log that a request was answered, and end its span."""
        code = key = reason = None
        if error is not None:
            code, reason, key = error.code, error.reason, request.caller.key_id
        # `round` with a number of digits takes four times as long
        ms = round((time.monotonic() - request.received_s) * 100_000) / 100
        log_request(
            request.request_id.decode(),
            "POST",
            self._route,
            status,
            ms,
            RequestFacts(
                request.codec.served.name,
                request.stream,
                code,
                key,
                reason,
                request.body_bytes,
                len(response) - response.find(END_OF_HEAD) - len(END_OF_HEAD),
                request.span,
            ),
        )


_TRACE_HEADER = re.compile(
    rb"\r\n(%b):[ \t]*([\x21-\x7e]+(?:[ \t]+[\x21-\x7e]+)*)[ \t]*(?=\r\n|\Z)"
    % "|".join(PROPAGATED).encode(),
    re.IGNORECASE,
)


def split_trace_headers(block: bytes) -> tuple[bytes, dict[str, str]]:
    """Take the headers that carry a trace, which differ from request to request, out of a block of
    lines. Repeated ones are not valid, and are ignored.
    """
    block = b"\r\n" + block
    lines = _TRACE_HEADER.findall(block)
    if not lines:
        return block[2:], {}
    propagated = {name.decode().lower(): value.decode() for name, value in lines}
    is_valid = len(propagated) == len(lines)
    return _TRACE_HEADER.sub(b"", block)[2:], propagated if is_valid else {}


_Details = tuple[Media, Media, Precondition | None]
"""The media types of a body and of its reply, and If-Match; None if there is no such header."""


class FastPath(FastChunkRoute):
    """Parses and answers the chunk requests of one application."""

    def __init__(self, api: ApiContext, ids: RequestIds):
        super().__init__(api, ids, ROUTE, _REQUEST_LINE, _read_details, error_response)

    def _read(
        self, request: FastRequest, line: re.Match[bytes], details: _Details, body: bytes
    ) -> bool:
        media, request.reply_media, precondition = details
        served, reader = request.codec.served, request.codec.reader
        request.stream = line[2].decode()
        key = StreamKey(served.name, request.stream)
        left_s = request.deadline_s - request.received_s
        try:
            request.rejection = self._pipeline.check_admission(
                request.caller, served.name, key, left_s
            )
        except Forbidden:
            return False
        if request.rejection is not None:
            return True
        try:
            request.chunk = chunk = reader.chunk(body, media, key, precondition)
        except CarryError:
            return False
        # the slow path encodes long JSON in pieces, and answers what applies nothing
        is_long = chunk.steps.length * served.outputs.size > LONG_VALUES
        return not chunk.dry_run and not (is_long and request.reply_media is Media.JSON)

    def _response(self, request: FastRequest, reply: Reply, header_lines: bytes) -> bytes:
        encode = encode_json if request.reply_media is Media.JSON else encode_msgpack
        body = encode(request.codec.writer.reply(reply, EVERY_STEP))
        head = _RESPONSE_HEADS[request.reply_media] % (
            hexlify(reply.head.epoch),
            hexlify(reply.head.tag),
            server_timing(reply),
            len(body),
            request.request_id,
            header_lines,
        )
        return head + body


def _read_details(values: dict[bytes, bytes]) -> _Details | None:
    """What these headers say; None leaves the request to the slow path."""
    try:
        media = media_of(_text(values.get(b"content-type")))
        reply_media = negotiate_media(_text(values.get(b"accept")), media)
        precondition = None
        if (etags := _text(values.get(b"if-match"))) is not None:
            precondition = parse_if_match(etags, "If-Match")
    except CarryError:
        return None
    return media, reply_media, precondition


class Headers(msgspec.Struct, frozen=True, gc=False):
    """Parsed headers of a request.

    Attributes:
        length: of the body.
        authorization: its key, which is not yet verified; None if there is no such header.
        request_id: None if there is no such header.
        timeout_s: the effective timeout of the request.
        details: what the route reads from the headers.
    """

    length: int
    authorization: bytes | None
    request_id: bytes | None
    timeout_s: float
    details: Any


def parse_headers(
    api: ApiContext, read_details: Callable[[dict[bytes, bytes]], Any], block: bytes
) -> Headers | None:
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
    host = values.get(b"host", b"/")
    if _SLOW_PATH_HEADERS & values.keys() or not (is_host(host) and api.accepts_host(host)):
        return None
    request_id = values.get(REQUEST_ID_HEADER)
    if request_id is not None and not is_request_id(request_id):
        return None
    timeout_s = None
    if (timeout := _text(values.get(_TIMEOUT))) is not None:
        timeout_s = parse_timeout(timeout)
        if timeout_s is None:
            return None
    timeout_s = api.limits.effective_timeout_s(timeout_s)
    details = read_details(values)
    if details is None:
        return None
    return Headers(int(length), values.get(b"authorization"), request_id, timeout_s, details)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("ascii")
