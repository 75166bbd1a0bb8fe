"""Logs: one line each on stderr, as JSON for machines or in columns for people.

The service logs through structlog, libraries through the standard library; both end in the
same lines, and every line that is written while a request is served carries its
`request_id`. The lines of requests take a way of their own (`log_request`), short enough for
every request. Logging never raises.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
import structlog
from structlog.contextvars import get_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from service.ops.lines import StderrLines

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]

_LEVEL_NAMES = {logging.DEBUG: "debug", logging.INFO: "info"}
_stderr = StderrLines()


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
    _requests.configure(number, log_format)


def current_request_id() -> str | None:
    """The id of the request that is being served; None outside of one."""
    found = get_contextvars().get("request_id")
    return found if isinstance(found, str) else None


def log_request(
    level: int, request_id: str, method: str, route: str | None, status: int, ms: float
) -> None:
    """The line of one request, gathered with others before it is written.

    It looks like any other line, and is made without structlog's processors, which take ten
    times as long. Before `configure_logs` there is none.

    Args:
        level: `logging.INFO` or `logging.DEBUG`.
        route: the path with the names of its parameters; None where no route was found.
        ms: the whole time of the request.
    """
    if level >= _requests.level:
        line = {
            "timestamp": datetime.now(UTC),
            "level": _LEVEL_NAMES[level],
            "logger": "service.requests",
            "message": "request",
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": ms,
        }
        _stderr.gather(_requests.render(line))


def flush_logs() -> None:
    """Write what was gathered. It is written by itself after a moment, and at exit."""
    _stderr.flush()


class _RequestLines:
    """The level and the format of the lines of requests, as `configure_logs` has set them."""

    def __init__(self) -> None:
        self.level = logging.CRITICAL + 1
        self.render: Callable[[dict[str, Any]], str] = _json_line

    def configure(self, level: int, log_format: LogFormat) -> None:
        self.level = level
        self.render = _json_line if log_format == "json" else _console_line()


def _json_line(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=repr, option=orjson.OPT_UTC_Z).decode()
    except TypeError:
        # a lone surrogate, an integer over 64 bits: the slower writer escapes them
        return json.dumps(line, default=repr, skipkeys=True)


def _console_line() -> Callable[[dict[str, Any]], str]:
    renderer = _console_renderer()

    def render(line: dict[str, Any]) -> str:
        moment: datetime = line.pop("timestamp")
        fields = {"timestamp": f"{moment.replace(tzinfo=None).isoformat()}Z", **line}
        fields["event"] = fields.pop("message")
        return str(renderer(None, fields["level"], fields))

    return render


def _console_renderer() -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        exception_formatter=structlog.dev.plain_traceback,
    )


def _rendering(log_format: LogFormat) -> list[Processor]:
    if log_format == "console":
        return [_console_renderer()]
    return [structlog.processors.format_exc_info, _render_json]


def _render_json(_: WrappedLogger, __: str, fields: EventDict) -> str:
    line = {name: fields.pop(name, None) for name in ("timestamp", "level", "logger")}
    # structlog calls the message `event`, which is a time step here
    line["message"] = fields.pop("event", None)
    return _json_line({**line, **fields})


def _without_colours(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    # uvicorn's second rendering of each message
    fields.pop("color_message", None)
    return fields


class _StderrLogger:
    """What structlog's bound loggers write to."""

    def __init__(self, name: str = "service"):
        self.name = name

    def msg(self, line: str) -> None:
        _stderr.write(line)

    debug = info = warning = error = critical = msg


class _StderrHandler(logging.Handler):
    """The standard library's way to the same lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _stderr.write(self.format(record))
        except Exception:
            self.handleError(record)


_requests = _RequestLines()
