"""Interface of a store's topics: Redis streams from which a consumer reads events, exactly once.

A topic is read by one owner at a time, through a consumer group. The owner has a lease. Each
acquisition of it has a fence (a fencing token): a call of an owner names its fence, and changes
nothing if that is not the stored one. A commit writes states, outputs and acknowledgements in one
step. The rules are in `docs/decisions/consumers.md`.

Every call may raise StoreUnavailable and StoreRefused. Whenever a caller does not know what a call
did (`Unclear`, or one of these errors), it acquires the topic again and reads what is pending.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol

import msgspec

from service.core.errors import CarryError
from service.core.values import StreamHead, StreamKey
from service.store.base import CommitResult
from service.store.history import HistoryColumns
from service.store.keys import KeySpace

CONSUMER: Final = "carry"
"""The consumer name in the group that every owner uses, so that the next owner has what one leaves
pending."""

NEW: Final = ">"
"""Reads entries that were never delivered."""

FIRST_PENDING: Final = "0"
"""Reads pending entries, from the first one on."""


class TopicKeys(NamedTuple):
    """The keys of a topic, which are in one slot of a cluster, and how they are read.

    Attributes:
        topic: where events are read.
        lease: the lease of its owner.
        halted: the streams that halt.
        outputs, dead_letters: the topics that are written.
        group: the consumer group.
        kept: about how many entries the output topic keeps; 0 for all.
        deletes: whether acknowledged entries are deleted from the topic.
    """

    topic: str
    lease: str
    halted: str
    outputs: str
    dead_letters: str
    group: str
    kept: int = 0
    deletes: bool = False

    @classmethod
    def of(
        cls,
        topic: str,
        outputs: str,
        dead_letters: str,
        group: str,
        kept: int = 0,
        *,
        deletes: bool = False,
    ) -> TopicKeys:
        """The keys of a topic that is read by a group."""
        lease, halted = f"{topic}:lease:{group}", f"{topic}:halted:{group}"
        return cls(topic, lease, halted, outputs, dead_letters, group, kept, deletes)


class TopicRegistration(msgspec.Struct, frozen=True):
    """The topics that a consumer group reads and writes, as its consumers announce them.

    Attributes:
        source, sink, dead_letters: names of the topics; with `partitioned` the last parts of
            their keys.
        model: computes the outputs.
        partitioned: whether there is a topic for each partition of the store.
    """

    group: str
    source: str
    sink: str
    dead_letters: str
    model: str
    partitioned: bool

    def keys(self, space: KeySpace, kept: int = 0, *, deletes: bool = False) -> list[TopicKeys]:
        """The keys of each topic that is read.

        Args:
            kept, deletes: as of `TopicKeys`.
        """
        names = [(self.source, self.sink, self.dead_letters)]
        if self.partitioned:
            prefixes = map(space.partition_prefix, range(space.partitions))
            names = [
                (
                    f"{it}:in:{self.source}",
                    f"{it}:out:{self.sink}",
                    f"{it}:dead:{self.dead_letters}",
                )
                for it in prefixes
            ]
        return [TopicKeys.of(*each, self.group, kept, deletes=deletes) for each in names]


class Entry(NamedTuple):
    """An entry of a topic.

    Attributes:
        fields: names and values in turns; None if it was deleted before it was acknowledged.
    """

    id: bytes
    fields: Sequence[bytes] | None


class Destination(Enum):
    """Where an entry is written; the value is the index of its key in `topic_commit.lua`."""

    OUTPUTS = 4
    DEAD_LETTERS = 5


class NewEntry(NamedTuple):
    """An entry to write.

    Attributes:
        fields: names and values in turns.
    """

    destination: Destination
    fields: Sequence[str | bytes | int]


class TopicEntry(NamedTuple):
    """An entry that a producer adds to a topic.

    Attributes:
        topic: its key.
        fields: names and values in turns.
    """

    topic: str
    fields: Sequence[str | bytes | int]


class SourceEntries(NamedTuple):
    """The next entries of a source, which are appended to a topic.

    Attributes:
        source: its name.
        known: an id that the caller knows to be stored as appended; empty if it knows none.
        upto: the id up to which these are all entries of the source for this topic.
    """

    source: str
    known: bytes
    upto: bytes
    entries: Sequence[Entry]


class Appended(NamedTuple):
    """The result of appending entries to a topic.

    Attributes:
        length: how many entries the topic has now.
        counts: of each source: how many were appended; None if the store has lost earlier ones, so
            that nothing of the source was.
    """

    length: int
    counts: Sequence[int | None]


class ChunkCommit(NamedTuple):
    """The compare-and-set of one stream, a row of `CommitColumns`.

    Attributes:
        history: of this one stream; None if none is kept.
        alarm: as of `CommitColumns`; empty for no change.
    """

    key: StreamKey
    expected: bytes
    state: bytes
    reply: bytes
    history: HistoryColumns | None = None
    alarm: str = ""


class TopicItem(NamedTuple):
    """What is committed together or not at all.

    Attributes:
        ids: entries that are acknowledged.
        entries: entries that are written.
        shared: names and values, in turns, that each of these begins with.
        chunk: the stream that changes, if one does.
        condition: a stream that has to be at a head, if the rest depends on it; None as the head
            if it must not exist.
        halts: name of a stream that halts from now on; empty if none does.
        halted: name of a stream that must halt, or the item fails as `is_not_pending`.
    """

    ids: Sequence[bytes]
    entries: Sequence[NewEntry] = ()
    chunk: ChunkCommit | None = None
    condition: tuple[StreamKey, StreamHead | None] | None = None
    halts: str = ""
    halted: str = ""
    shared: Sequence[str | bytes | int] = ()


class Ownership(NamedTuple):
    """The result of an attempt to acquire, renew or release a lease.

    Attributes:
        is_held: whether the caller owns the topic now; after a release, whether it did.
        owner: who owns it, or did last.
        left_s: seconds until the lease expires.
        has_new_group: whether the consumer group was missing, and was created.
    """

    is_held: bool
    owner: str
    left_s: float
    has_new_group: bool


class TopicStatus(NamedTuple):
    """How far a group has read a topic.

    Attributes:
        owner: who owns it now; empty if nobody does.
        entries: in the topic.
        pending: entries that were delivered and are not acknowledged.
        lag: entries that were not delivered yet; None if the server does not know (Redis before
            7.0).
        read: entries that were ever delivered to the group; None if the server does not know.
        oldest_ms: time of the first entry that is not acknowledged, of its id; None if there is
            none.
    """

    owner: str
    entries: int
    pending: int
    lag: int | None
    read: int | None
    oldest_ms: int | None


class Unclear(Enum):
    """Why a call of an owner has no result; the owner then has to acquire the topic again."""

    FENCED = "another owner has acquired the topic"
    COMMIT_MISSING = "the store has lost a commit, or executed this one before"
    REPLY_LOST = "the reply was lost, or the call was sent again"


NOT_PENDING: Final = "NOTPENDING"
"""An item's error: one of its entries is not pending, so nothing of the item was changed."""

