"""Log lines about requests that failed, and about clients that disconnected, of every transport."""

from __future__ import annotations

import structlog

from service.core.errors import CarryError, InternalError, Overloaded, ServiceFailure
from service.telemetry.access_log import note_error

log = structlog.get_logger(__name__)


def log_client_disconnect(method: str) -> None:
    """Log that a client disconnected before its request was complete, or before its response."""
    log.info("client_disconnected", method=method)


def log_failure(error: CarryError) -> None:
    """Note an error for its request's line, and log one of the service; load shedding is logged
    elsewhere, aggregated."""
    note_error(error)
    if isinstance(error, ServiceFailure) and not isinstance(error, Overloaded):
        log.warning("request_failed", code=error.code, detail=error.detail)


def log_unexpected_failure(error: Exception) -> InternalError:
    """Log an unexpected exception with its traceback, and return the error that answers it."""
    log.error("request_failed", error=type(error).__name__, exc_info=error)
    internal = InternalError("the request failed unexpectedly; the service's log has the reason")
    note_error(internal)
    return internal


def as_carry_error(error: Exception) -> CarryError:
    """The error that answers an exception, which is logged if it is unexpected."""
    return error if isinstance(error, CarryError) else log_unexpected_failure(error)
