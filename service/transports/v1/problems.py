"""Errors as RFC 9457 problem documents: the status of each, and whole responses.

A document has `type` (an address that explains the code), `title`, `status`, `detail`,
`code`, `retryable` and `request_id`, and beside them the facts of the error: `at`, `expected`,
`got`, `stream`, `epoch`, `position`, `tag` and others. It never has a traceback or other internals
of the service. It is `application/problem+json`, or MessagePack if that is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, cast

from starlette.requests import Request
from structlog.contextvars import bound_contextvars

from service.codec.media import Media, dumps
from service.core.errors import (
    CarryError,
    NotAcceptable,
    Overloaded,
    Unauthenticated,
    UnsupportedMediaType,
)
from service.pipeline.recorder import Recorder
from service.server.errors import MethodNotAllowed, TooManyConnections, UpgradeRequired
from service.telemetry.access_log import RequestFacts, log_request
from service.telemetry.logs import RequestIds, current_request_id
from service.transports.v1.call import body_media, reply_media
from service.transports.v1.replies import Answer, Header
from service.transports.v1.reply_types import Problem
from service.transports.v1.request_log import REQUEST_ID_HEADER

PROBLEM_JSON: Final = "application/problem+json"
REFERENCE: Final = "/docs/errors"
"""URL of the explanations; `type` is this, `#` and the code."""

DEFAULT_RETRY_S: Final = 1
LATER: Final = (429, 503, 504)
"""Statuses of errors that may be temporary."""

CLOSE: Final = b"connection: close\r\n"
"""Header line of a response after which the connection is closed."""

MIN_ID_BYTES: Final = 16
"""Shortest request id that `OverloadResponses` replaces: a shorter one could match other bytes."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def problem(error: CarryError, request_id: str | None = None) -> Problem:
    """The problem document of an error; its facts are further members.

    Args:
        request_id: by default that of the current request.
    """
    status = error.status
    document: dict[str, Any] = {
        "type": f"{REFERENCE}#{error.code}",
        "title": error.title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "retryable": error.retryable,
        "request_id": request_id or current_request_id(),
    }
    for name, fact in error.facts.items():
        document.setdefault(name, fact)
    if status in LATER and error.retryable:
        document.setdefault("retry_after_s", DEFAULT_RETRY_S)
    return cast(Problem, document)


def problem_headers(error: CarryError, document: Problem) -> list[Header]:
    """The headers beside a problem document: the ETag of a state that it names, `Retry-After` of a
    temporary problem, and what HTTP requires of a status."""
    headers: list[Header] = []
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", b'Bearer realm="carry"'))
    elif isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.facts.get("expected", ())).encode()))
    elif isinstance(error, UpgradeRequired):
        headers += [(b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")]
    if "retry_after_s" in document:
        seconds = max(1, math.ceil(document["retry_after_s"]))
        headers.append((b"retry-after", b"%d" % seconds))
    epoch, tag = document.get("epoch"), document.get("tag")
    if epoch and tag:
        headers.append((b"etag", f'"{epoch}-{tag}"'.encode()))
    return headers


def problem_answer(error: CarryError, media: Media) -> Answer:
    """The response to a request that failed as a whole, in a media type."""
    document = problem(error)
    content_type = PROBLEM_JSON if media is Media.JSON else media.value
    return Answer(
        dumps(media, document),
        (b"content-type", content_type.encode()),
        document["status"],
        problem_headers(error, document),
    )


def problem_response(error: CarryError, request: Request) -> Answer:
    """The response to a request that failed as a whole.

    Its media type is that of the reply: by Accept, else that of the body, else JSON.
    """
    try:
        media = reply_media(request, body_media(request))
    except (NotAcceptable, UnsupportedMediaType):
        media = Media.JSON
    return problem_answer(error, media)


def error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    """A whole response with a problem document, as bytes, without the slow path.

    Args:
        header_lines: further lines of its head, each with its line end.
    """
    with bound_contextvars(request_id=request_id.decode()):
        answer = problem_answer(error, media)
    return response_bytes(answer, request_id, header_lines)


def response_bytes(answer: Answer, request_id: bytes, header_lines: bytes = b"") -> bytes:
    """The bytes of a whole response, with the id of its request.

    Args:
        header_lines: further lines of its head, each with its line end.
    """
    headers = [*answer.raw_headers, (REQUEST_ID_HEADER, request_id)]
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    return _STATUS_LINES[answer.status_code] + lines + header_lines + b"\r\n" + answer.body


class OverloadResponses:
    """Responses to rejected requests, serialized once per error and media type.

    Load shedding repeats one error many times; only the request id differs between its responses.

    Args:
        serialize: makes a whole response from error, media type and request id.
    """

    def __init__(self, serialize: Callable[[CarryError, Media, bytes], bytes]):
        self._serialize = serialize
        self._error: Overloaded | None = None
        self._templates: dict[tuple[Media, int], list[bytes]] = {}

    def response(self, error: Overloaded, media: Media, request_id: bytes) -> bytes:
        """A whole response: the bytes that `serialize` makes."""
        length = len(request_id)
        if length < MIN_ID_BYTES:
            return self._serialize(error, media, request_id)
        if error is not self._error:
            self._error = error
            self._templates.clear()
        template = self._templates.get((media, length))
        if template is None:
            placeholder = b"#" + b"~" * (length - 1)
            template = self._serialize(error, media, placeholder).split(placeholder)
            self._templates[media, length] = template
        return request_id.join(template)


def connection_error_response(recorder: Recorder, ids: RequestIds, error: CarryError) -> bytes:
    """Count and log a request that is not read to its end, and make its whole response.

    These are timeouts, framing errors, and rejected connections and bodies; the connection has to
    be closed after the response.
    """
    recorder.record_error("-", error)
    request_id = ids.next()
    if not isinstance(error, TooManyConnections):
        facts = RequestFacts(code=error.code)
        log_request(request_id.decode(), "-", None, error.status, 0.0, facts)
    return error_response(error, Media.JSON, request_id, CLOSE)
