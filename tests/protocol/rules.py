"""The decisions the model explores: the service's own functions, and the meaning of the scripts.

Everything a worker decides is decided by `service.core.delivery` and
`service.store.redis.outcomes`. The two Lua scripts are written again here, as functions of values,
and compared with the scripts on a real server (`script_comparison.py`). A planted bug is a `Rules`
with one part replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.core.delivery import (
    apply_chunk,
    evaluate_chunk,
    is_continuation,
    resolve_conflict,
    resolve_duplicate,
)
from service.core.errors import CarryError, OutcomeUnknown
from service.core.values import EPOCH_BYTES, StoredReply, StreamState, Tombstone
from service.store.base import Commit
from service.store.codec import head_bytes
from service.store.redis.outcomes import resolve_retried_commit, resolve_retried_deletion

NONCE_BYTES = 16


class Pair(NamedTuple):
    """A stream's two keys: its state, or the tombstone of a deletion, and its stored reply."""

    state: StreamState | Tombstone | None
    reply: StoredReply | None


class Effect(NamedTuple):
    """What a script did: the keys afterwards, and whether it wrote."""

    after: Pair
    done: bool


def commit_effect(before: Pair, commit: Commit) -> Effect:
    """`commit.lua`: compare epoch and tag, then write reply and state, or nothing."""
    expected = b"" if commit.expected is None else head_bytes(commit.expected)
    if stored_head(before) != expected:
        return Effect(before, False)
    return Effect(Pair(commit.new, commit.reply), True)


def delete_effect(before: Pair, expected: bytes, tombstone: Tombstone) -> Effect:
    """`delete.lua`: compare epoch and tag, or the epoch alone; then leave the tombstone."""
    head = stored_head(before)
    if bool(head) != bool(expected) or not head.startswith(expected):
        return Effect(before, False)
    return Effect(Pair(tombstone, None), True)


def stored_head(pair: Pair) -> bytes:
    """The epoch and tag that a script compares; empty where there is no value."""
    return b"" if pair.state is None else head_bytes(pair.state.head)


def tombstone_epoch(client: int, plan: int, number: int, attempt: int) -> bytes:
    """The epoch of a tombstone: another for every try of every deletion."""
    return bytes((client + 1, plan + 1, number + 1, attempt + 1)).ljust(EPOCH_BYTES, b"\x02")


def append_nonce(client: int, plan: int, number: int) -> bytes:
    """The nonce of an append: another for every one that is sent."""
    return bytes((client, plan, number)).ljust(NONCE_BYTES, b"\xaa")


def answer_from_reread(chunk: Any, first: Any, state: Any, reply: Any, own: Any) -> Any:
    """`resolve_duplicate` of what was read again; the state loaded `first` does not count."""
    return resolve_duplicate(chunk, state, reply, own)


def outcome_unknown(stream: str) -> CarryError:
    """The error for the sender of a write whose answer did not come in time."""
    return OutcomeUnknown(f"whether the store wrote stream {stream!r} is not known", stream=stream)


@dataclass(frozen=True, slots=True)
class Rules:
    """Every decision of the protocol.

    Attributes:
        reject_from_cache: whether a cached state may reject a chunk.
        forget_abandoned: whether an abandoned write is not repeated on a new connection, even
            where another was sent behind it.
        answer_early: whether a chunk is answered once it is computed from a cached state.
    """

    evaluate_chunk: Callable[..., Any] = evaluate_chunk
    is_continuation: Callable[..., bool] = is_continuation
    apply_chunk: Callable[..., StreamState] = apply_chunk
    resolve_conflict: Callable[..., Any] = resolve_conflict
    resolve_duplicate: Callable[..., Any] = answer_from_reread
    resolve_retried_commit: Callable[..., Any] = resolve_retried_commit
    resolve_retried_deletion: Callable[..., Any] = resolve_retried_deletion
    nonce: Callable[[int, int, int], bytes] = append_nonce
    commit_effect: Callable[[Pair, Commit], Effect] = commit_effect
    delete_effect: Callable[[Pair, bytes, Tombstone], Effect] = delete_effect
    tombstone_epoch: Callable[[int, int, int, int], bytes] = tombstone_epoch
    unanswered: Callable[[str], CarryError] = outcome_unknown
    reject_from_cache: bool = False
    forget_abandoned: bool = False
    answer_early: bool = False
