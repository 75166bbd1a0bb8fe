"""The state of the modelled system: named tuples that hash, compare and sort.

A client does its `Operation`s; each time it sends one, that is a `Request`. A worker serves it by
`Command`s to the store, on one pipelined connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.core.values import StoredReply, StreamHead, StreamState, Tombstone
from service.store.codec import COMPARED, pack_head

STREAMS = ("S", "T")
FINGERPRINTS = (b"\x0f" * 16, b"\x1f" * 16)
"""Of the models, by number."""


class Version(int):
    """A value of a stream's state key: a state, a tombstone, or nothing, which is 0.

    An exploration numbers its versions; a version compares and hashes as its number.
    """

    def __new__(
        cls, number: int, stored: StreamState | Tombstone | None, reply: StoredReply | None = None
    ) -> Version:
        version = super().__new__(cls, number)
        version.stored = stored
        # the reply of the commit that writes it
        version.reply = reply
        # the state and its head; None for a tombstone, too
        version.stream = stored if isinstance(stored, StreamState) else None
        version.head = version.stream and version.stream.head
        # what a script compares
        version.compared = b"" if stored is None else pack_head(stored.head)[COMPARED]
        # number of the model that computed the state
        version.artifact = FINGERPRINTS.index(version.stream.fingerprint) if version.stream else 0
        # the position since which the state is computed; None if it is exact
        version.since = version.stream and version.stream.since
        # every chunk since the stream began, with the head that its commit wrote
        version.chunks: dict[ChunkId, StreamHead] = {}
        return version

    @property
    def value(self) -> int:
        """The one float of the state."""
        return int(self.stream.state.floats[0])

    @property
    def events(self) -> tuple[int, ...]:
        """Every event since the stream began."""
        return tuple(digit for chunk, _ in self.chunks for digit in chunk.events)

    def __str__(self) -> str:
        if self.head is None:
            return "a tombstone" if self else "nothing"
        events = "".join(map(str, self.events))
        epoch, tag = self.head.epoch[:4].hex(), self.head.tag[:2].hex()
        model = f", model {self.artifact}" if self.artifact else ""
        inexact = "" if self.since is None else f", since {self.since}"
        return f"[{events} @{self.head.position}, epoch {epoch}, tag {tag}{model}{inexact}]"


NOTHING = Version(0, None)


@dataclass(frozen=True, eq=False)
class Operation:
    """What a client wants; compared by identity.

    A copy writes the state of `source` as a new epoch of `stream`: a restore where they are the
    same (under the If-Match of what was read), else a fork. A rewind writes the state that the
    stream had at `position` as a new epoch. An acknowledgement is a restore that keeps the epoch,
    and to the histories a chunk without events. A shadow computes the state of the model that does
    not answer.
    """

    kind: Literal["chunk", "delete", "copy", "rewind", "shadow"]
    name: str
    stream: int = 0
    events: tuple[int, ...] = ()  # digits 1 to 7
    position: int | None = None  # of the first event; None appends
    # What a chunk names from the client's last reply, a deletion from what is read just before.
    guard: Literal["", "if-match", "epoch"] = ""
    source: int = 0
    starts_over: bool = False  # a chunk that begins from the zero state, in a new epoch
    acknowledges: bool = False  # a copy that is an acknowledgement
    client: int = 0
    index: int = 0

    def __lt__(self, other: Operation) -> bool:
        return (self.client, self.index) < (other.client, other.index)

    def __str__(self) -> str:
        return self.name


ChunkId = tuple[Operation, int]
"""A chunk in a history: one with a position is the same chunk however often it is sent."""


class Request(NamedTuple):
    """One sending of an operation."""

    operation: Operation
    number: int  # how often it was sent before
    named: Version = NOTHING  # whose ETag or epoch the chunk names
    attempts: int = 0  # of a worker
    wrote: Version = NOTHING  # by a try whose answer was lost; only invariants read it

    @property
    def chunk_id(self) -> ChunkId:
        """The chunk in histories."""
        return self.operation, self.number if self.operation.position is None else 0

    def __str__(self) -> str:
        return f"{self.operation}{' again' if self.number else ''}"


class Entry(NamedTuple):
    """The events of one chunk in a history."""

    start: int
    events: tuple[int, ...]
    tag: bytes  # of the head before them
    starts: bool = False  # whether the chunk created its stream

    @property
    def stop(self) -> int:
        """The position after the last event."""
        return self.start + len(self.events)


class History(NamedTuple):
    """A stream's history: valid while its head is that of the stored state."""

    head: bytes = b""  # what a script compares of the last commit that maintained it
    entries: tuple[Entry, ...] = ()
    snapshots: tuple[Version, ...] = ()
    states: tuple[Version, ...] = ()  # the version states: one for each model at most


