"""Everything the service refuses or fails at, in one tree.

    CarryError
      BadRequest            the request cannot be understood, nothing was looked up
        MalformedRequest      malformed_request
        DuplicateField        duplicate_field
        HeadTooLarge          head_too_large
        ExpectationFailed     expectation_failed
        RequestTimeout        request_timeout
        MalformedBody         malformed_body
        InvalidInput          invalid_input
        ChunkTooLong          chunk_too_long
        BodyTooLarge          body_too_large
        UnsupportedMediaType  unsupported_media_type
        NotAcceptable         not_acceptable
        InvalidName           invalid_name
        InvalidPrecondition   invalid_precondition
        ChunksUnsupported     chunks_unsupported
        FinalUnsupported      final_unsupported
        ForecastUnsupported   forecast_unsupported
      NotFound
        ModelNotFound         model_not_found
        StreamNotFound        stream_not_found
        RouteNotFound         not_found
        MethodNotAllowed      method_not_allowed
      Refused               understood, and at odds with where the stream stands
        EpochMismatch         epoch_mismatch
        PositionAhead         position_ahead
        PositionBehind        position_behind
        AlreadyApplied        already_applied
        InputKindMismatch     input_kind_mismatch
        StreamFinal           stream_final
        StateChanged          state_changed
        StreamExists          stream_exists
        StateIncompatible     state_incompatible
        PreviousFailed        previous_failed
        Conflict              conflict
      Failed                something on the service's side
        StateDamaged          state_damaged
        NotFinite             output_not_finite
        StoreUnavailable      store_unavailable
        StoreRefused          store_refused
        OutcomeUnknown        outcome_unknown
        NotDurable            not_durable
        DeadlineExceeded      deadline_exceeded
        Overloaded            overloaded
          StreamOverloaded    stream_overloaded
        TooManyConnections    too_many_connections
        ShuttingDown          shutting_down
        InternalError         internal_error

Each class has a stable `code`, says whether the same request may be sent again
(`retryable`) and what a caller does about it (`remedy`). Where a chunk may have been applied
(`needs_position`), that holds for a chunk with a position only: one without would be applied
twice, and its error is made by `without_position`. HTTP status lives in one table in `api/`.
`docs/reference/errors.md` is generated from this tree. A refusal of a stream carries where the
stream stands, so that a client can go on without another request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from service.core.values import StreamHead


class CarryError(Exception):
    """Base of every error the service raises on purpose.

    Args:
        detail: one sentence: what was expected and what came.
        facts: further members of the problem document (`expected`, `got`, `stream`,
            `epoch`, `position`, `tag`, ...), plain JSON values.
    """

    code: ClassVar[str] = ""
    title: ClassVar[str] = ""
    retryable: bool = False
    needs_position: ClassVar[bool] = False
    remedy: ClassVar[str] = ""

    def __init__(self, detail: str, **facts: Any):
        super().__init__(detail)
        self.detail = detail
        self.facts: Mapping[str, Any] = facts

    def without_position(self) -> Self:
        """The same error of a chunk without a position: one that may have been applied must not
        be sent again."""
        if not self.needs_position:
            return self
        facts = {name: fact for name, fact in self.facts.items() if name != "retry_after_s"}
        told = type(self)(
            f"{self.detail}; without a position it could be applied twice if it is sent again",
            **facts,
        )
        told.retryable = False
        told.__cause__ = self.__cause__
        return told


class BadRequest(CarryError):
    """The request cannot be understood; nothing was looked up and nothing changed."""


class MalformedRequest(BadRequest):
    code = "malformed_request"
    title = "The head or the framing of the request is malformed or ambiguous"
    remedy = "Send HTTP/1.1 with one Host. The connection is closed; nothing after it was read."


class DuplicateField(BadRequest):
    code = "duplicate_field"
    title = "A header or a query parameter is given more than once"
    remedy = "Send it once; the service does not guess which value was meant."


class HeadTooLarge(BadRequest):
    code = "head_too_large"
    title = "The head of the request is too large"
    remedy = "Send fewer and shorter headers, and a shorter address."


class ExpectationFailed(BadRequest):
    code = "expectation_failed"
    title = "The Expect header is not supported"
    remedy = "Send `Expect: 100-continue`, or none."


class RequestTimeout(BadRequest):
    code = "request_timeout"
    title = "The request did not arrive in time"
    retryable = True
    remedy = "Send it without pauses; the limits are CARRY_HEAD_TIMEOUT_S and CARRY_BODY_TIMEOUT_S."


class MalformedBody(BadRequest):
    code = "malformed_body"
    title = "The body cannot be parsed"
    remedy = "Send one JSON or MessagePack document of the content type that is named."


class InvalidInput(BadRequest):
    code = "invalid_input"
    title = "The body does not fit the schema"
    remedy = "Correct the named field; GET the model for its event schema and input_features."

    def within(self, element: str) -> Self:
        """The error with its place moved into `element` of the body, such as `chunks[3]`."""
        if "at" not in self.facts:
            return self
        facts = {**self.facts, "at": f"{element}.{self.facts['at']}"}
        return type(self)(f"{element}.{self.detail}", **facts)


class ChunkTooLong(BadRequest):
    code = "chunk_too_long"
    title = "The chunk holds too many events"
    remedy = (
        "Cut the chunk at the limit that is named and send the parts one after another; to a "
        "model with `chunking: per_chunk` each part is a chunk of its own."
    )


class BodyTooLarge(BadRequest):
    code = "body_too_large"
    title = "The body is larger than the limit"
    remedy = "Send fewer events or fewer streams in one request."


class UnsupportedMediaType(BadRequest):
    code = "unsupported_media_type"
    title = "The content type is not served"
    remedy = "Send application/json or application/msgpack, not compressed."


class NotAcceptable(BadRequest):
    code = "not_acceptable"
    title = "No content type that is accepted is served"
    remedy = "Accept application/json or application/msgpack."


class InvalidName(BadRequest):
    code = "invalid_name"
    title = "The name is not allowed"
    remedy = "A stream's name is 1 to 256 characters of A-Z a-z 0-9 . _ : @ -, except . and .."


class InvalidPrecondition(BadRequest):
    code = "invalid_precondition"
    title = "The If-Match header cannot be read"
    remedy = 'Send the ETag of a reply as it came, for example If-Match: "epoch-tag", or *.'


class ChunksUnsupported(BadRequest):
    code = "chunks_unsupported"
    title = "The model takes whole sequences only"
    remedy = "Send whole sequences to .../predict; `chunking` of the model is `whole`."


class FinalUnsupported(BadRequest):
    code = "final_unsupported"
    title = "The model's streams have no end"
    remedy = "Leave `final` out; only a model with `blocks` waits for events that it may end."


class ForecastUnsupported(BadRequest):
    code = "forecast_unsupported"
    title = "The model has no decoder to look ahead with"
    remedy = "Ask a model whose description has `forecast`; GET /v1/models/{model} shows it."


class NotFound(CarryError):
    """What the address names does not exist."""


class ModelNotFound(NotFound):
    code = "model_not_found"
    title = "No such model"
    remedy = "GET /v1/models lists the models that are served."


class StreamNotFound(NotFound):
    code = "stream_not_found"
    title = "No such stream"
    remedy = "A stream begins with its first chunk, at position 0."


class RouteNotFound(NotFound):
    code = "not_found"
    title = "No such address"
    remedy = "GET /docs lists the addresses."


class MethodNotAllowed(NotFound):
    code = "method_not_allowed"
    title = "The address does not take this method"
    remedy = "Use one of the methods in the Allow header."


class Refused(CarryError):
    """Understood, and at odds with where the stream stands; nothing changed."""


class EpochMismatch(Refused):
    code = "epoch_mismatch"
    title = "The stream began anew since"
    remedy = "Read the stream; it was deleted, restored, forked over, or expired. Start over."


class PositionAhead(Refused):
    code = "position_ahead"
    title = "The chunk would skip events"
    remedy = "Send the events from the expected position on."


class PositionBehind(Refused):
    code = "position_behind"
    title = "The chunk would repeat events"
    remedy = "Leave out the events before the expected position."


class AlreadyApplied(Refused):
    code = "already_applied"
    title = "The chunk was applied and its reply is no longer kept"
    remedy = "Go on from the position that is named; the outputs of this chunk are gone."


class InputKindMismatch(Refused):
    code = "input_kind_mismatch"
    title = "The stream is fed in another kind"
    remedy = "Feed a stream by `events` or by `inputs`, as its first chunk did."


class StreamFinal(Refused):
    code = "stream_final"
    title = "The stream is closed"
    remedy = "A final chunk ended it; send what follows to another stream, or delete this one."


class StateChanged(Refused):
    code = "state_changed"
    title = "The stream is not in the state If-Match names"
    remedy = "Read the stream and decide again."


class StreamExists(Refused):
    code = "stream_exists"
    title = "The stream exists"
    remedy = "Send If-Match with the stream's ETag to overwrite it, or delete it first."


class StateIncompatible(Refused):
    code = "state_incompatible"
    title = "The state belongs to another version of the model"
    remedy = (
        "Serve the version that wrote it, or delete the stream and send it from the start; "
        "CARRY_ON_MODEL_CHANGE=reset does so by itself."
    )


class PreviousFailed(Refused):
    code = "previous_failed"
    title = "An earlier item of this stream failed"
    remedy = "Mend the earlier item and send both again."


class Conflict(Refused):
    code = "conflict"
    title = "Others kept moving the stream on"
    retryable = True
    remedy = "Send it again; one client per stream avoids this."


class Failed(CarryError):
    """Something on the service's side."""


