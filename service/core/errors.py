"""The errors of the service, in one tree.

Each class has a stable `code` and the HTTP status of its answer, says whether the same request may
be sent again (`retryable`), and what the caller can do (`remedy`). If a chunk may have been applied
(`needs_position`), only a chunk with a position may be sent again; one without would be applied
twice, so `without_position` makes its error not retryable. A rejection reports the current epoch,
position and tag of the stream, so that a client can continue without another request.

`server/errors.py` adds the errors of HTTP to the tree, and `docs/reference/errors.md` is generated
from both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from service.core.values import StreamHead


class OperatorError(Exception):
    """Base of expected errors of commands and of the start: the message is one line for people."""


class CarryError(Exception):
    """Base of every error the service raises on purpose.

    Args:
        detail: one sentence: what was expected and what came.
        facts: extension members of the problem document (`expected`, `got`, `stream`, `epoch`,
            `position`, `tag`, ...), as JSON values.

    Attributes:
        key_id: of the access key with which the request came, if the error is about it.
        is_key_proven: whether the request had its secret, so that it counts for the key.
        reason: code of why the key was rejected; for the service's log only.
    """

    code: ClassVar[str] = ""
    status: ClassVar[int]
    title: ClassVar[str] = ""
    retryable: bool = False
    key_id: str | None = None
    is_key_proven: bool = False
    reason: str | None = None
    needs_position: ClassVar[bool] = False
    remedy: ClassVar[str] = ""

    def __init__(self, detail: str, **facts: Any):
        super().__init__(detail)
        self.detail = detail
        self.facts: Mapping[str, Any] = facts

    def with_key(self, reason: str | None, key_id: str | None, *, is_proven: bool = True) -> Self:
        """Set the facts about the access key that the service logs; returns the error."""
        self.reason, self.key_id, self.is_key_proven = reason, key_id, is_proven
        return self

    def copy(self) -> Self:
        """An equal error, to be raised: a shared one would keep the traceback of each raise."""
        error = type(self)(self.detail, **self.facts)
        return error.with_key(self.reason, self.key_id, is_proven=self.is_key_proven)

    def without_position(self) -> Self:
        """The error for a chunk without a position, which must not be sent again if it may have
        been applied."""
        if not self.needs_position:
            return self
        facts = {name: fact for name, fact in self.facts.items() if name != "retry_after_s"}
        error = type(self)(
            f"{self.detail}; without a position it could be applied twice if it is sent again",
            **facts,
        )
        error.retryable = False
        error.__cause__ = self.__cause__
        return error


class BadRequest(CarryError):
    """The request is invalid: nothing was looked up and nothing changed."""

    status = 400


class MalformedBody(BadRequest):
    code = "malformed_body"
    title = "The body cannot be parsed"
    remedy = "Send one JSON or MessagePack document that matches the Content-Type."


class InvalidInput(BadRequest):
    code = "invalid_input"
    status = 422
    title = "The body, the query or a header does not fit the schema"
    remedy = "Correct the named field; GET the model for its event schema and input_features."

    def within(self, element: str) -> Self:
        """The error with its place moved into `element` of the body, such as `chunks[3]`."""
        if "at" not in self.facts:
            return self
        facts = {**self.facts, "at": f"{element}.{self.facts['at']}"}
        return type(self)(f"{element}.{self.detail}", **facts)


class ChunkTooLong(BadRequest):
    code = "chunk_too_long"
    status = 413
    title = "The chunk has too many events"
    remedy = (
        "Cut the chunk at the named limit and send the parts one after another; to a "
        "model with `chunking: per_chunk` each part is a chunk of its own."
    )


class BodyTooLarge(BadRequest):
    code = "body_too_large"
    status = 413
    title = "The body is larger than the limit"
    remedy = "Send fewer events or fewer streams in one request."


class UnsupportedMediaType(BadRequest):
    code = "unsupported_media_type"
    status = 415
    title = "The content type is not supported"
    remedy = "Send application/json or application/msgpack, not compressed."


class NotAcceptable(BadRequest):
    code = "not_acceptable"
    status = 406
    title = "None of the accepted content types is supported"
    remedy = "Accept application/json or application/msgpack."


class InvalidName(BadRequest):
    code = "invalid_name"
    title = "The name is not allowed"
    remedy = "A stream's name is 1 to 256 characters of A-Z a-z 0-9 . _ : @ -, except . and .."


class InvalidPrecondition(BadRequest):
    code = "invalid_precondition"
    title = "The If-Match header is invalid"
    remedy = 'Send the ETag of a reply unchanged, for example If-Match: "epoch-tag", or *.'


class ChunksUnsupported(BadRequest):
    code = "chunks_unsupported"
    status = 422
    title = "The model takes whole sequences only"
    remedy = "Send whole sequences to .../predict; `chunking` of the model is `whole`."


class FinalUnsupported(BadRequest):
    code = "final_unsupported"
    status = 422
    title = "The model's streams have no end"
    remedy = "Omit `final`; only the streams of a model with `blocks` can be closed."


class ForecastUnsupported(BadRequest):
    code = "forecast_unsupported"
    status = 422
    title = "The model has no decoder"
    remedy = "Use a model whose description has `forecast`; GET /v1/models/{model} shows it."


class ResetsUnsupported(BadRequest):
    code = "resets_unsupported"
    status = 422
    title = "Streams of this model cannot be reset"
    remedy = (
        "Use a separate stream for each session, and close it with `final`: a model with `blocks` "
        "computes outputs from later events, so a reset would change earlier outputs."
    )


class StateTokenInvalid(BadRequest):
    code = "state_token_invalid"
    status = 422
    title = "The state token was not issued by this service"
    remedy = (
        "Send a token exactly as it was returned; without one the sequence starts from the "
        "initial state. A store that lost its data has another key."
    )


class StateTokenOfOtherModel(BadRequest):
    code = "state_token_of_other_model"
    status = 422
    title = "The state token belongs to another model"
    remedy = "Send the token to the model that returned it."


class StateTokenOfOtherVersion(BadRequest):
    code = "state_token_of_other_version"
    status = 422
    title = "The state token belongs to another version of the model"
    remedy = "Start the sequence over, or serve the version that returned the token."


class VersionRejected(BadRequest):
    code = "version_rejected"
    status = 422
    title = "The version cannot serve the model"
    remedy = "Correct what the detail names, and load it again; nothing changed."


class VersionNotReady(BadRequest):
    code = "version_not_ready"
    status = 409
    title = "The version cannot answer the streams of the model yet"
    retryable = True
    remedy = "Wait until every process has it, or correct what the detail names and load it again."


class AccessDenied(CarryError):
    """The request has no access key that allows it: nothing was looked up and nothing changed."""

    status = 403


class Unauthenticated(AccessDenied):
    code = "unauthenticated"
    status = 401
    title = "The request has no valid access key"
    remedy = (
        "Send `Authorization: Bearer` and a key that `carry keys create` printed; it may have been "
        "revoked, or have expired."
    )


class Forbidden(AccessDenied):
    code = "forbidden"
    title = "The access key does not allow this"
    remedy = (
        "Stay within the verbs, models and names that `allowed` states, or ask for another key."
    )


class NotFound(CarryError):
    """The address does not exist."""

    status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"
    title = "No such model"
    remedy = "GET /v1/models lists the served models."


class VersionNotFound(NotFound):
    code = "version_not_found"
    title = "The model has no such version"
    remedy = "GET /v1/models/{model}/versions lists the versions; load it first."


class StreamNotFound(NotFound):
    code = "stream_not_found"
    title = "No such stream"
    remedy = "The first chunk of a stream, at position 0, creates it."


class StreamRejection(CarryError):
    """The request is valid, but conflicts with the stream's head or state; nothing changed."""

    status = 409


