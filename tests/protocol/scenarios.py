"""What the model explores: who sends what, and what may go wrong meanwhile."""

from __future__ import annotations

from dataclasses import replace

from tests.protocol.world import (
    BeginPlan,
    ChunkPlan,
    ClientPlan,
    DeletePlan,
    Faults,
    Guard,
    Scenario,
)

A0 = ChunkPlan("a0", (1,), 0)
A1 = ChunkPlan("a1", (2,), 1)
A2 = ChunkPlan("a2", (3,), 2)
# Two appends of the very same bytes.
B0 = ChunkPlan("b0", (4,), None)
B1 = ChunkPlan("b1", (4,), None)
# Another client's chunk where a1 belongs, and one of two events over both a1 and a2.
C1 = ChunkPlan("c1", (5,), 1)
C12 = ChunkPlan("c12", (5, 6), 1)
T0 = ChunkPlan("t0", (7,), 0, stream=1)
T1 = ChunkPlan("t1", (6,), 1, stream=1)


def _guarded(guard: Guard, *plans: ChunkPlan) -> tuple[ChunkPlan, ...]:
    return tuple(replace(plan, guard=guard) for plan in plans)


RETRIES = Scenario(
    "retries: two chunks under way at once, each sent again to either worker",
    (ClientPlan("A", (A0, A1), window=2, resends=2, alone=True),),
    Faults(replies_lost=1, timeouts=1, replies_expired=1),
    depth=13,
)
RACE = Scenario(
    "race: positions against two equal appends",
    (ClientPlan("A", (A0, A1), resends=1), ClientPlan("B", (B0, B1), window=2)),
    Faults(replies_lost=1),
    depth=25,
)
RIVALS = Scenario(
    "rivals: two clients claim the same position; replies are lost and not kept",
    (ClientPlan("A", (A0, A1), resends=1), ClientPlan("C", (C1,), resends=1)),
    Faults(replies_lost=1, timeouts=1),
    replies=False,
    depth=14,
)
ROLLBACK = Scenario(
    "rollback: one client, both workers hold newer states",
    (ClientPlan("A", (A0, A1, A2), resends=2, alone=True),),
    Faults(rollbacks=1, replies_lost=1),
    depth=25,
)
MOVED_ON = Scenario(
    "moved on: after a rollback others move the stream on; A sends If-Match",
    (
        ClientPlan("A", _guarded(Guard.IF_MATCH, A0, A1, A2), resends=1),
        ClientPlan("C", (C1,)),
    ),
    Faults(rollbacks=1),
    depth=25,
)
FORGOTTEN = Scenario(
    "forgotten: streams and replies expire or are deleted under running chunks",
    (
        ClientPlan("A", (A0, A1), window=2, resends=1),
        ClientPlan("B", (B0,)),
        ClientPlan("D", (DeletePlan("the deletion of S"),)),
    ),
    Faults(streams_expired=1, replies_expired=1),
    depth=10,
)
RESTORED = Scenario(
    "restored: a state is read and written back under If-Match; A names its epoch",
    (
        ClientPlan("A", _guarded(Guard.EPOCH, A0, A1), resends=1),
        ClientPlan("B", (B0,)),
        ClientPlan("R", (BeginPlan("the restore of S"),)),
    ),
    Faults(replies_lost=1, timeouts=1),
    depth=10,
)
FORKED = Scenario(
    "forked: T begins as a copy of S, or by itself, and both go on",
    (
        ClientPlan("A", (A0, A1), resends=1, alone=True),
        ClientPlan("F", (BeginPlan("the fork to T", source=0, stream=1),)),
        ClientPlan("T", (T0, T1)),
    ),
    Faults(replies_lost=1),
    depth=11,
)
CRASHES = Scenario(
    "crashes: a worker dies with chunks under way",
    (ClientPlan("A", (A0, A1), window=2, resends=2), ClientPlan("B", (B0,))),
    Faults(crashes=1, replies_expired=1),
    depth=10,
)
ERASED = Scenario(
    "erased: a deletion under If-Match whose answer is lost, while others begin anew",
    (
        ClientPlan("A", (A0,), resends=1),
        ClientPlan("D", (DeletePlan("the deletion of S", guarded=True),)),
        ClientPlan("B", (B0,)),
    ),
    Faults(replies_lost=1, timeouts=1),
    depth=13,
)
AGAIN = Scenario(
    "again: duplicates at both workers, no reply is kept, and all of it once more",
    (ClientPlan("A", (A0, A1), resends=4),),
    Faults(rollbacks=1),
    replies=False,
    depth=25,
)
DELETION = DeletePlan("the deletion of S")
BEGUN = replace(C1, name="c0", position=0)
LATE = Scenario(
    "late: bytes of a connection that was given up arrive after S was deleted and created again",
    (
        ClientPlan(
            "A", (replace(DELETION, name="the first deletion"), A0, DELETION, BEGUN), resends=1
        ),
    ),
    Faults(replies_lost=1, timeouts=1, streams_expired=1, bytes_held=1),
    depth=30,
)
LATE_BEHIND = Scenario(
    "late behind: bytes of a chunk arrive late that was sent behind one that was given up",
    (ClientPlan("A", (A0, A1), window=2, resends=1, alone=True),),
    Faults(replies_lost=1, timeouts=1, bytes_held=1),
    depth=30,
)
LATE_RIVALS = Scenario(
    "late rivals: others delete the stream and begin it again",
    (ClientPlan("A", (A0, A1), resends=1), ClientPlan("D", (DELETION, BEGUN))),
    Faults(replies_lost=1, timeouts=1, bytes_held=1),
    depth=11,
)
LATE_CRASH = Scenario(
    "late crash: bytes of a worker that died arrive after another did its work",
    (ClientPlan("A", (A0, A1), resends=1), ClientPlan("D", (DELETION,), resends=1)),
    Faults(crashes=1, bytes_held=1),
    depth=12,
)
LATE_BEGINNINGS = Scenario(
    "late beginnings: restores and forks arrive late, and deletions of what they began",
    (
        ClientPlan("A", (A0, DELETION)),
        ClientPlan("F", (BeginPlan("the fork to T", source=0, stream=1),)),
        ClientPlan("R", (BeginPlan("the restore of S"), DeletePlan("the deletion of T", stream=1))),
    ),
    Faults(replies_lost=1, bytes_held=1),
    depth=12,
)
SCENARIOS = (
    RETRIES,
    RACE,
    RIVALS,
    ROLLBACK,
    MOVED_ON,
    FORGOTTEN,
    RESTORED,
    FORKED,
    CRASHES,
    ERASED,
    AGAIN,
    LATE,
    LATE_BEHIND,
    LATE_RIVALS,
    LATE_CRASH,
    LATE_BEGINNINGS,
)