class StateDamaged(Failed):
    """The stored bytes of a stream are not a valid state.

    Attributes:
        head: the bytes in the place of a state's head; a deletion that expects them deletes this
            value only.
    """

    code = "state_damaged"
    title = "The stored state fails its checks"
    remedy = "Restore the stream from a copy, or delete it and send it from the start."
    head: StreamHead | None = None


class NotFinite(Failed):
    code = "output_not_finite"
    title = "The network gave numbers that are not finite"
    remedy = "Look at the inputs' size and the model; the stream stands where it stood."


class StoreUnavailable(Failed):
    code = "store_unavailable"
    title = "The state store does not answer"
    retryable = True
    remedy = "Send it again after Retry-After, with a position; nothing was applied."


class StoreRefused(Failed):
    code = "store_refused"
    title = "The state store refuses to work"
    retryable = True
    remedy = "The operator looks at the store: memory, disk, replication, permissions."


class OutcomeUnknown(Failed):
    code = "outcome_unknown"
    title = "Whether the chunk was applied is not known"
    retryable = True
    needs_position = True
    remedy = (
        "Send it again with the same position; it is applied once either way. Without one: read "
        "the stream and see where it stands."
    )


class NotDurable(Failed):
    code = "not_durable"
    title = "The chunk is not as durable as CARRY_DURABILITY asks"
    retryable = True
    needs_position = True
    remedy = (
        "Send it again with the same position; it is applied once, and waited for anew. Without "
        "one it stands as it is."
    )


