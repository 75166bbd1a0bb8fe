"""The status with which a call ends, and that of each error.

The details of an error's status are `code: detail`. Its trailing metadata is `carry-error` (the
code), `carry-problem-bin` (the problem document of the HTTP API, JSON) and, for a temporary error,
`grpc-retry-pushback-ms`, which gRPC's own retries follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Final

from service.codec.media import Media, dumps
from service.core import errors
from service.core.errors import CarryError
from service.server import errors as http_errors
from service.transports.v1.problems import problem


class StatusCode(IntEnum):
    """The status of a call."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


Metadata = Sequence[tuple[str, str | bytes]]
"""Names and values; those of names that end in `-bin` are bytes."""

STATUS_CODES: Final[Mapping[type[CarryError], StatusCode]] = {
    errors.BadRequest: StatusCode.INVALID_ARGUMENT,
    errors.BodyTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    http_errors.RequestTimeout: StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.Forbidden: StatusCode.PERMISSION_DENIED,
    errors.NotFound: StatusCode.NOT_FOUND,
    http_errors.MethodNotAllowed: StatusCode.UNIMPLEMENTED,
    errors.StreamRejection: StatusCode.FAILED_PRECONDITION,
    errors.AlreadyApplied: StatusCode.ALREADY_EXISTS,
    errors.StreamExists: StatusCode.ALREADY_EXISTS,
    errors.Conflict: StatusCode.ABORTED,
    errors.ServiceFailure: StatusCode.INTERNAL,
    errors.StateDamaged: StatusCode.DATA_LOSS,
    errors.StoreUnavailable: StatusCode.UNAVAILABLE,
    errors.StoreRefused: StatusCode.UNAVAILABLE,
    errors.OutcomeUnknown: StatusCode.UNKNOWN,
    errors.NotDurable: StatusCode.UNKNOWN,
    errors.DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    errors.Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    http_errors.TooManyConnections: StatusCode.RESOURCE_EXHAUSTED,
    errors.ShuttingDown: StatusCode.UNAVAILABLE,
}
"""By the class of an error, or the nearest of its base classes."""


def status_code(error: CarryError) -> StatusCode:
    """The status code of an error."""
    for kind in type(error).__mro__:
        if kind in STATUS_CODES:
            return STATUS_CODES[kind]
    return StatusCode.UNKNOWN


def status_details(error: CarryError) -> str:
    """The details of a status."""
    return f"{error.code}: {error.detail}"


def trailing_metadata(error: CarryError) -> Metadata:
    """Trailing metadata of an error: its code, and its problem document."""
    document = problem(error)
    content = dumps(Media.JSON, document)
    metadata: Metadata = [("carry-error", error.code), ("carry-problem-bin", content)]
    if "retry_after_s" in document:
        pushback_ms = str(round(document["retry_after_s"] * 1000))
        metadata = [*metadata, ("grpc-retry-pushback-ms", pushback_ms)]
    return metadata
