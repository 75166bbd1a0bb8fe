"""Bugs planted into the protocol, each of which the model must find.

A bug is the rules with one part replaced, and where it lies in a script, the script's text with
one part replaced too: the model finds what becomes of it, and the server shows that the text
really does so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.core.delivery import Replay, Resolution, evaluate_chunk, resolve_duplicate
from service.core.errors import CarryError, StoreUnavailable
from service.core.values import Chunk, StoredReply, StreamHead, StreamKey, StreamState, Tombstone
from service.store.base import Commit, CommitResult, Conflicted
from tests.protocol.rules import Effect, Pair, Rules, commit_effect, delete_effect, stored_head
from tests.protocol.scenarios import (
    AGAIN,
    ERASED,
    FORGOTTEN,
    LATE,
    LATE_BEHIND,
    RACE,
    RESTORED,
    RETRIES,
)
from tests.protocol.world import Faults, Scenario


@dataclass(frozen=True, slots=True)
class Lua:
    """A change of a script's text: `old` occurs once and becomes `new`."""

    script: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Planted:
    """One bug.

    Attributes:
        told: part of the sentence that says which promise it breaks.
    """

    name: str
    scenario: Scenario
    rules: Rules
    told: str
    lua: Lua | None = None


def _by_position(before: Pair, commit: Commit) -> Effect:
    state, expected = before.state, commit.expected
    if (state is None) != (expected is None):
        return Effect(before, False)
    if state is not None and expected and state.head.position != expected.position:
        return Effect(before, False)
    return Effect(Pair(commit.new, commit.reply), True)


def _creating(before: Pair, commit: Commit) -> Effect:
    if before.state is None:
        return Effect(Pair(commit.new, commit.reply), True)
    return commit_effect(before, commit)


def _reply_anyway(before: Pair, commit: Commit) -> Effect:
    after, done = commit_effect(before, commit)
    return Effect(after._replace(reply=commit.reply), done)


def _no_nonce(client: int, plan: int, number: int) -> bytes:
    return b""


def _any_reply(
    chunk: Chunk,
    first: StreamState | None,
    found: StreamState | None,
    kept: StoredReply | None,
    own: StreamHead | None,
) -> Resolution:
    if kept is not None and isinstance(evaluate_chunk(chunk, first), Replay):
        return Resolution.STORED_REPLY
    return resolve_duplicate(chunk, found, kept, own)


def _own_anyway(
    chunk: Chunk,
    first: StreamState | None,
    found: StreamState | None,
    kept: StoredReply | None,
    own: StreamHead | None,
) -> Resolution:
    if kept is None and own is not None and isinstance(evaluate_chunk(chunk, found), Replay):
        return Resolution.OWN_REPLY
    return resolve_duplicate(chunk, found, kept, own)


def _not_sent(stream: str) -> CarryError:
    return StoreUnavailable(f"no answer for {stream}", stream=stream)


def _as_found(commit: Commit, result: Conflicted) -> CommitResult:
    return result


def _other_epoch(commit: Commit, result: Conflicted) -> CommitResult:
    found = result.found
    if found is not None and commit.expected is None and found.epoch != commit.new.head.epoch:
        return result
    return Rules().resolve_retried_commit(commit, result)


def _as_deleted(key: StreamKey, expected: StreamHead, result: Conflicted) -> CommitResult:
    return result


def _anything(before: Pair, expected: bytes, tombstone: Tombstone) -> Effect:
    if expected and not stored_head(before):
        return Effect(before, False)
    return Effect(Pair(tombstone, None), True)


def _nothing_left(before: Pair, expected: bytes, tombstone: Tombstone) -> Effect:
    after, done = delete_effect(before, expected, tombstone)
    return Effect(Pair(None, None) if done else after, done)


def _one_epoch(client: int, plan: int, number: int, attempt: int) -> bytes:
    return b"deletion"


PLANTED = (
    Planted(
        "compare-and-set on the position alone",
        FORGOTTEN,
        Rules(commit_effect=_by_position),
        "is in a state of the events",
        Lua(
            "commit",
            "string.sub(header, 33, 56) ~= expected",
            # where it stands, against the start of the chunk that is written
            "string.sub(header, 57, 64) ~= string.sub(state, 65, 72)",
        ),
    ),
    Planted("equal appends share a tag", RACE, Rules(nonce=_no_nonce), "is acknowledged"),
    Planted(
        "a refusal answered from the cache",
        FORGOTTEN,
        Rules(refuse_from_cache=True),
        "says that S stands at",
    ),
    Planted(
        "a commit that creates an expired stream",
        FORGOTTEN,
        Rules(commit_effect=_creating),
        "brought it back",
        Lua("commit", "if expected ~= '' then", "if false then"),
    ),
    Planted(
        "the loser of a race writes its reply",
        RACE,
        Rules(commit_effect=_reply_anyway),
        "is another commit's",
        Lua(
            "commit",
            "elseif expected == ''",
            "elseif redis.call('SET', reply_key, reply, 'PX', reply_ms) and expected == ''",
        ),
    ),
    Planted(
        "a replay answered from a reply whose head is another",
        RETRIES,
        Rules(resolve_duplicate=_any_reply),
        "with the reply of another commit",
    ),
    Planted(
        "a worker's own answer given for the same chunk of another epoch",
        AGAIN,
        Rules(resolve_duplicate=_own_anyway),
        "with the reply of another commit",
    ),
    Planted(
        "an unknown outcome told as not applied",
        RETRIES,
        Rules(unanswered=_not_sent),
        "and it is applied",
    ),
    Planted(
        "a state in memory answered before its commit is known",
        RETRIES,
        Rules(answer_early=True),
        "is not in the history",
    ),
    Planted(
        "a lost answer taken for a conflict",
        RACE,
        Rules(resolve_retried_commit=_as_found),
        "twice",
    ),
    Planted(
        "another epoch taken for proof that nothing was written",
        replace(RESTORED, faults=Faults(replies_lost=1)),
        Rules(resolve_retried_commit=_other_epoch),
        "twice",
    ),
    Planted(
        "a deletion whose answer was lost told as refused",
        ERASED,
        Rules(resolve_retried_deletion=_as_deleted),
        "and it is applied",
    ),
    Planted(
        "a deletion that deletes whatever there is",
        LATE,
        Rules(delete_effect=_anything),
        "was answered, and is carried out now",
        Lua("delete", "if head ~= '' and (", "if false and ("),
    ),
    Planted(
        "a deletion that leaves nothing behind",
        LATE,
        Rules(delete_effect=_nothing_left),
        "was deleted after",
        Lua("delete", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])", ""),
    ),
    Planted(
        "two deletions leave the same tombstone",
        LATE,
        Rules(tombstone_epoch=_one_epoch),
        "was deleted after",
    ),
    Planted(
        "a commit sent again without the abandoned one before it",
        LATE_BEHIND,
        Rules(forget_abandoned=True),
        "was told that nothing was applied",
    ),
)
