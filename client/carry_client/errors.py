"""The errors of the client, in one tree.

    CarryError
      StreamMoved           the stream is not where this client left it
        StreamRolledBack    back at an earlier state of this client's history; events are missing
        StreamDiverged      in a state that this client has not seen
      Problem               a request without a successful reply
        NoAnswer            the connection broke, or nothing came in time
        BadRequest          one class for each code of the service below these four
        NotFound
        StreamRejection
        ServiceFailure

A problem of a code that is not known here is a `Problem` itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from carry_client.types import Head, Json

POSITION_CODES: Final = ("position_ahead", "position_behind", "already_applied")
"""Codes that say where the stream is instead: continue from there."""

_NOT_APPLIED_CODES: Final = (
    *("conflict", "overloaded", "deadline_exceeded"),
    *("store_unavailable", "store_refused", "shutting_down"),
)
_BUSY_STATUSES: Final = (429, 502, 503, 504)


class CarryError(Exception):
    """Base of every error of the client."""


class StreamMoved(CarryError):
    """The stream is not where this client left it.

    Attributes:
        stream: its name.
        expected: the head after the last reply.
        actual: the head that the service names; position 0 and no epoch if the stream is missing.
    """

    def __init__(self, detail: str, stream: str, expected: Head, actual: Head) -> None:
        super().__init__(f"stream {stream!r} {detail}: expected {expected}, got {actual}")
        self.stream, self.expected, self.actual = stream, expected, actual


class StreamRolledBack(StreamMoved):
    """The service lost the stream's last events, and they cannot be sent again from here.

    `actual.position` is where to continue.
    """


class StreamDiverged(StreamMoved):
    """Others changed the stream: equal positions would not mean equal histories."""


@dataclass(eq=False)
class Problem(CarryError):
    """A problem document (RFC 9457), another failed response, or no response at all.

    Attributes:
        status: the HTTP status; 0 without a response.
        code: stable; see the reference of errors.
        detail: one sentence for people.
        is_retryable: whether the same request may succeed later.
        retry_after_s: how long the service asks to wait.
        document: all members of the problem document.
    """

    status: int
    code: str
    detail: str = ""
    is_retryable: bool = False
    retry_after_s: float = 0.0
    document: Mapping[str, Json] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    @property
    def title(self) -> str | None:
        """The kind of problem, for people."""
        return self._text("title")

    @property
    def type(self) -> str | None:
        """The address of the code's explanation, relative to the service's."""
        return self._text("type")

    @property
    def request_id(self) -> str | None:
        """The id under which the service logged the request."""
        return self._text("request_id")

    @property
    def at(self) -> str | None:
        """The place in the request, such as `events[3].delay`."""
        return self._text("at")

    @property
    def expected(self) -> Json:
        """The expected value."""
        return self.document.get("expected")

    @property
    def got(self) -> Json:
        """The actual value."""
        return self.document.get("got")

    @property
    def errors(self) -> tuple[Mapping[str, Json], ...]:
        """`at`, `expected` and `got` of the first few errors, if there are several."""
        errors = self.document.get("errors")
        return tuple(
            each
            for each in (errors if isinstance(errors, list) else ())
            if isinstance(each, Mapping)
        )

    @property
    def stream(self) -> str | None:
        """The name of the stream."""
        return self._text("stream")

    @property
    def epoch(self) -> str | None:
        """The epoch of the stream, if its state rejects the request."""
        return self._text("epoch")

    @property
    def position(self) -> int | None:
        """The position of the stream, if its state rejects the request."""
        position = self.document.get("position")
        return position if isinstance(position, int) else None

    @property
    def tag(self) -> str | None:
        """The tag of the stream, if its state rejects the request."""
        return self._text("tag")

    @property
    def head(self) -> Head:
        """The stream's head; position 0 and no epoch if the stream is missing."""
        return Head(self.position or 0, self.epoch or "", self.tag or "")

    @property
    def has_stream_position(self) -> bool:
        """Whether it tells the client from which position to continue."""
        return self.code in POSITION_CODES and self.position is not None

    @property
    def was_not_applied(self) -> bool:
        """Whether the chunk was certainly not applied, so that an append can be repeated."""
        return self.code in _NOT_APPLIED_CODES or self.status == 429

    def _text(self, member: str) -> str | None:
        text = self.document.get(member)
        return text if isinstance(text, str) else None


class NoAnswer(Problem):
    """A broken connection or a timeout; the request may have been carried out."""

    code = "no_answer"

    def __init__(self, error: BaseException) -> None:
        super().__init__(0, self.code, str(error) or type(error).__name__, is_retryable=True)


class BadRequest(Problem):
    """The request is invalid: nothing was looked up and nothing changed."""


class MalformedRequest(BadRequest):
    """The head or the framing of the request is malformed or ambiguous."""

    code = "malformed_request"


class DuplicateField(BadRequest):
    """A header or a query parameter is given more than once."""

    code = "duplicate_field"


class HeadTooLarge(BadRequest):
    """The head of the request is too large."""

    code = "head_too_large"


class ExpectationFailed(BadRequest):
    """The Expect header is not supported."""

    code = "expectation_failed"


class RequestTimeout(BadRequest):
    """The request did not arrive in time."""

    code = "request_timeout"


class MalformedBody(BadRequest):
    """The body cannot be parsed."""

    code = "malformed_body"


class InvalidInput(BadRequest):
    """The body does not fit the schema."""

    code = "invalid_input"


