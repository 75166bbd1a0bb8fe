"""Results of writes that were repeated, lost or refused; pure except for logging."""

from __future__ import annotations

import structlog

from service.core.delivery import stream_facts
from service.core.errors import InternalError, OutcomeUnknown, StateDamaged
from service.core.values import StreamHead, StreamKey
from service.store.base import COMMITTED, Commit, CommitResult, Conflicted
from service.store.codec import CodecError, raw_head
from service.store.redis.connections import RETRY_AFTER_S
from service.store.redis.store_request import ReplyLost

log = structlog.get_logger(__name__)


def resolve_repeated_commit(commit: Commit, result: Conflicted) -> CommitResult:
    """Resolve the conflict of a repeated commit: an earlier attempt may have caused it.

    If the stream is at the commit's own head, or in an epoch that the commit began, it was
    written. If it is further on in its old epoch, or in an epoch that began since, perhaps from a
    state that the commit wrote (a restore), the outcome is unknown. Otherwise the commit is not in
    the stream's history, and the conflict is an ordinary one.
    """
    found, new, before = result.found, commit.new.head, commit.expected
    if found is None:
        return result
    if (found.epoch, found.tag) == (new.epoch, new.tag):
        return COMMITTED
    if found.epoch == new.epoch and (before is None or before.epoch != new.epoch):
        return COMMITTED
    if before is None or found.epoch != before.epoch or found.position > before.position:
        return outcome_unknown(commit.key, found, "others moved the stream on meanwhile")
    return result


def resolve_repeated_deletion(
    key: StreamKey, expected: StreamHead, result: Conflicted
) -> CommitResult:
    """Resolve the conflict of a repeated deletion: an earlier attempt may have caused it.

    If there is no stream (any tombstone, or nothing), it is deleted, by whomever. If the stream is
    still in the expected epoch, nothing was deleted. If it is in another epoch, the outcome is
    unknown, since the stream may have been deleted and created again.
    """
    found = result.found
    if found is None:
        return COMMITTED
    if found.epoch == expected.epoch:
        return result
    return outcome_unknown(key, found, "others moved the stream on meanwhile")


def outcome_unknown(
    key: StreamKey, head: StreamHead | None, reason: ReplyLost | str
) -> OutcomeUnknown:
    """The error for a write that may or may not have been carried out."""
    return OutcomeUnknown(
        f"whether the store wrote stream {key.stream!r} is not known: {reason}",
        retry_after_s=RETRY_AFTER_S,
        **(stream_facts(key.stream, head) if isinstance(reason, str) else {"stream": key.stream}),
    )


def damaged(key: StreamKey, error: CodecError, value: bytes) -> StateDamaged:
    """The error for stored bytes that are not a valid state."""
    log.error("state_damaged", model=key.model, stream=key.stream, reason=str(error))
    refusal = StateDamaged(
        f"the stored state of stream {key.stream!r} is refused: {error}", stream=key.stream
    )
    refusal.head = raw_head(value)
    return refusal


def not_encodable(key: StreamKey, error: CodecError) -> InternalError:
    """The error for a state that cannot be encoded."""
    log.error("state_not_encodable", model=key.model, stream=key.stream, reason=str(error))
    return InternalError(
        f"the new state of stream {key.stream!r} cannot be stored: {error}", stream=key.stream
    )
