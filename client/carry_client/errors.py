"""The errors of the client, in one tree.

    CarryError
      StreamMoved           the stream is not where this client left it
        StreamRolledBack    back at an earlier state of this client's history; events are missing
        StreamDiverged      in a state that this client has not seen
      Problem               a request without a successful reply
        NoAnswer            the connection broke, or nothing came in time
        BadRequest          one class for each code of the service below these five
        AccessDenied
        NotFound
        StreamRejection
        ServiceFailure

A problem of a code that is not known here is a `Problem` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from carry_client.types import Head, Json

POSITION_CODES: Final = ("position_ahead", "position_behind", "already_applied")
"""Codes that say where the stream is instead: continue from there."""

_NOT_APPLIED_CODES: Final = (
    *("conflict", "overloaded", "deadline_exceeded", "inference_timeout"),
    *("store_unavailable", "store_refused", "shutting_down"),
)
_BUSY_STATUSES: Final = (429, 502, 503, 504)


_BY_CODE: dict[str, type[Problem]] = {}


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

    def __init_subclass__(cls, code: str = "") -> None:
        """Register the class of a code."""
        if code:
            _BY_CODE[code] = cls

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
    def verb(self) -> str | None:
        """What the access key does not allow."""
        return self._text("verb")

    @property
    def model(self) -> str | None:
        """The model for which the access key does not allow it."""
        return self._text("model")

    @property
    def allowed(self) -> Json:
        """What the access key allows: `verbs`, `models` and the `prefix` of stream names."""
        return self.document.get("allowed")

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

    def __init__(self, error: BaseException, url: str = "the service") -> None:
        detail = f"expected an answer from {url}, got {str(error) or type(error).__name__}"
        super().__init__(0, "no_answer", detail, is_retryable=True)


def cut_causes(error: BaseException) -> BaseException:
    """The error of a library without its traceback and causes, which repeat it at each layer."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class BadRequest(Problem):
    """The request is invalid: nothing was looked up and nothing changed."""


class MalformedRequest(BadRequest, code="malformed_request"):
    """The head or the framing of the request is malformed or ambiguous."""


class DuplicateField(BadRequest, code="duplicate_field"):
    """A header or a query parameter is given more than once."""


class HeadTooLarge(BadRequest, code="head_too_large"):
    """The head of the request is too large."""


class ExpectationFailed(BadRequest, code="expectation_failed"):
    """The Expect header is not supported."""


class RequestTimeout(BadRequest, code="request_timeout"):
    """The request did not arrive in time."""


class MalformedBody(BadRequest, code="malformed_body"):
    """The body cannot be parsed."""


class InvalidInput(BadRequest, code="invalid_input"):
    """The body, the query or a header does not fit the schema."""


class ChunkTooLong(BadRequest, code="chunk_too_long"):
    """The chunk has too many events."""


class BodyTooLarge(BadRequest, code="body_too_large"):
    """The body is larger than the limit."""


class UnsupportedMediaType(BadRequest, code="unsupported_media_type"):
    """The content type is not supported."""


class NotAcceptable(BadRequest, code="not_acceptable"):
    """None of the accepted content types is supported."""


class UpgradeRequired(BadRequest, code="upgrade_required"):
    """The address serves WebSockets only."""


class OriginNotAllowed(BadRequest, code="origin_not_allowed"):
    """Pages of this origin may not send this request."""


class HostNotAllowed(BadRequest, code="host_not_allowed"):
    """The Host header does not name this service."""


class InvalidName(BadRequest, code="invalid_name"):
    """The name is not allowed."""


class InvalidPrecondition(BadRequest, code="invalid_precondition"):
    """The If-Match header is invalid."""


class ChunksUnsupported(BadRequest, code="chunks_unsupported"):
    """The model takes whole sequences only."""


class FinalUnsupported(BadRequest, code="final_unsupported"):
    """The model's streams have no end."""


class ForecastUnsupported(BadRequest, code="forecast_unsupported"):
    """The model has no decoder."""


class ResetsUnsupported(BadRequest, code="resets_unsupported"):
    """Streams of this model cannot be reset."""


class StateTokenInvalid(BadRequest, code="state_token_invalid"):
    """The state token was not issued by this service."""


class StateTokenOfOtherModel(BadRequest, code="state_token_of_other_model"):
    """The state token belongs to another model."""