class EpochMismatch(StreamRejection):
    code = "epoch_mismatch"
    title = "The stream is in another epoch"
    remedy = (
        "Read the stream: it was deleted, restored, rewound, overwritten by a fork, or expired. "
        "Start over."
    )


class PositionAhead(StreamRejection):
    code = "position_ahead"
    title = "The chunk would skip events"
    remedy = "Send the events from the expected position on."


class PositionBehind(StreamRejection):
    code = "position_behind"
    title = "The chunk would repeat events"
    remedy = "Omit the events before the expected position."


class AlreadyApplied(StreamRejection):
    code = "already_applied"
    title = "The chunk was applied and its reply is no longer stored"
    remedy = "Continue from the position in the problem; the outputs of this chunk are lost."


class InputKindMismatch(StreamRejection):
    code = "input_kind_mismatch"
    title = "The stream takes the other kind of input"
    remedy = "Send `events` or `inputs`, as in the stream's first chunk."


class StreamFinal(StreamRejection):
    code = "stream_final"
    title = "The stream is closed"
    remedy = "A final chunk closed it: send later events to another stream, or delete this one."


class StateChanged(StreamRejection):
    code = "state_changed"
    status = 412
    title = "The stream head does not match If-Match"
    remedy = "Read the stream and decide again."


class StreamExists(StreamRejection):
    code = "stream_exists"
    title = "The stream exists"
    remedy = "Send If-Match with the stream's ETag to overwrite it, or delete it first."


