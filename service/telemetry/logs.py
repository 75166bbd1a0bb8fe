"""Structured logs on stderr, one line per event, as JSON or in columns for a terminal.

The service logs through structlog, libraries through the standard library; both are rendered
alike. Every line that is written while a request is served has its `request_id`. The lines of
requests have a module of their own (`access_log`). Logging never raises.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import secrets
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import msgspec
import orjson
import structlog
from structlog.contextvars import get_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor, WrappedLogger

from service.telemetry.access_log import RequestLine, access_log

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "console"]
FLUSH_INTERVAL_S = 0.05
MAX_BUFFERED_LINES = 200
_ID_LIMIT = 2**64
_encode_line = msgspec.json.Encoder().encode


class StderrWriter:
    """Writes log lines to stderr, immediately or buffered; one per process.

    `write` flushes the buffer and its line before it returns, so lines keep their order. `buffer`
    delays a line for up to `FLUSH_INTERVAL_S` while the event loop runs; the buffer is also flushed
    at exit, but lost if the process is killed. Safe from any thread. Nothing here raises.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler may log while the event loop's thread is writing.
        self._lock = threading.RLock()
        self._lines: list[str] = []
        atexit.register(self.flush)

    def write(self, line: str) -> None:
        """Write a line immediately."""
        with self._lock:
            self._lines.append(line)
            self.flush()

    def buffer(self, line: str) -> None:
        """Write a line soon, or immediately outside of the event loop's thread."""
        with self._lock:
            self._lines.append(line)
            if len(self._lines) == 1:
                try:
                    asyncio.get_running_loop().call_later(FLUSH_INTERVAL_S, self.flush)
                except RuntimeError:
                    self.flush()
            elif len(self._lines) >= MAX_BUFFERED_LINES:
                self.flush()

    def flush(self) -> None:
        """Write the buffered lines."""
        with self._lock:
            lines, self._lines = self._lines, []
            if not lines:
                return
            lines.append("")
            # Looked up each time, to follow a replaced stderr.
            stream = sys.stderr
            try:
                stream.write("\n".join(lines))
                stream.flush()
            except (OSError, ValueError):
                # stderr is closed: the failure cannot be reported anywhere.
                return


_stderr = StderrWriter()


class RequestIds:
    """Consecutive ids from a random start: unique without a system call for each."""

    def __init__(self) -> None:
        self._next = secrets.randbelow(_ID_LIMIT)

    def next(self) -> bytes:
        """A new id."""
        self._next = (self._next + 1) % _ID_LIMIT
        return b"%016x" % self._next


def configure_logs(level: LogLevel = "info", log_format: LogFormat = "json") -> None:
    """Send records of structlog and of the standard library to stderr; may be called again.

    Args:
        level: the lowest level that is written.
        log_format: `json`, one object per line, or `console`.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers = _renderers(log_format)
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_StderrLogger,
        cache_logger_on_first_use=True,
    )
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), _drop_color_message],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _StderrHandler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(number)
    # it logs the address of each request, whose path or query may be secret
    logging.getLogger("httpx").setLevel(max(number, logging.WARNING))
    logging.captureWarnings(True)
    access_log.level = number
    access_log.render = json_line if log_format == "json" else _console_line()
    access_log.write = _stderr.buffer


def current_request_id() -> str | None:
    """The id of the request that is being served; None outside of a request."""
    request_id = get_contextvars().get("request_id")
    return request_id if isinstance(request_id, str) else None


def flush_logs() -> None:
    """Write the buffered lines now; they are also written after an interval, and at exit."""
    _stderr.flush()


def json_line(line: RequestLine | dict[str, Any]) -> str:
    """The text of a line as JSON."""
    try:
        if isinstance(line, RequestLine):
            return _encode_line(line).decode()
        return orjson.dumps(line, default=repr, option=orjson.OPT_UTC_Z).decode()
    except (TypeError, UnicodeEncodeError):
        # The slower encoder accepts lone surrogates and integers over 64 bits.
        return json.dumps(_members(line), default=repr, skipkeys=True)


def _members(line: RequestLine | dict[str, Any]) -> dict[str, Any]:
    if isinstance(line, dict):
        return line
    members = msgspec.structs.asdict(line).items()
    return {name: value for name, value in members if value is not None or name == "route"}


def _console_line() -> Callable[[RequestLine | dict[str, Any]], str]:
    renderer = _console_renderer()

    def render(line: RequestLine | dict[str, Any]) -> str:
        members = _members(line)
        moment: datetime = members.pop("timestamp")
        fields = {"timestamp": f"{moment.replace(tzinfo=None).isoformat()}Z", **members}
        fields["event"] = fields.pop("message")
        return str(renderer(None, fields["level"], fields))

    return render


def _console_renderer() -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        exception_formatter=structlog.dev.plain_traceback,
    )


def _renderers(log_format: LogFormat) -> list[Processor]:
    if log_format == "console":
        return [_console_renderer()]
    return [structlog.processors.format_exc_info, _render_json]


def _render_json(_: WrappedLogger, __: str, fields: EventDict) -> str:
    line = {name: fields.pop(name, None) for name in ("timestamp", "level", "logger")}
    # structlog calls the message `event`, which means a time step in this service.
    line["message"] = fields.pop("event", None)
    return json_line({**line, **fields})


def _drop_color_message(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    # uvicorn adds a second, coloured rendering of each message.
    fields.pop("color_message", None)
    return fields


class _StderrLogger:
    """Logger that structlog's bound loggers wrap; writes rendered lines."""

    def __init__(self, name: str = "service"):
        self.name = name

    def msg(self, line: str) -> None:
        _stderr.write(line)

    debug = info = warning = error = critical = msg


class _StderrHandler(logging.Handler):
    """Handler that renders and writes the standard library's records."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _stderr.write(self.format(record))
        except Exception:
            self.handleError(record)
