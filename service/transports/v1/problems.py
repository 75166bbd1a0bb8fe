"""Errors as RFC 9457 problem documents.

A document has `type` (an address that explains the code), `title`, `status`, `detail`,
`code`, `retryable` and `request_id`, and beside them the facts of the error: `at`, `expected`,
`got`, `stream`, `epoch`, `position`, `tag` and others. It never has a traceback or other internals
of the service. It is `application/problem+json`, or MessagePack if that is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

from starlette.requests import Request

from service.codec.media import Media, dumps
from service.core.errors import CarryError, NotAcceptable, UnsupportedMediaType
from service.server.errors import UpgradeRequired
from service.telemetry.logs import current_request_id
from service.transports.v1.replies import Answer, Header
from service.transports.v1.reply_types import Problem
from service.transports.v1.request_fields import body_media, reply_media
from service.transports.v1.statuses import STATUS

PROBLEM_JSON = "application/problem+json"
REFERENCE = "/docs/errors"
"""URL of the explanations; `type` is this, `#` and the code."""

DEFAULT_RETRY_S = 1
LATER = (429, 503, 504)
"""Statuses of errors that may be temporary."""


def status_of(error: CarryError) -> int:
    """The HTTP status of an error."""
    return STATUS[type(error)]


def problem(error: CarryError) -> Problem:
    """The problem document of an error; its facts are further members."""
    status = status_of(error)
    members: Problem = {
        "type": f"{REFERENCE}#{error.code}",
        "title": error.title,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "retryable": error.retryable,
        "request_id": current_request_id(),
    }
    document: dict[str, Any] = {**members}
    for name, fact in error.facts.items():
        document.setdefault(name, fact)
    if status in LATER and error.retryable:
        document.setdefault("retry_after_s", DEFAULT_RETRY_S)
    return cast(Problem, document)


def problem_headers(document: Problem) -> list[Header]:
    """The ETag of a problem that names a state, `Retry-After` of a temporary one, and the
    challenge of a request without a key."""
    headers: list[Header] = []
    if document["status"] == 401:
        headers.append((b"www-authenticate", b'Bearer realm="carry"'))
    if "retry_after_s" in document:
        seconds = max(1, math.ceil(document["retry_after_s"]))
        headers.append((b"retry-after", b"%d" % seconds))
    epoch, tag = document.get("epoch"), document.get("tag")
    if epoch and tag:
        headers.append((b"etag", f'"{epoch}-{tag}"'.encode()))
    return headers


def problem_answer(error: CarryError, media: Media, headers: Iterable[Header] = ()) -> Answer:
    """The response to a request that failed as a whole.

    Args:
        media: media type of the response.
        headers: further ones, their names in lower case.
    """
    document = problem(error)
    if isinstance(error, UpgradeRequired):
        headers = [*headers, (b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")]
    content_type = PROBLEM_JSON if media is Media.JSON else media.value
    return Answer(
        dumps(media, document),
        (b"content-type", content_type.encode()),
        document["status"],
        [*headers, *problem_headers(document)],
    )


def problem_response(error: CarryError, request: Request, headers: Iterable[Header] = ()) -> Answer:
    """The same, in the media type that the request accepts."""
    return problem_answer(error, _media(request), headers)


def _media(request: Request) -> Media:
    """The media type of the reply: by Accept, else that of the body, else JSON."""
    try:
        return reply_media(request, body_media(request))
    except (NotAcceptable, UnsupportedMediaType):
        return Media.JSON
