"""Chunk requests that are plainly good, read and answered as bytes: nothing between them and us.

`Express.take` reads a request for one chunk, whole, from the bytes that came. It takes what it
is certain of: the one route, no query, a few known headers said in the usual way, and a body
that `FastDecoder` decodes. Anything else, wrong or only unusual, is None, and the server and the
framework read it as they always do and make the errors. What is taken is answered here as the
route answers it, byte for byte (a test holds both ways to it). It never waits.

While more comes than can be done, what would be refused as overloaded is refused before its body is
read: what is spent on a refusal is missing where the work is done.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

from structlog.contextvars import bound_contextvars

from service.core.errors import CarryError, Overloaded, TooManyConnections
from service.core.values import Chunk, Reply, StreamKey
from service.ops.logs import log_request
from service.transports.http.boundary import client_left, note_failure
from service.transports.http.connection.heads import is_host
from service.transports.http.connection.rejections import Refusals
from service.transports.http.context import ApiContext
from service.transports.http.field_rules import STREAM_NAME
from service.transports.http.limits import LONG_BYTES
from service.transports.http.media import Media, accepted, media_of
from service.transports.http.problems import problem_answer, status_of
from service.transports.http.replies.pieces import LONG_VALUES
from service.transports.http.replies.replies import server_timing
from service.transports.http.request_fields import TIMEOUT_HEADER, parse_timeout
from service.transports.http.request_log import REQUEST_ID_HEADER, RequestIds, is_request_id
from service.transports.http.statuses import STATUS
from service.transports.http.wire import ModelWire

EXPRESS: Final = "express"
"""Its name in the lifespan's state, where the server's connections find it."""

MAX_BYTES: Final = LONG_BYTES
"""Longer requests are read by the framework, piece by piece."""

MAX_HEADERS_BYTES: Final = 4096
"""Longer headers are read by the framework. Some thousands of what was read are kept."""

ROUTE: Final = "/v1/models/{model}/streams/{stream}/chunks"
_START = re.compile(
    rb"POST /v1/models/([a-z0-9_-]{1,64})/streams/(%b)/chunks HTTP/1\.1\r\n"
    % STREAM_NAME[1:-1].encode()
)
_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e]+(?:[ \t]+[\x21-\x7e]+)*)[ \t]*"
)
_UNUSUAL = frozenset(
    {
        b"transfer-encoding",
        b"content-encoding",
        b"expect",
        b"upgrade",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"if-match",
    }
)
_HEAD = {
    media: b'HTTP/1.1 200 OK\r\netag: "%%b"\r\nserver-timing: %%b\r\ncontent-length: %%d\r\n'
    b"content-type: %b\r\nx-request-id: %%b\r\n%%b\r\n" % media.value.encode()
    for media in Media
}
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
UNANSWERED: Final = 0
"""Stands in the log for the status of what nobody waited for."""
_TIMEOUT = TIMEOUT_HEADER.encode()
_CLOSE = b"connection: close\r\n"


Begun = asyncio.Future[list[Reply | CarryError]]
"""A chunk on its way; holds its one result."""


class More(NamedTuple):
    """The request goes on: it will be whole at that many bytes."""

    whole_bytes: int


class Refused(NamedTuple):
    """A request that is not done, its body unread; attributes as those of `Taken`."""

    wire: ModelWire
    error: Overloaded
    answer: Media
    request_id: bytes
    began_s: float
    whole_bytes: int


class Taken(NamedTuple):
    """A request on its way.

    Attributes:
        answer: what the reply is written in.
        began_s: when it was whole, and deadline_s until when its client waits, of the monotonic
            clock.
        whole_bytes: how many of the bytes it was.
    """

    wire: ModelWire
    chunk: Chunk
    answer: Media
    request_id: bytes
    began_s: float
    deadline_s: float
    whole_bytes: int


class _Headers(NamedTuple):
    """What the headers of a plain request say."""

    length: int
    media: Media
    answer: Media
    request_id: bytes | None
    timeout_s: float | None


class Express:
    """Takes and answers the requests of one application."""

    def __init__(self, api: ApiContext, ids: RequestIds):
        self._api = api
        self._ids = ids
        self._refusals = Refusals(_refusal)

    def take(self, data: bytes) -> Taken | Refused | More | None:
        """The request that these bytes begin with, if it is plain."""
        start = _START.match(data)
        if start is None:
            return None
        end = data.find(b"\r\n\r\n", start.end() - 2)
        if end < 0:
            return None
        block = data[start.end() : end]
        headers = None if len(block) > MAX_HEADERS_BYTES else _read_headers(block)
        if headers is None:
            return None
        whole_bytes = end + 4 + headers.length
        if whole_bytes > min(MAX_BYTES, self._api.limits.max_body_bytes):
            return None
        if len(data) < whole_bytes:
            return More(whole_bytes)
        began_s = time.monotonic()
        model, stream = start[1].decode(), start[2].decode()
        pipeline = self._api.pipeline
        if model not in pipeline.models:
            return None
        wire = self._api.wire(model)
        waits_s = self._api.limits.waits_s(headers.timeout_s)
        request_id = headers.request_id or self._ids.next()
        if (error := pipeline.refusal(model, StreamKey(model, stream), waits_s)) is not None:
            return Refused(wire, error, headers.answer, request_id, began_s, whole_bytes)
        chunk = wire.reader.decode_chunk(data[end + 4 : whole_bytes], headers.media, stream)
        if chunk is None or chunk.steps.length * wire.served.outputs.size > LONG_VALUES:
            # long replies are encoded in pieces, on the slow path
            return None
        deadline_s = began_s + waits_s
        return Taken(wire, chunk, headers.answer, request_id, began_s, deadline_s, whole_bytes)

    def begin(self, taken: Taken) -> Begun:
        """Hand the chunk to the pipeline."""
        return self._api.pipeline.begin(taken.chunk, taken.deadline_s)

    def leave(self, taken: Taken, begun: Begun) -> None:
        """The client is gone."""
        self._api.pipeline.leave(taken.chunk, begun)
        with bound_contextvars(request_id=taken.request_id.decode()):
            client_left("POST")
        _log(taken, UNANSWERED)

    def refuse(self, refused: Refused) -> bytes:
        """The whole answer to what is not done."""
        self._api.recorder.refusal(refused.wire.served.name, refused.error.code)
        sent = self._refusals.answer(refused.error, refused.answer, refused.request_id)
        _log(refused, STATUS[Overloaded])
        return sent

    def refuse_unread(self, error: CarryError) -> bytes:
        """The whole error response for a request that is not read to its end."""
        self._api.recorder.refusal("-", error.code)
        request_id = self._ids.next()
        if not isinstance(error, TooManyConnections):
            log_request(logging.INFO, request_id.decode(), "-", None, status_of(error), 0.0)
        return _refusal(error, Media.JSON, request_id, _CLOSE)

    def reply(self, taken: Taken, result: Reply | CarryError, *, last: bool) -> bytes:
        """The whole answer.

        Args:
            last: whether the connection is closed after it.
        """
        more = _CLOSE if last else b""
        status = 200
        if isinstance(result, CarryError):
            status = status_of(result)
            self._api.recorder.refusal(taken.wire.served.name, result.code)
            with bound_contextvars(request_id=taken.request_id.decode()):
                note_failure(result)
            sent = _refusal(result, taken.answer, taken.request_id, more)
        else:
            body = taken.wire.writer.reply_bytes(result, taken.answer)
            sent = (
                _HEAD[taken.answer]
                % (
                    result.head.etag.encode(),
                    server_timing(result.timing).encode(),
                    len(body),
                    taken.request_id,
                    more,
                )
                + body
            )
        _log(taken, status)
        return sent


def _log(request: Taken | Refused, status: int) -> None:
    ms = round((time.monotonic() - request.began_s) * 1000, 2)
    log_request(logging.INFO, request.request_id.decode(), "POST", ROUTE, status, ms)


def _refusal(error: CarryError, media: Media, request_id: bytes, more: bytes = b"") -> bytes:
    """The whole answer to a request that failed.

    Args:
        more: further lines of its head.
    """
    with bound_contextvars(request_id=request_id.decode()):
        answer = problem_answer(error, media)
    headers = [*answer.raw_headers, (REQUEST_ID_HEADER, request_id)]
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    return _STATUS_LINES[answer.status_code] + lines + more + b"\r\n" + answer.body


@lru_cache(maxsize=4096)
def _read_headers(block: bytes) -> _Headers | None:
    """What a block of header lines says; None where a line is not plain, or says what is not
    for here. Clients send the same lines again and again."""
    found: dict[bytes, bytes] = {}
    for text in block.split(b"\r\n"):
        line = _LINE.fullmatch(text)
        if line is None or (name := line[1].lower()) in found:
            return None
        found[name] = line[2]
    length = found.get(b"content-length", b"")
    keeps = found.get(b"connection", b"keep-alive").lower() == b"keep-alive"
    if not length.isdigit() or len(length) > 9 or not keeps or _UNUSUAL & found.keys():
        return None
    if not is_host(found.get(b"host", b"/")):
        return None
    request_id = found.get(REQUEST_ID_HEADER)
    if request_id is not None and not is_request_id(request_id):
        return None
    try:
        media = media_of(_text(found.get(b"content-type")))
        answer = accepted(_text(found.get(b"accept")), media)
    except CarryError:
        return None
    timeout_s = None
    if (said := _text(found.get(_TIMEOUT))) is not None:
        timeout_s = parse_timeout(said)
        if timeout_s is None:
            return None
    return _Headers(int(length), media, answer, request_id, timeout_s)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("ascii")
