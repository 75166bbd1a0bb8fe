"""Bugs planted into the protocol, each of which the model must find.

A bug is the rules with one part replaced, and where it is in a script, the script's text with one
part replaced too: the model finds the consequences, and the server shows that the text has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from service.core.delivery import Process, Replay, Resolution, evaluate_chunk, resolve_duplicate
from service.core.errors import StoreUnavailable
from service.store.base import Commit, CommitResult, Conflicted
from tests.protocol import scenarios
from tests.protocol.model import Effect, Rules, ScriptCall, compare_and_set, reject, write
from tests.protocol.state import Faults, Keys, Scenario


class PlantedBug(NamedTuple):
    """One bug of the rules, and of the text of a script, where `old` occurs once."""

    name: str
    scenario: Scenario
    rules: Rules
    violation: str  # part of the message that says which invariant is violated
    lua: tuple[str, str, str] | None = None  # script, old and new text


def _compare_positions(call: ScriptCall) -> Effect:
    stored, expected = call.stored.state.stored, call.expected.stored
    is_equal = (stored and stored.head.position) == (expected and expected.head.position)
    return write(call) if is_equal else reject(call)


def _create_always(call: ScriptCall) -> Effect:
    return compare_and_set(call) if call.stored.state else write(call)


def _write_reply_always(call: ScriptCall) -> Effect:
    after, done = compare_and_set(call)
    return Effect(after._replace(reply=call.new.reply), done)


def _delete_anything(call: ScriptCall) -> Effect:
    return write(call) if call.stored.state or not call.expected else reject(call)


def _leave_nothing(call: ScriptCall) -> Effect:
    return compare_and_set(call._replace(new=Keys()))


def _answer_any_reply(chunk: Any, state: Any, reply: Any, own: Any) -> Resolution:
    return Resolution.STORED_REPLY if reply else resolve_duplicate(chunk, state, reply, own)


def _answer_own_reply(chunk: Any, state: Any, reply: Any, own: Any) -> Resolution:
    if reply is None and own is not None and isinstance(evaluate_chunk(chunk, state), Replay):
        return Resolution.OWN_REPLY
    return resolve_duplicate(chunk, state, reply, own)


def _trust_other_epoch(commit: Commit, conflict: Conflicted) -> CommitResult:
    head = conflict.stored
    if head is not None and commit.expected is None and head.epoch != commit.new.head.epoch:
        return conflict
    return Rules().resolve_retried_commit(commit, conflict)


def _ignore_epoch(chunk: Any, stored: Any) -> Process | Replay:
    return evaluate_chunk(chunk._replace(epoch=None) if chunk.starts_over else chunk, stored)


def _start_always(chunk: Any, stored: Any) -> Process | Replay:
    return Process(None) if chunk.starts_over else evaluate_chunk(chunk, stored)


# fmt: off
PLANTED_BUGS = (
    PlantedBug(
        "compare-and-set on the position alone", scenarios.EXPIRED,
        Rules(commit_effect=_compare_positions), ", and replaces ",
        # the stream's position, against the start of the chunk that is written
        ("commit", "string.sub(header, 33, 56) ~= expected",
         "string.sub(header, 57, 64) ~= string.sub(state, 65, 72)")),
    PlantedBug(
        "equal appends share a tag", scenarios.RACE,
        Rules(append_nonce=lambda request: b""), "is acknowledged"),
    PlantedBug(
        "a rejection answered from the cache", scenarios.EXPIRED,
        Rules(reject_from_cache=True), " says "),
    PlantedBug(
        "a commit that creates an expired stream", scenarios.EXPIRED,
        Rules(commit_effect=_create_always), "brought back",
        ("commit", "if expected ~= '' then", "if false then")),
    PlantedBug(
        "the loser of a race writes its reply", scenarios.RACE,
        Rules(commit_effect=_write_reply_always), "is another commit's",
        ("commit", "elseif expected == ''", "elseif redis.call("
         "'SET', reply_key, reply, 'PX', reply_ms) and expected == ''")),
    PlantedBug(
        "a replay answered with the reply of another head", scenarios.RETRIES,
        Rules(resolve_duplicate=_answer_any_reply), "with the reply of another commit"),
    PlantedBug(
        "a worker's own answer for the same chunk of another epoch", scenarios.DUPLICATES,
        Rules(resolve_duplicate=_answer_own_reply), "with the reply of another commit"),
    PlantedBug(
        "an unknown outcome reported as not applied", scenarios.RETRIES,
        Rules(outcome_unknown=StoreUnavailable), "and it is applied"),
    PlantedBug(
        "a cached state answered before its commit is known", scenarios.RETRIES,
        Rules(answer_early=True), "is not in the history"),
    PlantedBug(
        "a lost answer mistaken for a conflict", scenarios.RACE,
        Rules(resolve_retried_commit=lambda commit, conflict: conflict), "twice"),
    PlantedBug(
        "another epoch mistaken for proof that nothing was written",
        replace(scenarios.RESTORED, faults=Faults(replies_lost=1)),
        Rules(resolve_retried_commit=_trust_other_epoch), "twice"),
    PlantedBug(
        "a deletion whose answer was lost reported as rejected", scenarios.ERASED,
        Rules(resolve_retried_deletion=lambda key, expected, conflict: conflict),
        "and it is applied"),
    PlantedBug(
        "a deletion that ignores what it expects", scenarios.LATE,
        Rules(delete_effect=_delete_anything), "was answered, and is executed now",
        ("delete", "if head ~= '' and (", "if false and (")),
    PlantedBug(
        "a deletion without a tombstone", scenarios.LATE,
        Rules(delete_effect=_leave_nothing), "was deleted after",
        ("delete", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])", "")),
    PlantedBug(
        "two deletions leave the same tombstone", scenarios.LATE,
        Rules(tombstone_epoch=lambda request: b"deletion"), "was deleted after"),
    PlantedBug(
        "a start over that ignores the epoch it ends", scenarios.STARTED,
        Rules(evaluate_chunk=_ignore_epoch), "twice"),
    PlantedBug(
        "a start over that is never a retry", scenarios.STARTED,
        Rules(evaluate_chunk=_start_always), "twice"),
    PlantedBug(
        "a commit repeated without the abandoned one before it", scenarios.LATE_BEHIND,
        Rules(forget_abandoned=True), "was answered as not applied"),
)
# fmt: on
