"""The values of the model: what is sent, and everything that is the case at one moment.

A `World` is nested tuples of small numbers, so that it can be hashed, compared and sorted.
States, and the tombstones that deletions leave in their place, are numbers of the `Book` that keeps
them; 0 is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

STREAMS = ("S", "T")

Log = tuple[tuple[int, int], ...]
"""Every chunk since the stream began, as `(uid, the state that was written with it)`."""


class Guard(IntEnum):
    """What a client names beside the position, from the last reply it got."""

    NONE = 0
    IF_MATCH = 1
    EPOCH = 2


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One chunk of a client's plan.

    Attributes:
        name: as it is told of; names are unique but for equal appends.
        events: digits 1 to 7; a state spells the events that led to it.
        position: of its first event; None appends.
    """

    name: str
    events: tuple[int, ...]
    position: int | None
    guard: Guard = Guard.NONE
    stream: int = 0


@dataclass(frozen=True, slots=True)
class DeletePlan:
    """A deletion; `guarded`: under the If-Match of what was read just before."""

    name: str
    guarded: bool = False
    stream: int = 0


@dataclass(frozen=True, slots=True)
class BeginPlan:
    """A state read from `source` and written as the beginning of a new epoch of `stream`: a
    restore where they are the same (under the If-Match of what was read), else a fork."""

    name: str
    source: int = 0
    stream: int = 0


Plan = ChunkPlan | DeletePlan | BeginPlan


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client.

    Attributes:
        window: how many of its plans may be under way at once.
        resends: how often it may send again what was not answered yet, to either worker.
        alone: nobody else adds events to its streams; so it must be told of every rollback.
    """

    name: str
    plans: tuple[Plan, ...]
    window: int = 1
    resends: int = 0
    alone: bool = False


class Faults(NamedTuple):
    """How often each may happen."""

    replies_lost: int = 0
    timeouts: int = 0
    crashes: int = 0
    rollbacks: int = 0
    replies_expired: int = 0
    streams_expired: int = 0
    bytes_held: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who does what, and what may go wrong.

    Attributes:
        depth: steps that the tests explore; `make model` goes on to the end.
        attempts: how often a chunk is tried against a stream that others move on.
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
        state: 0 where there is none.
        reply: the state whose commit the kept reply belongs to, or 0.
        log: the history that survives; nobody in the system knows it.
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
        wrote: the state that a try wrote whose answer was lost, or 0; nobody knows.
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
    BEGIN = 4
    DELETE = 5


WRITES = (Kind.COMMIT, Kind.BEGIN, Kind.DELETE)


class Request(NamedTuple):
    """One request on a worker's ordered connection.

    Attributes:
        base: the state that is expected, or that was loaded first (RETRY), or 0.
        new: the state to write, or that was computed (RETRY), or 0.
        held: the worker takes up no other chunk of the stream meanwhile.
        repeated: an earlier try may have been carried out.
        orphan: nobody waits any more, since its caller was told that the outcome is unknown (1),
            that nothing was applied (2), or that it was (3).
        log: of the state to write, where that begins an epoch.
        stale: it must not write any more: a commit that was sent before a deletion was carried
            out, or a deletion that was answered before something else was written.
    """

    kind: int
    job: Job
    base: int = 0
    new: int = 0
    held: int = 0
    repeated: int = 0
    orphan: int = 0
    log: Log = ()
    stale: int = 0


class Worker(NamedTuple):
    """One worker: its cached states by stream, its connection, the chunks that wait."""

    cache: tuple[int, ...]
    lane: tuple[Request, ...] = ()
    waiting: tuple[Job, ...] = ()


class Client(NamedTuple):
    """What one client knows.

    Attributes:
        sent: how often each plan was sent.
        known: which plans it was told are applied, and relies on.
        last: the state that its last reply named, or 0.
        resends: how many are left.
        stopped: it was told of other states than it relied on, and ends.
    """

    sent: tuple[int, ...]
    known: tuple[int, ...]
    last: int
    resends: int
    stopped: int = 0


class World(NamedTuple):
    """Everything that is the case.

    Attributes:
        store: by stream.
        older: contents the store had, which a rollback may put back; oldest first.
        held: by connection that was given up, the writes whose bytes are still on their way to
            the store, which may carry out any first part of them, in order, at any later step.
        left: faults that may still happen.
    """

    store: tuple[Slot, ...]
    older: tuple[tuple[Slot, ...], ...]
    workers: tuple[Worker, ...]
    clients: tuple[Client, ...]
    left: Faults
    held: tuple[tuple[Request, ...], ...] = ()


def first_world(scenario: Scenario) -> World:
    """Nothing stored, nothing sent."""
    store = (Slot(),) * len(STREAMS)
    none = (0,) * len(STREAMS)
    clients = tuple(
        Client((0,) * len(c.plans), (0,) * len(c.plans), 0, c.resends) for c in scenario.clients
    )
    older = (store,) if scenario.faults.rollbacks else ()
    return World(store, older, (Worker(none), Worker(none)), clients, scenario.faults)
