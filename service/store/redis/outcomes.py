"""Outcomes of commands: replies, lost replies and errors, and what they mean for a write.

Resolves retried writes, and makes the errors of lost and rejected ones; pure except for logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from service.core.delivery import stream_facts
from service.core.errors import (
    CarryError,
    NotDurable,
    OutcomeUnknown,
    StoreRefused,
    StoreUnavailable,
)
from service.core.values import StreamHead, StreamKey
from service.store.base import COMMITTED, CommitResult, Conflicted, state_damaged_error
from service.store.layout import CodecError, StateHeader
from service.store.redis.connections import RETRY_AFTER_S, is_transient
from service.store.settings import Durability, StoreSettings

if TYPE_CHECKING:
    from service.store.redis.router import Router

WRITTEN: Final = [1]
"""What a script returns for a stream that it wrote."""

_CONCURRENT_WRITES: Final = "other writes changed the stream meanwhile"

log = structlog.get_logger(__name__)


class ReplyLost(Exception):
    """The command may have been executed: it was sent, and no reply says whether it was.

    Either no attempt was answered in time, or a later attempt was rejected, which says nothing
    about the earlier ones.
    """


class ServerReply(msgspec.Struct, frozen=True):
    """The server's reply.

    Attributes:
        value: the decoded RESP value: bytes, int, None or a list of these.
        is_retry: an earlier attempt of the same command may have been executed.
        is_durable: what the command wrote is as durable as the settings require; always True if
            they require nothing beyond the server's memory.
    """

    value: Any
    is_retry: bool
    is_durable: bool = True


Outcome = ServerReply | ReplyLost | CarryError


def read_value(outcome: Outcome) -> Any:
    """The value of a read's reply.

    Raises:
        StoreUnavailable, StoreRefused: the read has no reply.
    """
    if isinstance(outcome, ServerReply):
        return outcome.value
    if isinstance(outcome, CarryError):
        raise outcome
    cause = outcome.__cause__ or outcome
    is_unavailable = isinstance(cause, (TimeoutError, ReplyLost)) or is_transient(cause)
    raise (StoreUnavailable if is_unavailable else StoreRefused)(
        f"the store does not answer: {outcome}", retry_after_s=RETRY_AFTER_S
    ) from outcome


def resolve_retried_commit(
    key: StreamKey, expected: StreamHead | None, new: StreamHead, result: Conflicted
) -> CommitResult:
    """Resolve the conflict of a retried commit: an earlier attempt may have caused it.

    If the stream is at the commit's own head, or in an epoch that the commit created, it was
    written. If it is at a later position of its old epoch, or in a newer epoch, perhaps from a
    state that the commit wrote (a restore), the outcome is unknown. Otherwise the commit is not in
    the stream's history, and the conflict is an ordinary one.
    """
    stored = result.stored
    if stored is None:
        return result
    if (stored.epoch, stored.tag) == (new.epoch, new.tag):
        return COMMITTED
    if stored.epoch == new.epoch and (expected is None or expected.epoch != new.epoch):
        return COMMITTED
    if expected is None or stored.epoch != expected.epoch or stored.position > expected.position:
        return outcome_unknown_error(key, stored, _CONCURRENT_WRITES)
    return result


def resolve_retried_deletion(
    key: StreamKey, expected: StreamHead, result: Conflicted
) -> CommitResult:
    """Resolve the conflict of a retried deletion: an earlier attempt may have caused it.

    If there is no stream (any tombstone, or nothing), it is deleted, no matter by which command. If
    the stream is still in the expected epoch, nothing was deleted. If it is in another epoch, the
    outcome is unknown, since the stream may have been deleted and created again.
    """
    stored = result.stored
    if stored is None:
        return COMMITTED
    if stored.epoch == expected.epoch:
        return result
    return outcome_unknown_error(key, stored, _CONCURRENT_WRITES)


def outcome_unknown_error(
    key: StreamKey, head: StreamHead | None, reason: ReplyLost | str
) -> OutcomeUnknown:
    """The error for a write that may or may not have been executed."""
    return OutcomeUnknown(
        f"it is unknown whether the store wrote stream {key.stream!r}: {reason}",
        retry_after_s=RETRY_AFTER_S,
        **(stream_facts(key.stream, head) if isinstance(reason, str) else {"stream": key.stream}),
    )


def not_durable_error(settings: StoreSettings, key: StreamKey, reason: str = "") -> NotDurable:
    """The error of a write that is not confirmed to be as durable as the settings require."""
    required = f"{settings.replicas} replicas"
    if settings.durability is Durability.FSYNC:
        required = "the disk"
    return NotDurable(
        f"stream {key.stream!r} was written, but {required} did not confirm it in time"
        + (f": {reason}" if reason else ""),
        stream=key.stream,
        retry_after_s=RETRY_AFTER_S,
    )


def parse_result(router: Router, key: StreamKey, reply: list[Any]) -> CommitResult:
    """The result of one stream, as a script returned it."""
    if reply[0] == 1:
        return COMMITTED
    if reply[0] == 0:
        if len(reply) == 1:
            return Conflicted(None)
        try:
            header = StateHeader.decode(reply[1])
            return Conflicted(None if header.is_tombstone else header.head)
        except CodecError as error:
            return state_damaged_error(key, error, reply[1])
    text = reply[1].decode("utf-8", "replace")
    if text.startswith("WRONGTYPE"):
        # The value is no string. A deletion identifies it by the same bytes (`delete.lua`).
        return state_damaged_error(key, CodecError(text), bytes(32) + reply[1])
    if text.startswith("READONLY"):
        router.refresh()
    log.error("store_refused", model=key.model, stream=key.stream, reason=text)
    return StoreRefused(
        f"the store at {router.redacted_url} refused stream {key.stream!r}: {text}",
        stream=key.stream,
        retry_after_s=RETRY_AFTER_S,
    )
