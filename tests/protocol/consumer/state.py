"""The state of the modelled consumers: named tuples that hash, compare and sort.

Producers append entries to one topic, which is read by one consumer group; two consumers share it
under a lease. Beside them an HTTP client sends chunks to the same streams. Entries and chunks are
`Operation`s; the producers are client 0, the HTTP client is client 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tests.protocol.state import NOTHING, STREAMS, ChunkId, Operation, Version

NO_STATES = (NOTHING,) * len(STREAMS)
PRODUCERS, HTTP_CLIENT = 0, 1


class Entry(NamedTuple):
    """One entry of the topic; `number` is how often its event was appended before."""

    operation: Operation
    number: int

    @property
    def chunk_id(self) -> ChunkId:
        """The event in histories: with a position, it is the same however often it is appended."""
        return self.operation, self.number if self.operation.position is None else 0

    @property
    def stream(self) -> int:
        """The stream of its event."""
        return self.operation.stream

    def __str__(self) -> str:
        return f"{self.operation}{' again' * self.number}"


class Output(NamedTuple):
    """One entry of the output topic: the output of one event."""

    entry: Entry
    position: int
    value: float

    def __str__(self) -> str:
        return f"{self.entry} @{self.position}: {int(self.value):o}"


class Lease(NamedTuple):
    """The lease of the topic: its owner, the fence of one acquisition, and commits under it."""

    owner: int = -1
    fence: int = 0
    number: int = 0
    is_held: bool = False  # else released or expired; the fence stays


class Store(NamedTuple):
    """Everything in the store."""

    topic: tuple[Entry, ...] = ()
    delivered: int = 0  # entries of the topic, from its start
    pending: tuple[Entry, ...] = ()  # delivered and not acknowledged, in order
    lease: Lease = Lease()
    states: tuple[Version, ...] = NO_STATES
    outputs: tuple[Output, ...] = ()
    loaded: tuple[ChunkId, ...] = ()  # events in a state that was loaded: they have no outputs


class Item(NamedTuple):
    """What a commit does for one stream: a chunk of merged entries, or duplicates acknowledged."""

    kind: Literal["chunk", "duplicates"]
    entries: tuple[Entry, ...]
    base: Version = NOTHING  # expected
    new: Version = NOTHING  # to write
    outputs: tuple[Output, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(map(str, self.entries))
        return f"{self.kind} [{names}]" + (f" ({self.base} -> {self.new})" if self.new else "")


class Command(NamedTuple):
    """One command on a consumer's connection, under the fence that its consumer had."""

    kind: Literal["acquire", "renew", "release", "recover", "read", "acknowledge", "load", "commit"]
    fence: int
    number: int = 0  # of a commit, or of the last one that a renewal knows of
    items: tuple[Item, ...] = ()
    after: tuple[Entry, ...] = ()  # the last entry of the page before
    is_repeated: bool = False  # an earlier try may have been executed
    is_abandoned: bool = False  # its consumer waits no longer, under the same fence

    @property
    def has_effects(self) -> bool:
        """Whether it changes the store."""
        return self.kind in ("read", "acknowledge", "commit")

    def __str__(self) -> str:
        items = "; ".join(map(str, self.items))
        number = f" {self.number}" if self.number else ""
        return f"{self.kind}{number} under fence {self.fence} {items}".rstrip()


class Consumer(NamedTuple):
    """One consumer; lists in a `ConsumerSystem`."""

    fence: int = 0  # 0: it does not own the topic
    number: int = 0  # commits that it sent under the fence
    is_recovering: bool = False  # pending entries come before new ones
    waiting: tuple[Entry, ...] = ()  # read, and not in a command
    cache: tuple[Version, ...] = NO_STATES
    connection: tuple[Command, ...] = ()

    def awaits(self, command: Command) -> bool:
        """Whether the consumer waits for the answer."""
        return command.fence == self.fence and not command.is_abandoned

    @property
    def awaited(self) -> list[Command]:
        """The commands whose answers it waits for."""
        return [command for command in self.connection if self.awaits(command)]

    @property
    def in_progress(self) -> list[Item]:
        """The chunks and duplicates in these commands."""
        return [item for command in self.awaited for item in command.items]

    @property
    def in_memory(self) -> int:
        """How many entries it has in memory."""
        return len(self.waiting) + sum(len(item.entries) for item in self.in_progress)


class HttpClient(NamedTuple):
    """The HTTP client: its next chunk, which may be computed and not yet committed."""

    index: int = 0
    computed: Item | None = None


class ConsumerFaults(NamedTuple):
    """How often each fault may happen."""

    retries: int = 0  # of producers: an event appended once more
    leases_expired: int = 0  # of a consumer that is paused, or too slow
    releases: int = 0  # a rebalance
    replies_lost: int = 0
    timeouts: int = 0
    crashes: int = 0
    bytes_delayed: int = 0
    rollbacks: int = 0


@dataclass(frozen=True, slots=True)
class ConsumerScenario:
    """What is produced, what an HTTP client sends meanwhile, and which faults may occur."""

    name: str
    events: tuple[Operation, ...]
    faults: ConsumerFaults
    chunks: tuple[Operation, ...] = ()  # of the HTTP client
    page: int = 2  # entries that are read at once, and events that are merged into a chunk
    room: int = 3  # entries in a consumer's memory
    loaded: int = 0  # events, the first ones, in a state that is loaded from a history


class ConsumerState(NamedTuple):
    """Everything at one moment."""

    store: Store
    older: tuple[Store, ...]  # to which a rollback may return; oldest first
    appended: tuple[int, ...]  # how often each event was appended
    consumers: tuple[Consumer, ...]
    http: HttpClient
    faults: ConsumerFaults  # that may still happen
    # Of each broken connection, the commands whose bytes may still reach the store, in order.
    in_transit: tuple[tuple[Command, ...], ...] = ()
    is_loaded: bool = False  # the history was loaded, or its stream was kept

    @classmethod
    def initial(cls, scenario: ConsumerScenario) -> ConsumerState:
        """An empty topic that nobody owns."""
        store = Store()
        older = (store,) if scenario.faults.rollbacks else ()
        appended = (0,) * len(scenario.events)
        return cls(store, older, appended, (Consumer(), Consumer()), HttpClient(), scenario.faults)