class StateTokenOfOtherVersion(BadRequest, code="state_token_of_other_version"):
    """The state token belongs to another version of the model."""


class VersionRejected(BadRequest, code="version_rejected"):
    """The version cannot serve the model."""


class VersionNotReady(BadRequest, code="version_not_ready"):
    """The version cannot answer the streams of the model yet."""


class AccessDenied(Problem):
    """The request has no access key that allows it: nothing was looked up and nothing changed."""


class Unauthenticated(AccessDenied, code="unauthenticated"):
    """The request has no valid access key."""


class Forbidden(AccessDenied, code="forbidden"):
    """The access key does not allow this."""


class NotFound(Problem):
    """The address does not exist."""


class ModelNotFound(NotFound, code="model_not_found"):
    """No such model."""


class VersionNotFound(NotFound, code="version_not_found"):
    """The model has no such version."""


class StreamNotFound(NotFound, code="stream_not_found"):
    """No such stream."""


class RouteNotFound(NotFound, code="not_found"):
    """No such address."""


class MethodNotAllowed(NotFound, code="method_not_allowed"):
    """The address does not support this method."""


class StreamRejection(Problem):
    """The request is valid, but conflicts with the stream's head or state; nothing changed."""


class EpochMismatch(StreamRejection, code="epoch_mismatch"):
    """The stream is in another epoch."""


class PositionAhead(StreamRejection, code="position_ahead"):
    """The chunk would skip events."""


class PositionBehind(StreamRejection, code="position_behind"):
    """The chunk would repeat events."""


class AlreadyApplied(StreamRejection, code="already_applied"):
    """The chunk was applied and its reply is no longer stored."""


class InputKindMismatch(StreamRejection, code="input_kind_mismatch"):
    """The stream takes the other kind of input."""


class StreamFinal(StreamRejection, code="stream_final"):
    """The stream is closed."""


class StateChanged(StreamRejection, code="state_changed"):
    """The stream head does not match If-Match."""


class StreamExists(StreamRejection, code="stream_exists"):
    """The stream exists."""

    def __str__(self) -> str:
        return (
            f"{self.code}: stream {self.stream!r} exists at position {self.position}; expected a "
            "new name, or overwrite=True, which replaces it"
        )


class StateIncompatible(StreamRejection, code="state_incompatible"):
    """The state belongs to another version of the model."""


class PositionUnavailable(StreamRejection, code="position_unavailable"):
    """No exact state of that position is kept."""


class PreviousFailed(StreamRejection, code="previous_failed"):
    """An earlier item of this stream failed."""


class Conflict(StreamRejection, code="conflict"):
    """Other clients kept advancing the stream."""


class ServiceFailure(Problem):
    """The service could not process a valid request."""


class StateDamaged(ServiceFailure, code="state_damaged"):
    """The stored state fails its checks."""


class NotFinite(ServiceFailure, code="output_not_finite"):
    """The network computed numbers that are not finite."""


class StoreUnavailable(ServiceFailure, code="store_unavailable"):
    """The state store does not answer."""


class StoreRefused(ServiceFailure, code="store_refused"):
    """The state store rejects writes."""


class OutcomeUnknown(ServiceFailure, code="outcome_unknown"):
    """It is unknown whether the chunk was applied."""


class NotDurable(ServiceFailure, code="not_durable"):
    """The chunk is not yet as durable as CARRY_DURABILITY requires."""


class DeadlineExceeded(ServiceFailure, code="deadline_exceeded"):
    """The deadline expired before the request was done."""


class InferenceTimeout(DeadlineExceeded, code="inference_timeout"):
    """An inference call took too long and was terminated."""


class Overloaded(ServiceFailure, code="overloaded"):
    """More work is waiting than can be done in time."""


class StreamOverloaded(Overloaded, code="stream_overloaded"):
    """More chunks of the stream are waiting than can be processed in time."""


class LimitExceeded(Overloaded, code="limit_exceeded"):
    """A limit of the access key is reached."""


class TooManyConnections(ServiceFailure, code="too_many_connections"):
    """The worker has reached its limit of connections."""


class ShuttingDown(ServiceFailure, code="shutting_down"):
    """The service is stopping."""


class InternalError(ServiceFailure, code="internal_error"):
    """An unexpected failure."""


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
