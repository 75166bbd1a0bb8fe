"""The values of the model: who sends what, which faults may occur, and one moment of everything.

A `World` is nested tuples of small numbers, so that it can be hashed, compared and sorted.
Stream states and tombstones are numbers of the exploration's `Values`; 0 is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

STREAMS = ("S", "T")

Log = tuple[tuple[int, int], ...]
"""Every chunk since the stream began, as `(uid, the state that was written with it)`."""


class Guard(IntEnum):
    """What a request names beside the position, from the client's last reply."""

    NONE = 0
    IF_MATCH = 1
    EPOCH = 2


class PlanKind(IntEnum):
    """What a client sends."""

    CHUNK = 0
    DELETE = 1
    COPY = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """One request of a client.

    Attributes:
        name: unique, but for equal appends.
        events: of a chunk: digits 1 to 7; a state spells the events that led to it.
        position: of a chunk's first event; None appends.
        guard: a deletion under IF_MATCH names the state that was read just before.
        source: of a copy, the stream whose state is written as a new epoch of `stream`: a restore
            where they are the same (under the If-Match of what was read), else a fork.
    """

    kind: PlanKind
    name: str
    stream: int = 0
    events: tuple[int, ...] = ()
    position: int | None = None
    guard: Guard = Guard.NONE
    source: int = 0


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client.

    Attributes:
        window: how many of its plans may be in flight at once.
        resends: how often it may repeat an unanswered request, to either worker.
        alone: nobody else adds events to its streams; so it must learn of every rollback.
    """

    name: str
    plans: tuple[Plan, ...]
    window: int = 1
    resends: int = 0
    alone: bool = False


class Faults(NamedTuple):
    """How often each fault may happen."""

    replies_lost: int = 0
    timeouts: int = 0
    crashes: int = 0
    rollbacks: int = 0
    replies_expired: int = 0
    streams_expired: int = 0
    bytes_delayed: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who does what, and which faults may occur.

    Attributes:
        depth: steps that the tests explore; `make model` goes on to the end.
        attempts: how often a chunk is tried against a stream that others change.
        replies: whether the store keeps replies at all (they may be too large).
    """

    name: str
    clients: tuple[ClientPlan, ...]
    faults: Faults
    depth: int
    attempts: int = 3
    replies: bool = True


class Slot(NamedTuple):
    """One stream in the store.

    Attributes:
        reply: the state whose commit the stored reply belongs to, or 0.
        log: the surviving history; nothing in the system reads it.
    """

    state: int = 0
    reply: int = 0
    log: Log = ()


class Job(NamedTuple):
    """One plan as it was sent once.

    Attributes:
        number: how often the plan was sent before.
        named: the state whose ETag or epoch the chunk names, or 0.
        attempts: how often it was tried.
        wrote: the state that a try wrote whose answer was lost, or 0; nothing reads it.
    """

    client: int
    plan: int
    number: int
    named: int = 0
    attempts: int = 0
    wrote: int = 0


class Kind(IntEnum):
    """What is asked of the store."""

    LOAD = 0
    COMMIT = 1
    RETRY = 2
    READ = 3
    COPY = 4
    DELETE = 5


WRITES = (Kind.COMMIT, Kind.COPY, Kind.DELETE)


class Outcome(IntEnum):
    """What the caller of an abandoned request was answered; PENDING if it still waits."""

    PENDING = 0
    UNKNOWN = 1
    NOT_APPLIED = 2
    APPLIED = 3


class Request(NamedTuple):
    """One request on a worker's pipelined connection.

    Attributes:
        base: the state that is expected, or that was loaded first (RETRY), or 0.
        new: the state to write, or that was computed (RETRY), or 0.
        blocks: the worker takes no other chunk of the stream meanwhile.
        repeated: an earlier try may have been executed.
        log: of the state to write, where that begins an epoch.
        outdated: it must not write any more: a commit that was sent before a deletion was
            executed, or a deletion that was answered before something else was written.
    """

    kind: Kind
    job: Job
    base: int = 0
    new: int = 0
    blocks: int = 0
    repeated: int = 0
    outcome: Outcome = Outcome.PENDING
    log: Log = ()
    outdated: int = 0


class Worker(NamedTuple):
    """One worker: its cached states by stream, its connection, the chunks that wait."""

    cache: tuple[int, ...] = (0,) * len(STREAMS)
    pipeline: tuple[Request, ...] = ()
    waiting: tuple[Job, ...] = ()


class Client(NamedTuple):
    """What one client knows.

    Attributes:
        sent: how often each plan was sent.
        applied: which plans were acknowledged, and are relied on.
        last: the state that its last reply named, or 0.
        resends: how many are left.
        stopped: it learned of other states than it relied on, and ends.
    """

    sent: tuple[int, ...]
    applied: tuple[int, ...]
    last: int
    resends: int
    stopped: int = 0


class World(NamedTuple):
    """The complete state of the model.

    Attributes:
        store: by stream.
        older: earlier contents of the store, to which a rollback may return; oldest first.
        left: faults that may still happen.
        in_transit: by broken connection, the writes whose bytes may still reach the store: any
            first part of them, in order, at any later step.
    """

    store: tuple[Slot, ...]
    older: tuple[tuple[Slot, ...], ...]
    workers: tuple[Worker, ...]
    clients: tuple[Client, ...]
    left: Faults
    in_transit: tuple[tuple[Request, ...], ...] = ()


def first_world(scenario: Scenario) -> World:
    """Nothing stored, nothing sent."""
    store = (Slot(),) * len(STREAMS)
    clients = tuple(
        Client((0,) * len(c.plans), (0,) * len(c.plans), 0, c.resends) for c in scenario.clients
    )
    older = (store,) if scenario.faults.rollbacks else ()
    return World(store, older, (Worker(), Worker()), clients, scenario.faults)
