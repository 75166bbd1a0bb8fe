"""Problem: the outcome of a request that is not a successful reply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

NO_ANSWER: Final = "no_answer"
POSITION_CODES: Final = ("position_ahead", "position_behind", "already_applied")
"""Codes that say where the stream is instead: continue from there."""

_NOT_APPLIED_CODES: Final = (
    *("conflict", "overloaded", "deadline_exceeded"),
    *("store_unavailable", "store_refused", "shutting_down"),
)
_BUSY_STATUSES: Final = (429, 502, 503, 504)


@dataclass(eq=False)
class Problem(Exception):
    """A problem document (RFC 9457), another failed response, or no response at all.

    Attributes:
        status: the HTTP status; 0 without a response.
        is_retryable: whether the same request may succeed later.
        retry_after_s: how long the service asks to wait.
        document: all members of the problem document.
    """

    status: int
    code: str
    detail: str = ""
    is_retryable: bool = False
    retry_after_s: float = 0.0
    document: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    @property
    def position(self) -> int | None:
        """The position of the stream, where the problem names it."""
        position = self.document.get("position")
        return position if isinstance(position, int) else None

    @property
    def has_stream_position(self) -> bool:
        """Whether it tells the client from which position to continue."""
        return self.code in POSITION_CODES and self.position is not None

    @property
    def was_not_applied(self) -> bool:
        """Whether the chunk was certainly not applied, so that an append can be repeated."""
        return self.code in _NOT_APPLIED_CODES or self.status == 429


def no_answer(error: BaseException) -> Problem:
    """A broken connection or a timeout; the request may have been carried out."""
    detail = str(error) or type(error).__name__
    return Problem(0, NO_ANSWER, detail, is_retryable=True)


def read_problem(status: int, document: Any) -> Problem:
    """A problem out of a failed response or a failed item, with or without a document."""
    members = document if isinstance(document, dict) else {}
    is_busy = status in _BUSY_STATUSES
    retry_after_s = members.get("retry_after_s")
    return Problem(
        status=status,
        code=str(members.get("code", f"status_{status}")),
        detail=str(members.get("detail", "the response holds no problem document")),
        is_retryable=bool(members.get("retryable", is_busy)),
        retry_after_s=retry_after_s if isinstance(retry_after_s, (int, float)) else 0.0,
        document=members,
    )


def read_response(status: int, content_type: str, body: bytes) -> Any:
    """The decoded document of a response; None for an empty one.

    Raises:
        Problem: the status is 400 or above, or the body is neither JSON nor MessagePack.
    """
    try:
        document = _decode(content_type, body)
    except ValueError:
        document = None
        if status < 400:
            detail = f"the body is not a document: {body[:200]!r}"
            raise Problem(status, "unreadable_reply", detail) from None
    if status >= 400:
        raise read_problem(status, document)
    return document


def _decode(content_type: str, body: bytes) -> Any:
    if not body:
        return None
    if content_type.startswith("application/msgpack"):
        return msgpack.unpackb(body)
    return json.loads(body)
