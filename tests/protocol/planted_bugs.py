"""Bugs planted into the protocol, each of which the model must find.

A bug is the rules with one part replaced, and where it is in a script, the script's text with one
part replaced too: the model finds the consequences, and the server shows that the text has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from service.core.delivery import Replay, Resolution, evaluate_chunk, resolve_duplicate
from service.core.errors import CarryError, StoreUnavailable
from service.core.values import Tombstone
from service.store.base import Commit, CommitResult, Conflicted
from tests.protocol import scenarios as s
from tests.protocol.rules import Effect, Pair, Rules, commit_effect, delete_effect, stored_head
from tests.protocol.world import Faults, Scenario


class LuaChange(NamedTuple):
    """A change of a script's text: `old` occurs once and becomes `new`."""

    script: str
    old: str
    new: str


class PlantedBug(NamedTuple):
    """One bug; `violation` is part of the message that says which invariant it violates."""

    name: str
    scenario: Scenario
    rules: Rules
    violation: str
    lua: LuaChange | None = None


def _compare_positions(before: Pair, commit: Commit) -> Effect:
    stored = None if before.state is None else before.state.head.position
    expected = None if commit.expected is None else commit.expected.position
    if stored != expected:
        return Effect(before, False)
    return Effect(Pair(commit.new, commit.reply), True)


def _create_always(before: Pair, commit: Commit) -> Effect:
    if before.state is None:
        return Effect(Pair(commit.new, commit.reply), True)
    return commit_effect(before, commit)


def _write_reply_always(before: Pair, commit: Commit) -> Effect:
    after, done = commit_effect(before, commit)
    return Effect(after._replace(reply=commit.reply), done)


def _answer_any_reply(chunk: Any, first: Any, state: Any, reply: Any, own: Any) -> Resolution:
    if reply is not None and isinstance(evaluate_chunk(chunk, first), Replay):
        return Resolution.STORED_REPLY
    return resolve_duplicate(chunk, state, reply, own)


def _answer_own_reply(chunk: Any, first: Any, state: Any, reply: Any, own: Any) -> Resolution:
    if reply is None and own is not None and isinstance(evaluate_chunk(chunk, state), Replay):
        return Resolution.OWN_REPLY
    return resolve_duplicate(chunk, state, reply, own)


def _deny_unknown_outcome(stream: str) -> CarryError:
    return StoreUnavailable(f"no answer for {stream}", stream=stream)


def _trust_other_epoch(commit: Commit, conflict: Conflicted) -> CommitResult:
    head = conflict.stored
    if head is not None and commit.expected is None and head.epoch != commit.new.head.epoch:
        return conflict
    return Rules().resolve_retried_commit(commit, conflict)


def _delete_anything(before: Pair, expected: bytes, tombstone: Tombstone) -> Effect:
    if expected and not stored_head(before):
        return Effect(before, False)
    return Effect(Pair(tombstone, None), True)


def _leave_nothing(before: Pair, expected: bytes, tombstone: Tombstone) -> Effect:
    after, done = delete_effect(before, expected, tombstone)
    return Effect(Pair(None, None) if done else after, done)


PLANTED_BUGS = (
    PlantedBug(
        "compare-and-set on the position alone", s.EXPIRED, Rules(commit_effect=_compare_positions),
        "is in a state of the events",
        # the stream's position, against the start of the chunk that is written
        LuaChange("commit", "string.sub(header, 33, 56) ~= expected",
                  "string.sub(header, 57, 64) ~= string.sub(state, 65, 72)"),
    ),
    PlantedBug(
        "equal appends share a tag", s.RACE, Rules(nonce=lambda *job: b""), "is acknowledged",
    ),
    PlantedBug(
        "a rejection answered from the cache", s.EXPIRED, Rules(reject_from_cache=True),
        "says that S is at",
    ),
    PlantedBug(
        "a commit that creates an expired stream", s.EXPIRED, Rules(commit_effect=_create_always),
        "brought it back", LuaChange("commit", "if expected ~= '' then", "if false then"),
    ),
    PlantedBug(
        "the loser of a race writes its reply", s.RACE, Rules(commit_effect=_write_reply_always),
        "is another commit's",
        LuaChange("commit", "elseif expected == ''", "elseif redis.call("
                  "'SET', reply_key, reply, 'PX', reply_ms) and expected == ''"),
    ),
    PlantedBug(
        "a replay answered with the reply of another head", s.RETRIES,
        Rules(resolve_duplicate=_answer_any_reply), "with the reply of another commit",
    ),
    PlantedBug(
        "a worker's own answer for the same chunk of another epoch", s.DUPLICATES,
        Rules(resolve_duplicate=_answer_own_reply), "with the reply of another commit",
    ),
    PlantedBug(
        "an unknown outcome reported as not applied", s.RETRIES,
        Rules(unanswered=_deny_unknown_outcome), "and it is applied",
    ),
    PlantedBug(
        "a cached state answered before its commit is known", s.RETRIES, Rules(answer_early=True),
        "is not in the history",
    ),
    PlantedBug(
        "a lost answer mistaken for a conflict", s.RACE,
        Rules(resolve_retried_commit=lambda commit, conflict: conflict), "twice",
    ),
    PlantedBug(
        "another epoch mistaken for proof that nothing was written",
        replace(s.RESTORED, faults=Faults(replies_lost=1)),
        Rules(resolve_retried_commit=_trust_other_epoch), "twice",
    ),
    PlantedBug(
        "a deletion whose answer was lost reported as rejected", s.ERASED,
        Rules(resolve_retried_deletion=lambda key, expected, conflict: conflict),
        "and it is applied",
    ),
    PlantedBug(
        "a deletion that ignores what it expects", s.LATE, Rules(delete_effect=_delete_anything),
        "was answered, and is executed now",
        LuaChange("delete", "if head ~= '' and (", "if false and ("),
    ),
    PlantedBug(
        "a deletion without a tombstone", s.LATE, Rules(delete_effect=_leave_nothing),
        "was deleted after",
        LuaChange("delete", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])", ""),
    ),
    PlantedBug(
        "two deletions leave the same tombstone", s.LATE,
        Rules(tombstone_epoch=lambda *attempt: b"deletion"), "was deleted after",
    ),
    PlantedBug(
        "a commit repeated without the abandoned one before it", s.LATE_BEHIND,
        Rules(forget_abandoned=True), "was answered that nothing was applied",
    ),
)  # fmt: skip
