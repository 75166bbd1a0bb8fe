"""The access log: one line for each request of every transport, at the level of its outcome.

The lines have the format of every other line. They are rendered without structlog's processors,
which take ten times as long, and are buffered. The audit log is written in the same way: one line
for each change of streams other than by their chunks, and of keys.

    success                                    info; debug if it is a probe's
    client disconnected, or cancelled          info
    error of the request (4xx)                 warning
    error of the service (5xx)                 error
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from random import random
from typing import Any, Final, Literal

import msgspec
from structlog.contextvars import get_contextvars

from service.core.errors import CarryError
from service.core.memo import Memo
from service.core.tracing import RequestSpan

LogStreams = Literal["none", "hashed", "clear"]
"""How a line names the stream of its request."""

RequestObserver = Callable[[str, str | None, int, float], None]
"""(method, route, status, milliseconds) of a request; the route is None if none matched."""

GRPC: Final = "GRPC"
"""The method of a gRPC call, whose status is gRPC's number."""

WEBSOCKET: Final = "WEBSOCKET"
"""The method of a chunk on a WebSocket, whose status is HTTP's."""

CLIENT_DISCONNECTED: Final = 0
"""The status of a request whose client disconnected before the response."""

HASH_BYTES: Final = 8
CACHED_STREAMS: Final = 4096
"""Most streams whose hashes are cached."""

GRPC_ERRORS: Final = (2, 4, 13, 14, 15)
"""UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS: errors of the service."""

_GRPC_LEVELS: Final = {
    **dict.fromkeys((0, 1), logging.INFO),  # OK, CANCELLED
    **dict.fromkeys(GRPC_ERRORS, logging.ERROR),
}
_LEVEL_NAMES: Final = {
    number: logging.getLevelName(number).lower()
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
}


class RequestFacts(msgspec.Struct):
    """Facts about a request for its log line and span, added while it is served.

    Attributes:
        model: only if it is served, so that a client cannot write into the log.
        stream: the name as the client sent it; the access log names it by the setting.
        code: of the error that answers it.
        key: id of its access key, or of the one that was rejected.
        reason: why the key was rejected.
        received_bytes, sent_bytes: of the bodies.
        span: the request's, if it is sampled.
    """

    model: str | None = None
    stream: str | None = None
    code: str | None = None
    key: str | None = None
    reason: str | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    span: RequestSpan | None = None

    def note_error(self, error: CarryError) -> None:
        """Note the error that answers the request."""
        self.code, self.reason = error.code, error.reason
        self.key = error.key_id or self.key


class RequestLine(msgspec.Struct, omit_defaults=True, gc=False):
    """The line of one request: its members in their order, without those that are None.

    Attributes:
        route: the path with the names of its parameters; None if no route matched.
    """

    timestamp: datetime
    level: str
    logger: str
    message: str
    request_id: str
    method: str
    route: str | None
    status: int
    ms: float
    received_bytes: int
    sent_bytes: int
    code: str | None = None
    key: str | None = None
    reason: str | None = None
    model: str | None = None
    stream: str | None = None
    trace_id: str | None = None
    sample_ratio: float | None = None


request_facts: ContextVar[RequestFacts | None] = ContextVar("request_facts", default=None)
"""Facts of the current request; None on a fast path, which passes its own."""


def note_error(error: CarryError) -> None:
    """Note the error that answers the current request."""
    facts = request_facts.get()
    if facts is not None:
        facts.note_error(error)


def note_key(key_id: str | None) -> None:
    """Note the access key of the current request; only the line of a failed one names it."""
    facts = request_facts.get()
    if facts is not None:
        facts.key = key_id


def note_stream(model: str, stream: str | None) -> None:
    """Note the served model and the stream that the current request names."""
    facts = request_facts.get()
    if facts is not None:
        facts.model, facts.stream = model, stream


