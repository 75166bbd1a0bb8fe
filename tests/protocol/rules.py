"""The transition functions the model walks through: the service's own, and the scripts' meaning.

Everything a worker decides is decided by `service.delivery` and `service.state.redis_store.settle`;
what the two Lua scripts do is said once more here, as functions of names, and is held against
the scripts on a real server (`against.py`). A planted bug is a `Rules` with one part replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from service.delivery import (
    Answer,
    Process,
    Replay,
    advance,
    after_conflict,
    answer_retry,
    continues,
    judge,
)
from service.domain import Chunk, Mark, StoredReply, StreamKey, StreamState
from service.errors import CarryError, OutcomeUnknown
from service.state.codec import mark_bytes
from service.state.protocol import Commit, CommitResult, Conflicted
from service.state.redis_store import settle, settle_deletion

NONCE_BYTES = 16


class Pair(NamedTuple):
    """A stream's two keys: its state and its kept reply."""

    state: StreamState | None
    reply: StoredReply | None


class Effect(NamedTuple):
    """What a script did: the keys afterwards, and whether it wrote."""

    after: Pair
    done: bool


def commit_effect(before: Pair, commit: Commit) -> Effect:
    """`commit.lua`: compare epoch and tag, then write reply and state, or nothing."""
    state, expected = before.state, commit.expected
    if state is None:
        if expected is not None:
            return Effect(before, False)
    elif expected is None or mark_bytes(state.mark) != mark_bytes(expected):
        return Effect(before, False)
    return Effect(Pair(commit.new, commit.reply), True)


def delete_effect(before: Pair, expected: Mark | None) -> Effect:
    """`delete.lua`: compare if asked to, then remove both keys; without a state, the reply."""
    state = before.state
    if state is None:
        return Effect(Pair(None, None), False)
    if expected is not None and mark_bytes(state.mark) != mark_bytes(expected):
        return Effect(before, False)
    return Effect(Pair(None, None), True)


def nonce(client: int, plan: int, number: int) -> bytes:
    """The nonce of an append: another for every one that is sent."""
    return bytes((client, plan, number)).ljust(NONCE_BYTES, b"\xaa")


def answer_as_read(
    chunk: Chunk,
    first: StreamState | None,
    found: StreamState | None,
    kept: StoredReply | None,
    own: Mark | None,
) -> Answer:
    """The service's `answer_retry`; what was loaded `first` is not looked at again."""
    return answer_retry(chunk, found, kept, own)


def unknown(stream: str) -> CarryError:
    """What the sender of a commit is told whose answer did not come in time."""
    return OutcomeUnknown(f"whether the store wrote stream {stream!r} is not known", stream=stream)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is decided where.

    Attributes:
        refuse_from_cache: whether a copy in memory may refuse a chunk.
        answer_early: whether a chunk is answered once it is computed from a state in memory.
    """

    judge: Callable[[Chunk, StreamState | None], Process | Replay] = judge
    continues: Callable[[Chunk, StreamState], bool] = continues
    advance: Callable[..., StreamState] = advance
    after_conflict: Callable[[Chunk, Mark, Mark | None], Answer] = after_conflict
    answer_retry: Callable[..., Answer] = answer_as_read
    settle: Callable[[Commit, Conflicted], CommitResult] = settle
    settle_deletion: Callable[[StreamKey, Conflicted], CommitResult] = settle_deletion
    nonce: Callable[[int, int, int], bytes] = nonce
    commit_effect: Callable[[Pair, Commit], Effect] = commit_effect
    delete_effect: Callable[[Pair, Mark | None], Effect] = delete_effect
    unanswered: Callable[[str], CarryError] = unknown
    refuse_from_cache: bool = False
    answer_early: bool = False
