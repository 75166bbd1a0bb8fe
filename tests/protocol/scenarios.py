"""What the model explores: who sends what, and which faults may occur meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.protocol.world import ClientPlan, Faults, Guard, Plan, PlanKind, Scenario


def _chunk(name: str, position: int | None, *events: int, stream: int = 0) -> Plan:
    return Plan(PlanKind.CHUNK, name, stream, events, position)


def _client(name: str, *plans: Plan, guard: Guard = Guard.NONE, **options: Any) -> ClientPlan:
    guarded = tuple(replace(plan, guard=guard) if guard else plan for plan in plans)
    return ClientPlan(name, guarded, **options)


A0, A1, A2 = _chunk("a0", 0, 1), _chunk("a1", 1, 2), _chunk("a2", 2, 3)
# Two appends of the very same bytes.
B0, B1 = _chunk("b0", None, 4), _chunk("b1", None, 4)
# Another client's chunks, where a0 and a1 belong.
C0, C1 = _chunk("c0", 0, 5), _chunk("c1", 1, 5)
T0, T1 = _chunk("t0", 0, 7, stream=1), _chunk("t1", 1, 6, stream=1)
DELETION = Plan(PlanKind.DELETE, "the deletion of S")
FIRST_DELETION = replace(DELETION, name="the first deletion")
GUARDED_DELETION = replace(DELETION, guard=Guard.IF_MATCH)
DELETION_OF_T = Plan(PlanKind.DELETE, "the deletion of T", stream=1)
RESTORE = Plan(PlanKind.COPY, "the restore of S")
FORK = Plan(PlanKind.COPY, "the fork to T", stream=1)

RETRIES = Scenario(
    "retries: two chunks in flight at once, each repeated to either worker",
    (_client("A", A0, A1, window=2, resends=2, alone=True),),
    Faults(replies_lost=1, timeouts=1, replies_expired=1),
    depth=13,
)
RACE = Scenario(
    "race: positions against two equal appends",
    (_client("A", A0, A1, resends=1), _client("B", B0, B1, window=2)),
    Faults(replies_lost=1),
    depth=25,
)
RIVALS = Scenario(
    "rivals: two clients claim the same position; replies are lost and not stored",
    (_client("A", A0, A1, resends=1), _client("C", C1, resends=1)),
    Faults(replies_lost=1, timeouts=1),
    replies=False,
    depth=14,
)
ROLLBACK = Scenario(
    "rollback: one client, both workers cache newer states",
    (_client("A", A0, A1, A2, resends=2, alone=True),),
    Faults(rollbacks=1, replies_lost=1),
    depth=25,
)
DIVERGED = Scenario(
    "diverged: after a rollback others continue the stream; A sends If-Match",
    (_client("A", A0, A1, A2, guard=Guard.IF_MATCH, resends=1), _client("C", C1)),
    Faults(rollbacks=1),
    depth=25,
)
EXPIRED = Scenario(
    "expired: streams and replies expire or are deleted under running chunks",
    (_client("A", A0, A1, window=2, resends=1), _client("B", B0), _client("D", DELETION)),
    Faults(streams_expired=1, replies_expired=1),
    depth=10,
)
RESTORED = Scenario(
    "restored: a state is read and written back under If-Match; A names its epoch",
    (
        _client("A", A0, A1, guard=Guard.EPOCH, resends=1),
        _client("B", B0),
        _client("R", RESTORE),
    ),
    Faults(replies_lost=1, timeouts=1),
    depth=10,
)
FORKED = Scenario(
    "forked: T begins as a copy of S, or by itself, and both go on",
    (_client("A", A0, A1, resends=1, alone=True), _client("F", FORK), _client("T", T0, T1)),
    Faults(replies_lost=1),
    depth=11,
)
CRASHES = Scenario(
    "crashes: a worker dies with chunks in flight",
    (_client("A", A0, A1, window=2, resends=2), _client("B", B0)),
    Faults(crashes=1, replies_expired=1),
    depth=10,
)
ERASED = Scenario(
    "erased: a deletion under If-Match loses its answer while others create the stream again",
    (_client("A", A0, resends=1), _client("D", GUARDED_DELETION), _client("B", B0)),
    Faults(replies_lost=1, timeouts=1),
    depth=13,
)
DUPLICATES = Scenario(
    "duplicates: resends at both workers, no stored reply, and a rollback",
    (_client("A", A0, A1, resends=4),),
    Faults(rollbacks=1),
    replies=False,
    depth=25,
)
LATE = Scenario(
    "late: bytes of an abandoned connection arrive after S was deleted and created again",
    (_client("A", FIRST_DELETION, A0, DELETION, C0, resends=1),),
    Faults(replies_lost=1, timeouts=1, streams_expired=1, bytes_delayed=1),
    depth=30,
)
LATE_BEHIND = Scenario(
    "late behind: bytes arrive late of a chunk that was sent behind an abandoned one",
    (_client("A", A0, A1, window=2, resends=1, alone=True),),
    Faults(replies_lost=1, timeouts=1, bytes_delayed=1),
    depth=30,
)
LATE_RIVALS = Scenario(
    "late rivals: others delete the stream and create it again",
    (_client("A", A0, A1, resends=1), _client("D", DELETION, C0)),
    Faults(replies_lost=1, timeouts=1, bytes_delayed=1),
    depth=11,
)
LATE_CRASH = Scenario(
    "late crash: bytes of a worker that died arrive after another did its work",
    (_client("A", A0, A1, resends=1), _client("D", DELETION, resends=1)),
    Faults(crashes=1, bytes_delayed=1),
    depth=12,
)
LATE_COPIES = Scenario(
    "late copies: restores and forks arrive late, and deletions of what they created",
    (_client("A", A0, DELETION), _client("F", FORK), _client("R", RESTORE, DELETION_OF_T)),
    Faults(replies_lost=1, bytes_delayed=1),
    depth=12,
)
SCENARIOS = (
    *(RETRIES, RACE, RIVALS, ROLLBACK, DIVERGED, EXPIRED, RESTORED, FORKED, CRASHES, ERASED),
    *(DUPLICATES, LATE, LATE_BEHIND, LATE_RIVALS, LATE_CRASH, LATE_COPIES),
)
