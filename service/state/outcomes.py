"""What the outcome of a write says where it was repeated, lost or refused; pure but for the log."""

from __future__ import annotations

import structlog

from service.delivery import standing
from service.domain import Mark, StreamKey
from service.errors import InternalError, OutcomeUnknown, StateDamaged
from service.state.codec import CodecError, raw_mark
from service.state.connections import RETRY_AFTER_S
from service.state.protocol import COMMITTED, Commit, CommitResult, Conflicted
from service.state.request import ReplyLost

log = structlog.get_logger(__name__)


def settle(commit: Commit, result: Conflicted) -> CommitResult:
    """What the conflict of a repeated commit says about its earlier tries.

    The stream at the commit's own mark, or anywhere in an epoch that the commit itself
    began: it was written. Further on in the epoch it had, or in an epoch that somebody began
    since, perhaps from a state that the commit wrote (a restore): not known. Otherwise the
    commit is in no history of the stream as it is now, which is a conflict like any other.
    """
    found, new, before = result.found, commit.new.mark, commit.expected
    if found is None:
        return result
    if (found.epoch, found.tag) == (new.epoch, new.tag):
        return COMMITTED
    if found.epoch == new.epoch and (before is None or before.epoch != new.epoch):
        return COMMITTED
    if before is None or found.epoch != before.epoch or found.position > before.position:
        return outcome_unknown(commit.key, found, "others moved the stream on meanwhile")
    return result


def settle_deletion(key: StreamKey, expected: Mark, result: Conflicted) -> CommitResult:
    """What the conflict of a repeated deletion says about its earlier tries.

    No stream (its own tombstone, another's, or none): it is gone, whoever deleted it. Still in
    the epoch that was to be deleted, further on: nothing was deleted. In another epoch: not known,
    since the stream may have been deleted and begun again.
    """
    found = result.found
    if found is None:
        return COMMITTED
    if found.epoch == expected.epoch:
        return result
    return outcome_unknown(key, found, "others moved the stream on meanwhile")


def outcome_unknown(key: StreamKey, mark: Mark | None, reason: ReplyLost | str) -> OutcomeUnknown:
    """The answer to a write of which nobody can tell whether it was carried out."""
    return OutcomeUnknown(
        f"whether the store wrote stream {key.stream!r} is not known: {reason}",
        retry_after_s=RETRY_AFTER_S,
        **(standing(key.stream, mark) if isinstance(reason, str) else {"stream": key.stream}),
    )


def damaged(key: StreamKey, error: CodecError, value: bytes) -> StateDamaged:
    """The refusal of a stored value that is no stream's."""
    log.error("state_damaged", model=key.model, stream=key.stream, reason=str(error))
    refusal = StateDamaged(
        f"the stored state of stream {key.stream!r} is refused: {error}", stream=key.stream
    )
    refusal.mark = raw_mark(value)
    return refusal


def not_encodable(key: StreamKey, error: CodecError) -> InternalError:
    """The failure of a commit whose state has no bytes."""
    log.error("state_not_encodable", model=key.model, stream=key.stream, reason=str(error))
    return InternalError(
        f"the new state of stream {key.stream!r} cannot be stored: {error}", stream=key.stream
    )
