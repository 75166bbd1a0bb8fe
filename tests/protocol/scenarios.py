"""What the model explores: who sends what, and which faults may occur meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.protocol.state import ClientScript, Faults, Operation, Scenario


def _client(name: str, *operations: Operation, guard: Any = "", **options: Any) -> ClientScript:
    guarded = tuple(replace(operation, guard=guard) for operation in operations)
    return ClientScript(name, guarded, **options)


def _scenario(
    name: str, *clients: ClientScript, depth: int, replies: bool = True, **faults: int
) -> Scenario:
    """A scenario whose operations know their client and place."""
    numbered = []
    for number, client in enumerate(clients):
        operations = enumerate(client.operations)
        operations = tuple(replace(each, client=number, index=index) for index, each in operations)
        numbered.append(replace(client, operations=operations))
    return Scenario(name, tuple(numbered), Faults(**faults), depth, replies)


def _chunk(name: str, position: int | None, *events: int, **options: Any) -> Operation:
    return Operation("chunk", name, events=events, position=position, **options)


A0, A1, A2 = _chunk("a0", 0, 1), _chunk("a1", 1, 2), _chunk("a2", 2, 3)
# Two appends of the very same bytes.
B0, B1 = _chunk("b0", None, 4), _chunk("b1", None, 4)
# Another client's chunks, where a0 and a1 belong.
C0, C1 = _chunk("c0", 0, 5), _chunk("c1", 1, 5)
T0, T1 = _chunk("t0", 0, 7, stream=1), _chunk("t1", 1, 6, stream=1)
# After a0 and a1, the stream starts over.
START, AGAIN = _chunk("the start", 0, 3, starts_over=True), _chunk("again", 1, 6)
DELETION = Operation("delete", "the deletion of S")
FIRST_DELETION = replace(DELETION, name="the first deletion")
DELETION_OF_T = Operation("delete", "the deletion of T", stream=1)
RESTORE = Operation("copy", "the restore of S")
FORK = Operation("copy", "the fork to T", stream=1)

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
    _scenario(
        "late crash: bytes of a worker that died arrive after another did its work",
        _client("A", A0, A1, resends=1), _client("D", DELETION, resends=1),
        crashes=1, bytes_delayed=1, depth=12),
    _scenario(
        "late copies: restores and forks arrive late, and deletions of what they created",
        _client("A", A0, DELETION), _client("F", FORK), _client("R", RESTORE, DELETION_OF_T),
        replies_lost=1, bytes_delayed=1, depth=12),
)
# fmt: on