NO_HISTORY = History()


class Command(NamedTuple):
    """One command on a worker's pipelined connection.

    An outdated one must not write any more: a commit that was sent before a deletion was executed,
    or a deletion that was answered before something else was written.
    """

    kind: Literal[
        "load", "load history", "reread", "read", "commit", "copy", "delete", "rewind", "shadow"
    ]
    request: Request
    base: Version = NOTHING  # expected, or loaded first (reread)
    new: Version = NOTHING  # to write, or computed (reread)
    entry: Entry | None = None  # that a commit adds to the history
    history: History = NO_HISTORY  # that a copy or a rewind writes
    repeated: bool = False  # an earlier try may have been executed
    # What the sender of an abandoned command was answered; empty if it still waits.
    outcome: Literal["", "unknown", "not applied", "applied"] = ""
    outdated: bool = False

    @property
    def stream(self) -> int:
        """The stream that it is about."""
        return self.request.operation.stream

    @property
    def writes(self) -> bool:
        """Whether it runs a script."""
        return self.kind in ("commit", "copy", "delete", "rewind", "shadow")

    @property
    def blocks_stream(self) -> bool:
        """Whether the worker starts no other chunk of the stream meanwhile."""
        is_load = self.kind in ("load", "load history")
        return is_load or (self.kind == "reread" and not self.new)

    def __str__(self) -> str:
        abandoned = " abandoned" if self.outcome else ""
        return f"{self.kind} {self.request} ({self.base} -> {self.new}){abandoned}"


class Keys(NamedTuple):
    """A stream's keys: its state, the version whose commit wrote the stored reply, its history."""

    state: Version = NOTHING
    reply: Version = NOTHING
    history: History = NO_HISTORY


class Worker(NamedTuple):
    """One worker: cached versions by stream, commands, chunks that wait; lists in a `System`."""

    cache: tuple[Version, ...] = (NOTHING,) * len(STREAMS)
    connection: tuple[Command, ...] = ()
    queue: tuple[Request, ...] = ()
    route: int = 0  # the one of the scenario that it has noticed


class Client(NamedTuple):
    """What one client knows."""

    sent: tuple[int, ...]  # how often each operation was sent
    applied: tuple[bool, ...]  # which were acknowledged, and are relied on
    last: Version  # that its last reply named
    resends: int  # that are left
    stopped: bool = False  # it learned of other states than it relied on


class Faults(NamedTuple):
    """How often each fault may happen."""

    replies_lost: int = 0
    timeouts: int = 0
    crashes: int = 0
    rollbacks: int = 0
    replies_expired: int = 0
    streams_expired: int = 0
    bytes_delayed: int = 0
    histories_expired: int = 0


class Route(NamedTuple):
    """Which model answers, and whether commits maintain histories."""

    artifact: int = 0
    has_history: bool = False


@dataclass(frozen=True, slots=True)
class ClientScript:
    """What one client does."""

    name: str
    operations: tuple[Operation, ...]
    window: int = 1  # operations in flight at once
    resends: int = 0  # of unanswered requests, to either worker
    alone: bool = False  # on its streams; so it must learn of every rollback


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who does what, which faults may occur, and which model answers."""

    name: str
    clients: tuple[ClientScript, ...]
    faults: Faults
    depth: int  # steps that the tests explore; `make model` goes on to the end
    replies: bool = True  # whether the store keeps replies at all (they may be too large)
    attempts: int = 3  # of a chunk, against a stream that others change
    # Each worker notices one after the other, at any time.
    routes: tuple[Route, ...] = (Route(),)
    max_events: int = 1  # of a history
    max_snapshots: int = 1


class SystemState(NamedTuple):
    """Everything at one moment."""

    store: tuple[Keys, ...]
    older: tuple[tuple[Keys, ...], ...]  # to which a rollback may return; oldest first
    workers: tuple[Worker, ...]
    clients: tuple[Client, ...]
    faults: Faults  # that may still happen
    # Of each broken connection, the writes whose bytes may still reach the store: any first part
    # of them, in order, at any later step.
    in_transit: tuple[tuple[Command, ...], ...] = ()

    @classmethod
    def initial(cls, scenario: Scenario) -> SystemState:
        """Nothing stored, nothing sent."""
        store, clients = (Keys(),) * len(STREAMS), []
        for script in scenario.clients:
            count = len(script.operations)
            clients.append(Client((0,) * count, (False,) * count, NOTHING, script.resends))
        older = (store,) if scenario.faults.rollbacks else ()
        return cls(store, older, (Worker(), Worker()), tuple(clients), scenario.faults)
