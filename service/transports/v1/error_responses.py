"""Error responses as bytes, for the fast path and for requests that are not read to their end."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from structlog.contextvars import bound_contextvars

from service.codec.media import Media
from service.core.errors import CarryError, Overloaded
from service.pipeline.recorder import Recorder
from service.server.errors import TooManyConnections
from service.telemetry.access_log import RequestFacts, log_request
from service.telemetry.logs import RequestIds
from service.transports.v1.problems import problem_answer, status_of
from service.transports.v1.replies import Answer
from service.transports.v1.request_log import REQUEST_ID_HEADER

CLOSE: Final = b"connection: close\r\n"
"""Header line of a response after which the connection is closed."""

MIN_ID_BYTES: Final = 16
"""Shortest request id that `OverloadResponses` replaces: a shorter one could match other bytes."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def error_response(
    error: CarryError, media: Media, request_id: bytes, header_lines: bytes = b""
) -> bytes:
    """A whole response with a problem document.

    Args:
        header_lines: further lines of its head, each with its line end.
    """
    with bound_contextvars(request_id=request_id.decode()):
        answer = problem_answer(error, media)
    return response_bytes(answer, request_id, header_lines)


def response_bytes(answer: Answer, request_id: bytes, header_lines: bytes = b"") -> bytes:
    """A whole response.

    Args:
        header_lines: as for `error_response`.
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
        """The same bytes as `serialize` makes."""
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


class ConnectionErrors:
    """Responses to requests that are not read to their end; counted and logged.

    These are timeouts, framing errors, and rejected connections and bodies.

    Attributes:
        ids: gives the ids of requests.
    """

    def __init__(self, recorder: Recorder, ids: RequestIds):
        self._recorder = recorder
        self.ids = ids

    def response(self, error: CarryError) -> bytes:
        """The whole response, after which the connection has to be closed."""
        self._recorder.record_error("-", error)
        request_id = self.ids.next()
        if not isinstance(error, TooManyConnections):
            facts = RequestFacts(code=error.code)
            log_request(request_id.decode(), "-", None, status_of(error), 0.0, facts)
        return error_response(error, Media.JSON, request_id, CLOSE)