ItemResult = CommitResult
"""Committed, Conflicted (the stream has another head), or an error; nothing was changed then."""


class Topics(Protocol):
    """Reads topics, and commits what comes of their entries.

    Attributes:
        space: the names of the store's keys.
    """

    space: KeySpace

    async def acquire(
        self, keys: TopicKeys, owner: str, fence: str, lease_s: float, start: str
    ) -> Ownership:
        """Acquire a topic under a new fence, if it is free, expired or the owner's; create what is
        missing of topic and group.

        Args:
            start: the id behind which a new group starts.
        """

    async def renew(
        self, keys: TopicKeys, owner: str, fence: str, lease_s: float, number: int, floor: bytes
    ) -> Ownership:
        """Renew a lease; after 0 seconds it is free.

        Args:
            number: of the last commit whose result is known; the lease is not held any more if
                the store has lost it.
            floor: an id up to which every entry is acknowledged; empty if none is known.
        """

    async def claim(self, keys: TopicKeys) -> int:
        """Take over what other consumers of the group left pending; returns how many entries."""

    async def read(
        self, keys: TopicKeys, fence: str, after: str, count: int
    ) -> Sequence[Entry] | Unclear:
        """Read entries: `NEW` ones, or pending ones behind an id."""

    async def last_id(self, keys: TopicKeys) -> bytes:
        """Read the id of a topic's last entry; one below all others if it has none."""

    def watch(self, keys: TopicKeys, after: bytes, notification: asyncio.Future[bool]) -> bool:
        """Watch a topic once for entries behind an id; returns whether it can be watched now. An
        entry may go unnoticed.

        Args:
            notification: resolved once there may be such an entry; with True if there is one.
        """

    async def commit(
        self,
        keys: TopicKeys,
        fence: str,
        number: int,
        items: Sequence[TopicItem],
        deadline_s: float = math.inf,
    ) -> Sequence[ItemResult] | Unclear:
        """Commit items; each succeeds or fails alone. Calls are executed in order.

        Args:
            number: of this commit under the fence, from 1 on.
        """

    async def status(self, keys: TopicKeys) -> TopicStatus | None:
        """Read how far the group has read a topic; None if topic or group do not exist."""

    async def register(self, registration: TopicRegistration) -> TopicRegistration | None:
        """Announce what a consumer group reads and writes, instead of its earlier registration of
        the same source, which is returned."""

    async def registrations(self) -> Sequence[TopicRegistration]:
        """Read the registrations of all consumer groups."""

    async def newest(self, name: str, count: int) -> Sequence[Entry]:
        """Read the newest entries of a topic, the newest first; none if it does not exist."""

    async def type_of(self, name: str) -> str:
        """Read the type of a key of the store, such as `stream`; `none` if there is none."""

    async def halted(self, keys: TopicKeys) -> set[str]:
        """Read the names of the halted streams."""

    async def add(self, entries: Sequence[TopicEntry]) -> None:
        """Add entries to topics, those of one topic in order.

        Raises:
            StoreUnavailable, StoreRefused: some may have been added, or added twice.
        """

    async def append(self, name: str, parts: Sequence[SourceEntries]) -> Appended:
        """Append entries of sources to a topic, in order, except those that it already has.

        Calls for one source must not overlap, but may be repeated at any time.

        Raises:
            StoreUnavailable, StoreRefused: they may have been appended; the call may be repeated.
        """

    async def read_sources(self, name: str, sources: Sequence[str]) -> Sequence[bytes | None]:
        """Read up to which id the entries of sources were appended to a topic."""

    async def write_sources(
        self, name: str, ids: Mapping[str, bytes], *, only_missing: bool
    ) -> None:
        """Store up to which id the entries of sources count as appended to a topic."""

    async def dead_letters(self, keys: TopicKeys, after: str, count: int) -> Sequence[Entry]:
        """Read dead letters behind an id, in order; "-" is in front of all."""

    async def replay(
        self,
        keys: TopicKeys,
        ids: Sequence[bytes],
        *,
        adds: bool = True,
        resumed: str = "",
        last: bytes = b"",
    ) -> int | None:
        """Move dead letters back to their topic as new entries; returns how many there were.

        Args:
            adds: otherwise they are deleted.
            resumed: a halted stream that continues behind them; None is returned, and nothing
                changed, if there are dead letters behind `last`.
        """

    async def join(self, group: str, member: str, valid_s: float) -> Sequence[str]:
        """Announce a consumer for some time (0: it leaves); returns those of the group."""


def is_not_pending(result: ItemResult) -> bool:
    """Whether an item failed since one of its entries is not pending."""
    return isinstance(result, CarryError) and NOT_PENDING in result.detail


def id_before(entry_id: bytes) -> bytes:
    """The greatest id below another one."""
    time_ms, sequence = map(int, entry_id.split(b"-"))
    if sequence:
        return b"%d-%d" % (time_ms, sequence - 1)
    return b"%d-%d" % (time_ms - 1, 2**64 - 1) if time_ms else b"0-0"