class StateIncompatible(StreamRejection):
    code = "state_incompatible"
    title = "The state belongs to another version of the model"
    remedy = (
        "Serve the version that wrote it, or delete the stream and send it from the start; "
        "CARRY_ON_MODEL_CHANGE=reset resets such streams automatically."
    )


class PositionUnavailable(StreamRejection):
    code = "position_unavailable"
    title = "No exact state of that position is kept"
    remedy = (
        "Rewind to a position of `available`, or restore a saved state; `history` of the model "
        "decides how many events and snapshots are kept."
    )


class PreviousFailed(StreamRejection):
    code = "previous_failed"
    status = 424
    title = "An earlier item of this stream failed"
    remedy = "Correct the earlier item and send both again."


class Conflict(StreamRejection):
    code = "conflict"
    title = "Other clients kept advancing the stream"
    retryable = True
    remedy = "Send it again; one client per stream avoids this."


class ServiceFailure(CarryError):
    """The service could not process a valid request."""

    status = 500


class StateDamaged(ServiceFailure):
    """The stored bytes of a stream are not a valid state.

    Attributes:
        head: the bytes in the place of a state's head; a deletion that expects them deletes this
            value only.
    """

    code = "state_damaged"
    title = "The stored state fails its checks"
    remedy = "Restore the stream from a copy, or delete it and send it from the start."
    head: StreamHead | None = None


class NotFinite(ServiceFailure):
    code = "output_not_finite"
    title = "The network computed numbers that are not finite"
    remedy = "Check the size of the inputs, and the model; the stream has not changed."


class StoreUnavailable(ServiceFailure):
    code = "store_unavailable"
    status = 503
    title = "The state store does not answer"
    retryable = True
    remedy = "Send it again after Retry-After, with a position; nothing was applied."


class StoreRefused(ServiceFailure):
    code = "store_refused"
    status = 503
    title = "The state store rejects writes"
    retryable = True
    remedy = "Operators: check the store's memory, disk, replication and permissions."


class OutcomeUnknown(ServiceFailure):
    code = "outcome_unknown"
    status = 503
    title = "It is unknown whether the chunk was applied"
    retryable = True
    needs_position = True
    remedy = (
        "Send it again with the same position; it is applied once either way. Without a position: "
        "read the stream's position."
    )


class NotDurable(ServiceFailure):
    code = "not_durable"
    status = 503
    title = "The chunk is not yet as durable as CARRY_DURABILITY requires"
    retryable = True
    needs_position = True
    remedy = (
        "Send it again with the same position: it is applied once, and the service waits again. "
        "Without a position, do not send it again: it was applied."
    )


class DeadlineExceeded(ServiceFailure):
    code = "deadline_exceeded"
    status = 504
    title = "The deadline expired before the request was done"
    retryable = True
    remedy = (
        "This request changed nothing. Send it again, with a longer Carry-Timeout or at lower load."
    )


class InferenceTimeout(DeadlineExceeded):
    code = "inference_timeout"
    title = "An inference call took too long and was terminated"
    remedy = (
        "This request changed nothing. Send it again; if that fails too, send shorter chunks. "
        "Operators: CARRY_INFERENCE_TIMEOUT_S is the limit, CARRY_MAX_BATCH_STEPS bounds the work "
        "of a call."
    )


class Overloaded(ServiceFailure):
    code = "overloaded"
    status = 429
    title = "More work is waiting than can be done in time"
    retryable = True
    remedy = "Send it again after Retry-After."


class StreamOverloaded(Overloaded):
    code = "stream_overloaded"
    title = "More chunks of the stream are waiting than can be processed in time"
    remedy = (
        "Send it again after Retry-After. A stream's chunks are applied one after another: send "
        "fewer at a time, each with more events, or use more streams."
    )


class LimitExceeded(Overloaded):
    code = "limit_exceeded"
    title = "A limit of the access key is reached"
    remedy = "Send it again after Retry-After; `limit` and `allowed` state what the key allows."


class ShuttingDown(ServiceFailure):
    code = "shutting_down"
    status = 503
    title = "The service is stopping"
    retryable = True
    remedy = "Send it again, to another worker or after the restart."


class InternalError(ServiceFailure):
    code = "internal_error"
    title = "An unexpected failure"
    retryable = True
    needs_position = True
    remedy = "Send it again if it has a position; report the request id."


def leaf_errors(root: type[CarryError] = CarryError) -> Iterator[type[CarryError]]:
    """Every error class with a code, in the order of the tree."""
    if root.code:
        yield root
    for child in root.__subclasses__():
        yield from leaf_errors(child)
