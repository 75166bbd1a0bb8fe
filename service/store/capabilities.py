"""The capabilities of a store beside reading and writing states (`service.store.base`).

Whoever needs one takes its protocol as an argument.

Every call may raise StoreUnavailable and StoreRefused, unless it says otherwise. A `deadline_s` is
one of `service.store.base`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NewType, Protocol

from service.core.errors import CarryError
from service.core.values import Check, StoredReply, StreamKey


class StoredKeys(Protocol):
    """The records of access keys in a store, and the secret that signs state tokens."""

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        """Read the version of the access keys, which is new after each write and empty if there
        was none, and their records by id; None if `version` is the current one.
        """

    async def write(self, records: Mapping[str, bytes]) -> None:
        """Write records of access keys by id, in one step; without records, only mark the store as
        one that has had keys.

        Raises:
            NotDurable: they were written, but are not as durable as the settings require.
            StoreUnavailable, StoreRefused: they may have been written.
        """

    async def token_key(self) -> bytes:
        """Read the secret of this store that signs state tokens; drawn when it is first read."""


class StoredModels(Protocol):
    """The records of models with several versions in a store, and what each process has loaded."""

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        """Read the version of the records, which is new after each write and empty if there was
        none, and the records by model; None if `version` is the current one.
        """

    async def write(self, version: bytes, model: str, record: bytes) -> bool:
        """Write the record of a model if `version` is the current one; returns whether it was.

        Raises:
            NotDurable: it was written, but is not as durable as the settings require.
            StoreUnavailable, StoreRefused: it may have been written.
        """

    async def report(
        self, process: str, report: bytes, deadline_s: float = math.inf
    ) -> Sequence[bytes]:
        """Write the report of a process, which lives for some seconds; empty if the process stops.
        Returns the reports of all processes that are alive."""


RegistrationId = NewType("RegistrationId", bytes)
"""Identifies one registration of a stream."""


class Quota(NamedTuple):
    """The limits on what a key may use; None for no limit."""

    streams: int | None
    state_bytes: int | None


class Registration(NamedTuple):
    """The result of `StreamUsage.register`.

    Attributes:
        accepted: for each stream whether it is registered now.
        streams, state_bytes: what the key uses.
    """

    accepted: list[bool]
    streams: int
    state_bytes: int


class StreamUsage(Protocol):
    """The usage of a store by access keys with quotas: the streams that each created, their bytes.

    A stream is registered under a key right before each commit of the key that would create it, and
    counts from then on, until it is deleted or expires. A registration and the stream may be on
    different servers, so nothing writes both in one step. Instead, a registration is removed only
    after its stream was fenced: a tombstone was written after the registration was read, so that
    every commit that was registered before conflicts. A later registration of the stream has
    another id. So a stream that exists is always counted; `reconcile` removes those that are
    counted and do not exist.
    """

    async def register(
        self,
        key_id: str,
        streams: Sequence[tuple[StreamKey, int]],
        quota: Quota,
        deadline_s: float = math.inf,
    ) -> Registration:
        """Register streams with the bytes of their states, as far as the quota allows; at once, so
        that concurrent calls never exceed it together.

        Call it after the stream's head was read that the commit will expect.
        """

    async def find_registrations(
        self, key_id: str, streams: Sequence[StreamKey]
    ) -> list[RegistrationId]:
        """Find the registration of each stream; empty if there is none."""

    async def release(
        self, key_id: str, registrations: Sequence[tuple[StreamKey, RegistrationId]]
    ) -> None:
        """Remove registrations that were read before a tombstone of their stream was written."""

    async def reconcile(self, key_id: str) -> None:
        """Remove the registrations whose streams do not exist."""


class IndexedAlarm(NamedTuple):
    """A stream that the index of open alarms names.

    Attributes:
        opened_ms: when the commit of the chunk that opened the alarm was made, in epoch
            milliseconds; or the first one that continued it, for a restored or forked stream.
    """

    key: StreamKey
    opened_ms: int


class StoredAlarms(Protocol):
    """The index of the streams that have an open alarm.

    A commit writes it in the same step as the state. It may name streams without an alarm, which
    were deleted, expired, or replaced in another way than by a chunk: so a reader compares it with
    the states. It names every stream with an alarm, after its first chunk since it was restored,
    forked, rewound or loaded.
    """

    async def page(
        self,
        model: str,
        before_ms: int | None,
        limit: int,
        prefix: str = "",
        deadline_s: float = math.inf,
    ) -> list[IndexedAlarm]:
        """Read the newest `limit` entries of a model before a time, of streams whose names start
        with `prefix`, newest first. Further entries of the last one's time are included."""

    async def drop(self, alarms: Mapping[IndexedAlarm, bytes]) -> None:
        """Remove entries whose streams have no alarm, unless the state has changed.

        Args:
            alarms: with the stored bytes in which there is none; empty if nothing is stored.
        """


