"""Fast path for chunks by V2 with binary tensors: parsed from the socket buffer, no ASGI scope.

As the fast path of the HTTP API, it accepts a strict subset: a complete request for one short chunk
of a sequence, its JSON before the tensor, valid. Anything else is None, and the slow path reads it
from its first byte and makes the errors. Responses have the same bytes as the slow path's.
"""

from __future__ import annotations

import logging
import re
import time
from functools import lru_cache, partial
from typing import Final, NamedTuple

from structlog.contextvars import bound_contextvars

from service.core.errors import CarryError
from service.core.values import Chunk, Reply, StreamKey
from service.ops.logs import RequestIds, log_request
from service.transports.http.connection.fast_path import (
    CLIENT_DISCONNECTED,
    MAX_HEADERS_BYTES,
    MAX_REQUEST_BYTES,
    IncompleteRequest,
    PendingReply,
    RejectedRequest,
    parse_common_headers,
)
from service.transports.http.connection.rejections import CLOSE, OverloadResponses, response_bytes
from service.transports.http.error_handling import log_client_disconnect, log_failure
from service.transports.http.limits import ApiLimits
from service.transports.http.media import Media
from service.transports.http.problems import status_of
from service.transports.http.replies.pieces import LONG_VALUES
from service.transports.kserve.http_body import (
    HEADER_LENGTH,
    BinaryOutputs,
    decode_request,
    encode_reply,
)
from service.transports.kserve.http_errors import error_answer
from service.transports.kserve.inference import Inference, ResolvedCall

ROUTE: Final = "/v2/models/{model}/infer"

_REQUEST_LINE = re.compile(
    rb"POST /v2/models/([a-z0-9_-]{1,64})(?:/versions/([0-9a-f]{1,12}))?/infer HTTP/1\.1\r\n"
)
_HEADER_LENGTH: Final = HEADER_LENGTH.encode()
_RESPONSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
    b"content-type: application/octet-stream\r\nx-request-id: %b\r\n%b\r\n"
)


class FastInferRequest(NamedTuple):
    """A complete request for one chunk; attributes as those of `FastRequest`."""

    call: ResolvedCall
    binary: BinaryOutputs
    chunk: Chunk
    request_id: bytes
    received_s: float
    deadline_s: float
    total_bytes: int


class _Headers(NamedTuple):
    """Parsed headers; attributes as those of `CommonHeaders`."""

    length: int
    json_bytes: int
    request_id: bytes | None
    timeout_s: float


class FastInferPath:
    """Parses and answers the requests of one application: a `FastRoute[FastInferRequest]`."""

    def __init__(self, inference: Inference, ids: RequestIds):
        self._inference = inference
        self._api = inference.api
        self._ids = ids
        self._max_bytes = min(MAX_REQUEST_BYTES, inference.api.limits.max_body_bytes)
        self._overload_responses = OverloadResponses(_error_response)
        # cached, since clients repeat their headers
        self._parse_headers = lru_cache(maxsize=4096)(partial(_parse_headers, inference.api.limits))

    def parse(self, data: bytes) -> FastInferRequest | RejectedRequest | IncompleteRequest | None:
        """The request at the beginning of these bytes; None leaves it to the slow path."""
        start = _REQUEST_LINE.match(data)
        if start is None:
            return None
        end = data.find(b"\r\n\r\n", start.end() - 2)
        if end < 0:
            return None
        block = data[start.end() : end]
        headers = None if len(block) > MAX_HEADERS_BYTES else self._parse_headers(block)
        if headers is None:
            return None
        total_bytes = end + 4 + headers.length
        if total_bytes > self._max_bytes:
            return None
        if len(data) < total_bytes:
            return IncompleteRequest(total_bytes)
        received_s = time.monotonic()
        model, version = start[1].decode(), (start[2] or b"").decode()
        body = data[end + 4 : total_bytes]
        try:
            request, binary = decode_request(body, headers.json_bytes, model, version)
            call = self._inference.resolve(request)
        except CarryError:
            return None
        stream = call.parameters.stream
        if stream is None or not self._is_short(call, binary):
            return None
        timeout_s = headers.timeout_s
        if call.parameters.timeout_s is not None:
            timeout_s = min(timeout_s, call.parameters.timeout_s)
        request_id = headers.request_id or self._ids.next()
        model = call.wire.served.name
        error = self._api.pipeline.check_admission(model, StreamKey(model, stream), timeout_s)
        if error is not None:
            return RejectedRequest(
                call.wire, error, Media.JSON, request_id, received_s, total_bytes
            )
        try:
            chunk = self._inference.read_chunk(call, stream)
        except CarryError:
            return None
        deadline_s = received_s + timeout_s
        return FastInferRequest(
            call, binary, chunk, request_id, received_s, deadline_s, total_bytes
        )

    def _is_short(self, call: ResolvedCall, binary: BinaryOutputs) -> bool:
        """Whether the reply is binary and can be written at once, and nothing follows it."""
        if self._inference.delete_at_end and call.parameters.ends:
            return False
        signature = call.signature
        values = signature.steps * call.wire.served.outputs.size
        return values <= LONG_VALUES and binary.has_any(each.name for each in signature.outputs)

    def start(self, request: FastInferRequest) -> PendingReply:
        """Hand the chunk to the pipeline."""
        return self._api.pipeline.enqueue(request.chunk, request.deadline_s)

    def cancel(self, request: FastInferRequest, reply: PendingReply) -> None:
        """Drop a request whose client disconnected, unless its chunk is already in a batch."""
        self._api.pipeline.cancel(request.chunk, reply)
        with bound_contextvars(request_id=request.request_id.decode()):
            log_client_disconnect("POST")
        _log(request, CLIENT_DISCONNECTED)

    def rejection(self, request: RejectedRequest) -> bytes:
        """The whole response to a rejected request."""
        self._api.recorder.record_error(request.wire.served.name, request.error.code)
        _log(request, status_of(request.error))
        return self._overload_responses.response(request.error, Media.JSON, request.request_id)

    def response(
        self, request: FastInferRequest, result: Reply | CarryError, *, closes: bool
    ) -> bytes:
        """The whole response; with `closes`, the connection is closed after it."""
        header_lines = CLOSE if closes else b""
        if isinstance(result, CarryError):
            self._api.recorder.record_error(request.call.wire.served.name, result.code)
            with bound_contextvars(request_id=request.request_id.decode()):
                log_failure(result)
            _log(request, status_of(result))
            return _error_response(result, Media.JSON, request.request_id, header_lines)
        reply = self._inference.reply_to_chunk(request.call, result)
        body, json_bytes = encode_reply(reply, request.binary)
        _log(request, 200)
        head = _RESPONSE_HEAD % (json_bytes, len(body), request.request_id, header_lines)
        return head + body


def _error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    with bound_contextvars(request_id=request_id.decode()):
        return response_bytes(error_answer(error), request_id, header_lines)


def _log(request: FastInferRequest | RejectedRequest, status: int) -> None:
    ms = round((time.monotonic() - request.received_s) * 1000, 2)
    log_request(logging.INFO, request.request_id.decode(), "POST", ROUTE, status, ms)


def _parse_headers(limits: ApiLimits, block: bytes) -> _Headers | None:
    """The headers in a block of lines, or None if they are for the slow path."""
    common = parse_common_headers(limits, block)
    if common is None:
        return None
    json_bytes = common.values.get(_HEADER_LENGTH, b"")
    if not json_bytes.isdigit() or len(json_bytes) > 9:
        return None
    return _Headers(common.length, int(json_bytes), common.request_id, common.timeout_s)
