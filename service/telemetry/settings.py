"""Settings of logs and traces."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.core.settings import settings_group


@settings_group
class TelemetrySettings:
    """Logs and traces."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged; `info` has one line for each request, `warning` only those of
    requests that failed."""

    log_format: Literal["json", "console"] = "json"
    """`json`: one JSON object a line; `console`: lines for people."""

    log_success_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the successful requests that have a line in the log; those that failed always have
    one. Lower it where a line for each request costs too much: the metrics count every request."""

    log_streams: Literal["none", "hashed", "clear"] = "none"
    """How lines and traces of requests name the stream: not at all, by a keyed hash, which is the
    same in every worker of a store, or by its name, which may be personal data."""

    tracing: bool = False
    """Send traces by OTLP, as the standard variables `OTEL_...` say. Needs the packages of the
    extra `otel`."""