class LeaseRequest(NamedTuple):
    """The tokens that a process spent, and its request for another lease.

    Attributes:
        bucket: the name of the bucket.
        burst: the most tokens that it has.
        spent: tokens that the process spent since its last lease began.
    """

    bucket: str
    rate_per_s: float
    burst: float
    spent: float


class Lease(NamedTuple):
    """Tokens for one process, until its next lease, or for a second.

    Attributes:
        free: tokens that no process has leased; less than 0 if too many were spent.
        processes: how many use the bucket, this one included.
    """

    tokens: float
    free: float
    processes: int


class RateLeases(Protocol):
    """Leases this process tokens of the buckets of access keys, which all processes share.

    A bucket is exact: every token that a process reports as spent is deducted, below zero if need
    be, so that the rate holds on average whatever the processes spent in the meantime. A lease
    reserves tokens for one process, so that together the processes seldom overdraw the bucket.
    """

    async def lease(
        self, requests: Sequence[LeaseRequest], deadline_s: float = math.inf
    ) -> list[Lease | CarryError]:
        """Renew leases, in one round trip; after an error, tokens may or may not be counted."""


class PublishedOutput(NamedTuple):
    """What happened to a watched stream.

    Attributes:
        start: position of the chunk's first event.
        reply: head and outputs after the chunk; None if the stream was deleted.
        fingerprint: of the version that computed them.
    """

    key: StreamKey
    start: int
    reply: StoredReply | None
    fingerprint: bytes


class Receiver(Protocol):
    """Receives the outputs of one stream."""

    def receive(self, output: PublishedOutput) -> None:
        """Take an output; must not block."""

    def resynchronize(self) -> None:
        """Outputs may have been lost: read the stream."""


class OutputChannel(Protocol):
    """Shares the outputs of watched streams among the workers of a store.

    Nobody has to listen, so it is cheap and lossy: delivery is at most once. A receiver notices
    what it missed by the positions, and reads the stream to be sure.

    Attributes:
        watched: the streams that any worker watches now; usually none.
    """

    watched: Collection[StreamKey]

    async def start(self) -> None:
        """Connect, in the background; once, after the store is started."""

    async def close(self) -> None:
        """Release connections; once."""

    def publish(self, key: StreamKey, start: int, reply: bytes, fingerprint: bytes) -> None:
        """Send an output to the workers that watch a stream; never blocks, may drop it.

        Args:
            start, reply, fingerprint: as of `PublishedOutput`; the reply is encoded, and both are
                empty if there is none.
        """

    async def subscribe(self, key: StreamKey, receiver: Receiver) -> None:
        """Receive what any worker commits from now on; end it with `unsubscribe`, in any case.

        Raises:
            StoreUnavailable: the other workers could not be notified in time.
            StoreRefused: the store does not permit it.
        """

    def unsubscribe(self, key: StreamKey, receiver: Receiver) -> None:
        """Stop receiving."""


MAX_ROUND_TRIPS: Final = 4096
"""Round-trip times that are kept until they are read; older ones are dropped."""


@dataclass(slots=True, eq=False)
class StoreTelemetry:
    """Counts of one store, of this process; a worker reads them once a second, so that nothing on
    a chunk's path knows of metrics.

    Attributes:
        reconnects: connections for chunks that were opened again.
        round_trips_s: times between a write and the reply to its first command; at most one
            command of a connection is timed at once.
        is_up: whether the last check found that the store accepts commits.
        servers_up, servers_down: the primaries that accept commits, and the others.
        memory_ratio: share of its `maxmemory` that the fullest primary uses; 0 without a limit.
    """

    reconnects: int = 0
    round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_ROUND_TRIPS))
    is_up: bool = False
    servers_up: int = 0
    servers_down: int = 0
    memory_ratio: float = 0.0


class StreamCount(NamedTuple):
    """The streams of one model in the store, counted or estimated.

    Attributes:
        streams: streams that are stored.
        live: those of them with a commit in the last `LIVE_S` seconds.
        state_bytes: bytes of their states, without their names and the server's overhead.
    """

    streams: float = 0.0
    live: float = 0.0
    state_bytes: float = 0.0


LIVE_S: Final = 300
"""A stream is live for this long after a commit, in seconds."""


class StoreMonitor(Protocol):
    """What a store lets its operator observe.

    Attributes:
        telemetry: what its connections and checks count, in this process.
    """

    telemetry: StoreTelemetry

    async def check(self) -> Check:
        """Check readiness: whether the store accepts commits as required. Never raises."""

    async def count_streams(self) -> dict[str, StreamCount]:
        """Count the streams of each model, in bounded time; estimated if there are many."""
