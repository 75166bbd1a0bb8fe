"""What the model explores: who sends what, which faults may occur meanwhile, and planted bugs.

A bug is the rules with one part replaced, and where it is in a script, the script's text with one
part replaced too: the model finds the consequences, and the server shows that the text has them.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from service.core.delivery import Process, Replay, Resolution, evaluate_chunk, resolve_duplicate
from service.core.errors import StoreUnavailable
from service.store.base import CommitResult
from tests.protocol import histories
from tests.protocol.model import Effect, Rules, ScriptCall, compare_and_set, reject, write
from tests.protocol.state import ClientScript, Faults, Keys, Operation, Route, Scenario


def _client(name: str, *operations: Operation, guard: Any = "", **options: Any) -> ClientScript:
    guarded = tuple(replace(operation, guard=guard) for operation in operations)
    return ClientScript(name, guarded, **options)


def _scenario(
    name: str,
    *clients: ClientScript,
    depth: int,
    replies: bool = True,
    routes: tuple[Route, ...] = (Route(),),
    max_events: int = 1,
    **faults: int,
) -> Scenario:
    """A scenario whose operations know their client and place."""
    numbered = []
    for number, client in enumerate(clients):
        operations = enumerate(client.operations)
        operations = tuple(replace(each, client=number, index=index) for index, each in operations)
        numbered.append(replace(client, operations=operations))
    return Scenario(
        name,
        tuple(numbered),
        Faults(**faults),
        depth,
        replies,
        routes=routes,
        max_events=max_events,
    )


def _chunk(name: str, position: int | None, *events: int, **options: Any) -> Operation:
    return Operation("chunk", name, events=events, position=position, **options)


A0, A1, A2 = _chunk("a0", 0, 1), _chunk("a1", 1, 2), _chunk("a2", 2, 3)
# Two appends of the very same bytes.
B0, B1 = _chunk("b0", None, 4), _chunk("b1", None, 4)
APPENDS = tuple(_chunk(f"append {event}", None, event) for event in (2, 3, 4, 5))
# Another client's chunks, where a0 and a1 belong.
C0, C1 = _chunk("c0", 0, 5), _chunk("c1", 1, 5)
T0, T1 = _chunk("t0", 0, 7, stream=1), _chunk("t1", 1, 6, stream=1)
# After a0 and a1, the stream starts over.
START, AGAIN = _chunk("the start", 0, 3, starts_over=True), _chunk("again", 1, 6)
RESTART = _chunk("the restart", None, 3, starts_over=True)
DELETION = Operation("delete", "the deletion of S")
FIRST_DELETION = replace(DELETION, name="the first deletion")
DELETION_OF_T = Operation("delete", "the deletion of T", stream=1)
RESTORE = Operation("copy", "the restore of S")
ACKNOWLEDGE = replace(RESTORE, name="the acknowledgement of S", acknowledges=True)
REWIND = Operation("rewind", "the rewind of S", position=1)
REWIND_TO_START = replace(REWIND, name="the rewind of S to its start", position=0)
SHADOW = Operation("shadow", "the shadow of S")
FORK = Operation("copy", "the fork to T", stream=1)
# Model 1 is promoted, and rolled back.
PROMOTION = Route(0, has_history=True), Route(1, has_history=True)
ROLLBACK = (*PROMOTION, PROMOTION[0])
# Histories are maintained no more.
WITHOUT = Route(0, has_history=True), Route(0, has_history=False)

# fmt: off
SCENARIOS = (
    RETRIES := _scenario(
        "retries: two chunks in flight at once, each repeated to either worker",
        _client("A", A0, A1, window=2, resends=2, alone=True),
        replies_lost=1, timeouts=1, replies_expired=1, depth=13),
    RACE := _scenario(
        "race: positions against two equal appends",
        _client("A", A0, A1, resends=1), _client("B", B0, B1, window=2),
        replies_lost=1, depth=25),
    _scenario(
        "rivals: two clients claim the same position; replies are lost and not stored",
        _client("A", A0, A1, resends=1), _client("C", C1, resends=1),
        replies_lost=1, timeouts=1, replies=False, depth=14),
    _scenario(
        "rollback: one client, both workers cache newer states",
        _client("A", A0, A1, A2, resends=2, alone=True),
        rollbacks=1, replies_lost=1, depth=25),
    _scenario(
        "diverged: after a rollback others continue the stream; A sends If-Match",
        _client("A", A0, A1, A2, guard="if-match", resends=1), _client("C", C1),
        rollbacks=1, depth=25),
    EXPIRED := _scenario(
        "expired: streams and replies expire or are deleted under running chunks",
        _client("A", A0, A1, window=2, resends=1), _client("B", B0), _client("D", DELETION),
        streams_expired=1, replies_expired=1, depth=10),
    RESTORED := _scenario(
        "restored: a state is read and written back under If-Match; A names its epoch",
        _client("A", A0, A1, guard="epoch", resends=1),
        _client("B", B0), _client("R", RESTORE),
        replies_lost=1, timeouts=1, depth=10),
    ACKNOWLEDGED := _scenario(
        "acknowledged: an alarm is acknowledged between chunks; A sends If-Match",
        _client("A", A0, A1, A2, guard="if-match", resends=1), _client("R", ACKNOWLEDGE),
        _client("B", B0),
        replies_lost=1, timeouts=1, depth=10),
    _scenario(
        "forked: T begins as a copy of S, or by itself, and both go on",
        _client("A", A0, A1, resends=1, alone=True), _client("F", FORK), _client("T", T0, T1),
        replies_lost=1, depth=11),
    _scenario(
        "crashes: a worker dies with chunks in flight",
        _client("A", A0, A1, window=2, resends=2), _client("B", B0),
        crashes=1, replies_expired=1, depth=10),
    ERASED := _scenario(
        "erased: a deletion under If-Match loses its answer while others create the stream again",
        _client("A", A0, resends=1), _client("D", DELETION, guard="if-match"),
        _client("B", B0),
        replies_lost=1, timeouts=1, depth=13),
    DUPLICATES := _scenario(
        "duplicates: resends at both workers, no stored reply, and a rollback",
        _client("A", A0, A1, resends=4),
        rollbacks=1, replies=False, depth=25),
    LATE := _scenario(
        "late: bytes of an abandoned connection arrive after S was deleted and created again",
        _client("A", FIRST_DELETION, A0, DELETION, C0, resends=1),
        replies_lost=1, timeouts=1, streams_expired=1, bytes_delayed=1, depth=30),
    LATE_BEHIND := _scenario(
        "late behind: bytes arrive late of a chunk that was sent behind an abandoned one",
        _client("A", A0, A1, window=2, resends=1, alone=True),
        replies_lost=1, timeouts=1, bytes_delayed=1, depth=30),
    _scenario(
        "late rivals: others delete the stream and create it again",
        _client("A", A0, A1, resends=1), _client("D", DELETION, C0),
        replies_lost=1, timeouts=1, bytes_delayed=1, depth=11),
    STARTED := _scenario(
        "started: a start names the epoch that it ends, and its duplicates arrive late",
        _client("A", A0, START, AGAIN, guard="epoch", window=2, resends=1, alone=True),
        replies_lost=1, timeouts=1, depth=20),
    _scenario(
        "started blindly: a start without an epoch meets the chunks of others",
        _client("A", START, AGAIN, resends=1), _client("B", B0),
        replies_lost=1, timeouts=1, depth=12),
    RESTARTED := _scenario(
        "restarted: starts without a position, never loaded first, meet other chunks of S",
        _client("A", A0, RESTART, AGAIN, resends=1, alone=True), _client("D", DELETION),
        replies_lost=1, timeouts=1, bytes_delayed=1, depth=11),
    _scenario(
        "late crash: bytes of a worker that died arrive after another did its work",
        _client("A", A0, A1, resends=1), _client("D", DELETION, resends=1),
        crashes=1, bytes_delayed=1, depth=12),
    _scenario(
        "late copies: restores and forks arrive late, and deletions of what they created",
        _client("A", A0, DELETION), _client("F", FORK), _client("R", RESTORE, DELETION_OF_T),
        replies_lost=1, bytes_delayed=1, depth=12),
    PROMOTED := _scenario(
        "promoted: the workers notice a promotion and its rollback at different times",
        _client("A", A0, A1, A2, resends=1, alone=True),
        routes=ROLLBACK, replies_lost=1, depth=13),
    SHADOWED := _scenario(
        "shadowed: version states are written late, while the store is rolled back",
        _client("A", A0, *APPENDS), _client("V", SHADOW),
        routes=PROMOTION, max_events=2, rollbacks=1, depth=14),
    REWOUND := _scenario(
        "rewound: a rewind races chunks, retries and lost replies",
        _client("A", A0, A1, A2, guard="epoch", resends=1), _client("R", REWIND),
        _client("B", B0),
        routes=PROMOTION[:1], max_events=2, replies_lost=1, timeouts=1, depth=9),
    REWOUND_MODELS := _scenario(
        "rewound models: a rewind races the shadow and the promotion of its model",
        _client("A", *APPENDS[:3]), _client("R", REWIND_TO_START), _client("V", SHADOW),
        routes=PROMOTION, max_events=2, replies_lost=1, depth=10),
    UNMAINTAINED := _scenario(
        "unmaintained: keys of the history are evicted, or a worker maintains none",
        _client("A", A0, A1, A2), _client("R", REWIND),
        routes=WITHOUT, max_events=3, histories_expired=1, depth=25),
)
# fmt: on


class PlantedBug(NamedTuple):
    """One bug of the rules, and of the text of a script, where `old` occurs once."""

    name: str
    scenario: Scenario
    rules: Rules
    violation: str  # part of the message that says which invariant is violated
    lua: tuple[str, str, str] | None = None  # script, old and new text


def _compare_positions(scenario: Scenario, call: ScriptCall) -> Effect:
    stored, expected = call.stored.state.stored, call.expected.stored
    is_equal = (stored and stored.head.position) == (expected and expected.head.position)
    return write(scenario, call) if is_equal else reject(scenario, call)


def _create_always(scenario: Scenario, call: ScriptCall) -> Effect:
    return compare_and_set(scenario, call) if call.stored.state else write(scenario, call)


def _write_reply_always(scenario: Scenario, call: ScriptCall) -> Effect:
    after, done = compare_and_set(scenario, call)
    return Effect(after._replace(reply=call.new.reply), done)


def _delete_anything(scenario: Scenario, call: ScriptCall) -> Effect:
    return (
        write(scenario, call) if call.stored.state or not call.expected else reject(scenario, call)
    )


def _leave_nothing(scenario: Scenario, call: ScriptCall) -> Effect:
    return compare_and_set(scenario, call._replace(new=Keys()))


def _answer_any_reply(chunk: Any, state: Any, reply: Any, own: Any) -> Resolution:
    return Resolution.STORED_REPLY if reply else resolve_duplicate(chunk, state, reply, own)


def _answer_own_reply(chunk: Any, state: Any, reply: Any, own: Any) -> Resolution:
    if reply is None and own is not None and isinstance(evaluate_chunk(chunk, state), Replay):
        return Resolution.OWN_REPLY
    return resolve_duplicate(chunk, state, reply, own)


def _trust_other_epoch(key: Any, expected: Any, new: Any, conflict: Any) -> CommitResult:
    if conflict.stored and expected is None and conflict.stored.epoch != new.epoch:
        return conflict
    return Rules().resolve_retried_commit(key, expected, new, conflict)


def _ignore_epoch(chunk: Any, stored: Any) -> Process | Replay:
    return evaluate_chunk(
        msgspec.structs.replace(chunk, epoch=None) if chunk.starts_over else chunk, stored
    )


def _start_always(chunk: Any, stored: Any) -> Process | Replay:
    return Process(None) if chunk.starts_over else evaluate_chunk(chunk, stored)


def _put_any_state(scenario: Scenario, call: ScriptCall) -> Effect:
    new, stored = call.new.state, call.stored
    history = histories.put_state(stored, new) if histories.is_in_epoch(stored, new) else None
    if history is None:
        return reject(scenario, call)
    return Effect(stored._replace(history=history), True)


def _continue_any_history(scenario: Scenario, call: ScriptCall) -> Effect:
    stored, head = call.stored, call.stored.history.head
    if call.entry is not None and head:
        head = stored.state.compared
        call = call._replace(stored=stored._replace(history=stored.history._replace(head=head)))
    effect = compare_and_set(scenario, call)
    return effect if effect.done else Effect(stored, False)


def _add_entry_always(scenario: Scenario, call: ScriptCall) -> Effect:
    after, done = compare_and_set(scenario, call)
    if call.entry is not None and not done:
        entries = (*after.history.entries, call.entry)
        after = after._replace(history=after.history._replace(entries=entries))
    return Effect(after, done)


def _use_state_behind(stored: histories.HistoryRead, artifact: int) -> histories.Computed:
    state = stored.version_state
    return (float(state.value), state.since) if state else histories.state_of(stored, artifact)


# fmt: off
PLANTED_BUGS = (
    PlantedBug(
        "compare-and-set on the position alone", EXPIRED,
        Rules(commit_effect=_compare_positions), ", and replaces ",
        # the stream's position, against the start of the chunk that is written
        ("commit", "string.sub(header, 33, 56) ~= expected",
         "string.sub(header, 57, 64) ~= string.sub(state, 65, 72)")),
    PlantedBug(
        "equal appends share a tag", RACE,
        Rules(append_nonce=lambda request: b""), "is acknowledged"),
    PlantedBug(
        "a rejection answered from the cache", EXPIRED,
        Rules(reject_from_cache=True), " says "),
    PlantedBug(
        "a commit that creates an expired stream", EXPIRED,
        Rules(commit_effect=_create_always), "brought back",
        ("commit", "if expected ~= '' then", "if false then")),
    PlantedBug(
        "the loser of a race writes its reply", RACE,
        Rules(commit_effect=_write_reply_always), "is another commit's",
        ("commit", "elseif expected == ''", "elseif redis.call("
         "'SET', reply_key, reply, 'PX', reply_ms) and expected == ''")),
    PlantedBug(
        "a replay answered with the reply of another head", RETRIES,
        Rules(resolve_duplicate=_answer_any_reply), "with the reply of another commit"),
    PlantedBug(
        "a worker's own answer for the same chunk of another epoch", DUPLICATES,
        Rules(resolve_duplicate=_answer_own_reply), "with the reply of another commit"),
    PlantedBug(
        "an unknown outcome reported as not applied", RETRIES,
        Rules(outcome_unknown=StoreUnavailable), "and it is applied"),
    PlantedBug(
        "a cached state answered before its commit is known", RETRIES,
        Rules(answer_early=True), "is not in the history"),
    PlantedBug(
        "a lost answer mistaken for a conflict", RACE,
        Rules(resolve_retried_commit=lambda key, expected, new, conflict: conflict), "twice"),
    PlantedBug(
        "another epoch mistaken for proof that nothing was written",
        replace(RESTORED, faults=Faults(replies_lost=1)),
        Rules(resolve_retried_commit=_trust_other_epoch), "twice"),
    PlantedBug(
        "an acknowledgement that keeps the tag", ACKNOWLEDGED,
        Rules(acknowledged_head=lambda head: head), ", and replaces "),
    PlantedBug(
        "a deletion whose answer was lost reported as rejected", ERASED,
        Rules(resolve_retried_deletion=lambda key, expected, conflict: conflict),
        "and it is applied"),
    PlantedBug(
        "a deletion that ignores what it expects", LATE,
        Rules(delete_effect=_delete_anything), "was answered, and is executed now",
        ("delete", "if head ~= '' and (", "if false and (")),
    PlantedBug(
        "a deletion without a tombstone", LATE,
        Rules(delete_effect=_leave_nothing), "deleted or rewound after",
        ("delete", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])", "")),
    PlantedBug(
        "two deletions leave the same tombstone", LATE,
        Rules(tombstone_epoch=lambda request: b"deletion"), "deleted or rewound after"),
    PlantedBug(
        "a start over that ignores the epoch it ends", STARTED,
        Rules(evaluate_chunk=_ignore_epoch), "twice"),
    PlantedBug(
        "a start over that is never a retry", STARTED,
        Rules(evaluate_chunk=_start_always), "twice"),
    PlantedBug(
        "a start over that is not loaded although it may be a retry", STARTED,
        Rules(always_starts=lambda chunk: chunk.starts_over), "twice"),
    PlantedBug(
        "a commit repeated without the abandoned one before it", LATE_BEHIND,
        Rules(forget_abandoned=True), "was answered as not applied"),
    PlantedBug(
        "a version state of a branch that a failover lost", replace(SHADOWED, depth=19),
        Rules(shadow_effect=_put_any_state), "its events lead to"),
    PlantedBug(
        "a version state used although its head is behind", PROMOTED,
        Rules(state_of=_use_state_behind), "its events lead to"),
    PlantedBug(
        "a cached state of the other model continued", PROMOTED,
        Rules(continue_any_model=True), "its events lead to"),
    PlantedBug(
        "a rewind that keeps the epoch", replace(REWOUND, faults=Faults(), depth=13),
        Rules(keep_epoch=True), "is not noticed"),
    PlantedBug(
        "the loser of a race adds its events", REWOUND,
        Rules(commit_effect=_add_entry_always), "has a gap"),
    PlantedBug(
        "a history continued that a commit did not maintain", UNMAINTAINED,
        Rules(commit_effect=_continue_any_history), "has a gap",
        ("commit_with_history", "and head and string.sub(head, 1, 24) == before", "and head")),
)
# fmt: on