class ChunkTooLong(BadRequest):
    """The chunk has too many events."""

    code = "chunk_too_long"


class BodyTooLarge(BadRequest):
    """The body is larger than the limit."""

    code = "body_too_large"


class UnsupportedMediaType(BadRequest):
    """The content type is not supported."""

    code = "unsupported_media_type"


class NotAcceptable(BadRequest):
    """None of the accepted content types is supported."""

    code = "not_acceptable"


class UpgradeRequired(BadRequest):
    """The address is one of a WebSocket."""

    code = "upgrade_required"


class OriginNotAllowed(BadRequest):
    """Pages of this origin may not open a WebSocket."""

    code = "origin_not_allowed"


class InvalidName(BadRequest):
    """The name is not allowed."""

    code = "invalid_name"


class InvalidPrecondition(BadRequest):
    """The If-Match header is invalid."""

    code = "invalid_precondition"


class ChunksUnsupported(BadRequest):
    """The model takes whole sequences only."""

    code = "chunks_unsupported"


class FinalUnsupported(BadRequest):
    """The model's streams have no end."""

    code = "final_unsupported"


class ForecastUnsupported(BadRequest):
    """The model has no decoder."""

    code = "forecast_unsupported"


class NotFound(Problem):
    """The address does not exist."""


class ModelNotFound(NotFound):
    """No such model."""

    code = "model_not_found"


class StreamNotFound(NotFound):
    """No such stream."""

    code = "stream_not_found"


class RouteNotFound(NotFound):
    """No such address."""

    code = "not_found"


class MethodNotAllowed(NotFound):
    """The address does not support this method."""

    code = "method_not_allowed"


class StreamRejection(Problem):
    """The request is valid, but conflicts with the stream's head or state; nothing changed."""


class EpochMismatch(StreamRejection):
    """The stream is in another epoch."""

    code = "epoch_mismatch"


class PositionAhead(StreamRejection):
    """The chunk would skip events."""

    code = "position_ahead"


class PositionBehind(StreamRejection):
    """The chunk would repeat events."""

    code = "position_behind"


class AlreadyApplied(StreamRejection):
    """The chunk was applied and its reply is no longer stored."""

    code = "already_applied"


class InputKindMismatch(StreamRejection):
    """The stream takes the other kind of input."""

    code = "input_kind_mismatch"


class StreamFinal(StreamRejection):
    """The stream is closed."""

    code = "stream_final"


class StateChanged(StreamRejection):
    """The stream head does not match If-Match."""

    code = "state_changed"


class StreamExists(StreamRejection):
    """The stream exists."""

    code = "stream_exists"


class StateIncompatible(StreamRejection):
    """The state belongs to another version of the model."""

    code = "state_incompatible"


class PreviousFailed(StreamRejection):
    """An earlier item of this stream failed."""

    code = "previous_failed"


class Conflict(StreamRejection):
    """Other clients kept advancing the stream."""

    code = "conflict"


class ServiceFailure(Problem):
    """The service could not process a valid request."""


class StateDamaged(ServiceFailure):
    """The stored state fails its checks."""

    code = "state_damaged"


class NotFinite(ServiceFailure):
    """The network computed numbers that are not finite."""

    code = "output_not_finite"


class StoreUnavailable(ServiceFailure):
    """The state store does not answer."""

    code = "store_unavailable"


class StoreRefused(ServiceFailure):
    """The state store rejects writes."""

    code = "store_refused"


class OutcomeUnknown(ServiceFailure):
    """It is unknown whether the chunk was applied."""

    code = "outcome_unknown"


class NotDurable(ServiceFailure):
    """The chunk is not yet as durable as CARRY_DURABILITY requires."""

    code = "not_durable"


class DeadlineExceeded(ServiceFailure):
    """The deadline expired before the request was done."""

    code = "deadline_exceeded"


class Overloaded(ServiceFailure):
    """More work is waiting than can be done in time."""

    code = "overloaded"


class StreamOverloaded(Overloaded):
    """More chunks of the stream are waiting than can be processed in time."""

    code = "stream_overloaded"


class TooManyConnections(ServiceFailure):
    """The worker has reached its limit of connections."""

    code = "too_many_connections"


class ShuttingDown(ServiceFailure):
    """The service is stopping."""

    code = "shutting_down"


class InternalError(ServiceFailure):
    """An unexpected failure."""

    code = "internal_error"


def _coded(root: type[Problem]) -> Iterator[tuple[str, type[Problem]]]:
    for kind in root.__subclasses__():
        if "code" in vars(kind):
            yield str(vars(kind)["code"]), kind
        yield from _coded(kind)


_BY_CODE: Final = {code: kind for code, kind in _coded(Problem) if kind is not NoAnswer}


def read_problem(status: int, document: object, retry_after_s: float = 0.0) -> Problem:
    """A problem out of a failed response or a failed item, with or without a document.

    Args:
        retry_after_s: how long the response's header asks to wait; the document goes first.
    """
    members = document if isinstance(document, dict) else {}
    code = str(members.get("code", f"status_{status}"))
    seconds = members.get("retry_after_s")
    return _BY_CODE.get(code, Problem)(
        status,
        code,
        str(members.get("detail", "the response holds no problem document")),
        bool(members.get("retryable", status in _BUSY_STATUSES)),
        seconds if isinstance(seconds, (int, float)) else retry_after_s,
        members,
    )