class AccessLog:
    """Writes the lines of one process.

    Attributes:
        level: lowest level that is written.
        render: makes the text of a line: a `RequestLine`, or a dictionary of its members.
        write: buffers a text.
        observe: sees every request, for metrics.
        success_ratio: share of the successful requests that have a line.
        name_stream: how a line names a stream; None omits it.
    """

    def __init__(self) -> None:
        self.level = logging.CRITICAL + 1
        self.render: Callable[[RequestLine | dict[str, Any]], str] = str
        self.write: Callable[[str], None] = _ignore
        self.observe: RequestObserver = _ignore
        self.success_ratio = 1.0
        self.name_stream: Callable[[str], str] | None = None

    def name_streams(self, how: LogStreams, key: bytes) -> None:
        """Set how lines name streams: for example by a hash of 16 hex digits.

        Args:
            key: secret of the store; with it nobody can compute the hashes of guessed names.
        """

        def hash_name(stream: str) -> str:
            name = stream.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(name, digest_size=HASH_BYTES, key=key, person=b"carry-log")
            return digest.hexdigest()

        hashes = Memo(hash_name, CACHED_STREAMS)
        self.name_stream = {"none": None, "clear": str, "hashed": hashes.__getitem__}[how]

    def stream_name(self, stream: str) -> str | None:
        """The name of a stream in lines and spans; None if they do not name it."""
        return None if self.name_stream is None else self.name_stream(stream)

    def log(
        self,
        request_id: str,
        method: str,
        route: str | None,
        status: int,
        ms: float,
        facts: RequestFacts,
        *,
        is_probe: bool = False,
        has_line: bool = True,
    ) -> None:
        """Write the line of one request, unless its level or the sampling omits it.

        Args:
            route: the path with the names of its parameters; None if no route matched.
            status: of HTTP; 0 if the client disconnected before the response. Of gRPC its number.
            ms: the total time of the request.
            facts: further ones; its span is ended.
            has_line: False to count and trace it only.
        """
        self.observe(method, route, status, ms)
        stream = facts.stream
        if stream is not None:
            stream = None if self.name_stream is None else self.name_stream(stream)
        span = facts.span
        if span is not None:
            members = {
                "request_id": request_id,
                "model": facts.model,
                "stream": stream,
                "code": facts.code,
                "received_bytes": facts.received_bytes,
                "sent_bytes": facts.sent_bytes,
            }
            span.end(method, route, status, members)
        if not has_line:
            return
        if method == GRPC:
            level = _GRPC_LEVELS.get(status, logging.WARNING)
        elif status < 400:
            level = logging.INFO
        else:
            level = logging.WARNING if status < 500 else logging.ERROR
        ratio = 1.0
        if level == logging.INFO:
            if is_probe:
                level = logging.DEBUG
            ratio = self.success_ratio
        if level < self.level or (ratio < 1.0 and random() >= ratio):  # noqa: S311
            return
        line = RequestLine(
            datetime.now(UTC),
            _LEVEL_NAMES[level],
            "service.requests",
            "request",
            request_id,
            method,
            route,
            status,
            ms,
            facts.received_bytes,
            facts.sent_bytes,
            facts.code,
            None if facts.code is None else facts.key,
            facts.reason,
            facts.model,
            stream,
            None if span is None else span.trace_id,
            ratio if ratio < 1.0 else None,
        )
        self.write(self.render(line))


def _ignore(*_: Any) -> None:
    pass


access_log: Final = AccessLog()
"""The access log of this process; `configure_logs` sets its level and format."""

log_request: Final = access_log.log


def audit(change: str, /, *, stream: str | None = None, **facts: Any) -> None:
    """Write a line of the audit log (`service.pipeline.recorder.Audit`), at every level of the log.

    It has the request id, and the id of the access key that made the change.

    Args:
        stream: the stream, or the prefix of several; it is named as in the access log.
    """
    line = {
        "timestamp": datetime.now(UTC),
        "level": "info",
        "logger": "service.audit",
        "message": change,
        **get_contextvars(),
        **facts,
    }
    if stream is not None and (name := access_log.stream_name(stream)) is not None:
        line["stream"] = name
    access_log.write(access_log.render(line))
