"""Logs: one line each on stderr, as JSON for machines or in columns for people.

The service logs through structlog, libraries through the standard library; both end in the
same lines, and every line that is written while a request is served carries its
`request_id`. `RequestLog` writes one line for each request. A line names routes, never the
path that was asked for: names of streams may be names of people. Logging never raises.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

import orjson
import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]

REQUEST_ID_HEADER = b"x-request-id"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")

PROBES = ("/health/live", "/health/ready", "/metrics")
"""Routes that machines ask for every few seconds; logged at `debug`."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def configure_logs(level: LogLevel = "info", log_format: LogFormat = "json") -> None:
    """Send structlog's and the standard library's records to stderr; may be called again.

    Args:
        level: the least level that is written.
        log_format: `json`, one object a line, or `console`.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = _rendering(log_format)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_StderrLogger,
        cache_logger_on_first_use=True,
    )
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), _without_colours],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    for earlier in [found for found in root.handlers if isinstance(found, _StderrHandler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(number)
    logging.captureWarnings(True)


class RequestLog:
    """ASGI middleware: gives every request an id, and the log one line about it.

    The id is the client's `X-Request-Id` where that is a plain token, else a new one; it is
    bound for all lines of the request and sent back in the reply's header. Put it outside of
    everything else, so that the time is the whole time.
    """

    def __init__(self, app: AsgiApp):
        self._app = app
        self._log = structlog.get_logger("service.requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status: int = 0
        began_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        with bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except BaseException:
                # nothing was answered: the server sends a plain 500, or the client is gone
                status = status or 500
                raise
            finally:
                route = getattr(scope.get("route"), "path", None)
                write = self._log.debug if route in PROBES else self._log.info
                write(
                    "request",
                    method=scope["method"],
                    route=route,
                    status=status,
                    ms=round((time.perf_counter() - began_s) * 1000, 2),
                )


def current_request_id() -> str | None:
    """The id of the request that is being served; None outside of one."""
    found = structlog.contextvars.get_contextvars().get("request_id")
    return found if isinstance(found, str) else None


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)


def _rendering(log_format: LogFormat) -> list[Processor]:
    if log_format == "console":
        return [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    return [
        structlog.processors.format_exc_info,
        _render_json,
    ]


def _render_json(_: WrappedLogger, __: str, fields: EventDict) -> str:
    line = {name: fields.pop(name, None) for name in ("timestamp", "level", "logger")}
    # structlog calls the message `event`, which is a time step here
    line["message"] = fields.pop("event", None)
    line |= fields
    try:
        return orjson.dumps(line, default=repr).decode()
    except TypeError:
        # a lone surrogate, an integer over 64 bits: the slower writer escapes them
        return json.dumps(line, default=repr, skipkeys=True)


def _without_colours(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    # uvicorn's second rendering of each message
    fields.pop("color_message", None)
    return fields


def _write_line(line: str) -> None:
    # looked up for each line, so that a replaced stderr is followed
    stream = sys.stderr
    try:
        stream.write(f"{line}\n")
        stream.flush()
    except (OSError, ValueError):
        # stderr is gone; there is nowhere left to say so
        return


class _StderrLogger:
    """What structlog's bound loggers write to."""

    def __init__(self, name: str = "service"):
        self.name = name

    def msg(self, line: str) -> None:
        _write_line(line)

    debug = info = warning = error = critical = msg


class _StderrHandler(logging.Handler):
    """The standard library's way to the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write_line(self.format(record))
        except Exception:
            self.handleError(record)