class DeadlineExceeded(Failed):
    code = "deadline_exceeded"
    title = "The request's time was up before its work was done"
    retryable = True
    remedy = (
        "This request changed nothing. Send it again, with a longer Carry-Timeout or at less load."
    )


class Overloaded(Failed):
    code = "overloaded"
    title = "More is waiting than can be done in time"
    retryable = True
    remedy = "Send it again after Retry-After."


class StreamOverloaded(Overloaded):
    code = "stream_overloaded"
    title = "More chunks of the stream are waiting than can be processed in time"
    remedy = (
        "Send it again after Retry-After. A stream's chunks are applied one after another: send "
        "fewer at a time, each with more events, or use more streams."
    )


class TooManyConnections(Failed):
    code = "too_many_connections"
    title = "The worker has reached its limit of connections"
    retryable = True
    remedy = "Send it again later; keep fewer connections open, or raise CARRY_MAX_CONNECTIONS."


class ShuttingDown(Failed):
    code = "shutting_down"
    title = "The service is stopping"
    retryable = True
    remedy = "Send it again; another worker or the next start takes it."


class InternalError(Failed):
    code = "internal_error"
    title = "An unexpected failure"
    retryable = True
    needs_position = True
    remedy = "Send it again if it has a position; report the request id that is named."


def leaf_errors(root: type[CarryError] = CarryError) -> Iterator[type[CarryError]]:
    """Every error class with a code, in the order of the tree."""
    if root.code:
        yield root
    for child in root.__subclasses__():
        yield from leaf_errors(child)
