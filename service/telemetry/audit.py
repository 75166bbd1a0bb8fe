"""The audit log: one line for each change of streams other than by their chunks, and of keys.

The lines are among the others, with `"logger":"service.audit"`, and are written at every level of
the log. They have the request id and the id of the access key that made the change. Streams are
named as in the access log.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from structlog.contextvars import get_contextvars

from service.telemetry.request_lines import access_log


def audit(change: str, /, *, stream: str | None = None, **facts: Any) -> None:
    """Write a line (`service.pipeline.audit.Audit`).

    Args:
        stream: the stream, or the prefix of several.
    """
    line = {
        "timestamp": datetime.now(UTC),
        "level": "info",
        "logger": "service.audit",
        "message": change,
        **get_contextvars(),
        **facts,
    }
    if stream is not None and (name := access_log.named(stream)) is not None:
        line["stream"] = name
    access_log.write(access_log.render(line))
