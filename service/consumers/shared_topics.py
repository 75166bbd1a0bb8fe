"""Topics that processes share: each has one owner at a time, which reads and acknowledges it.

`SharedTopics` announces this process, computes which topics are assigned to it, and renews their
leases. `LeasedTopic` acquires one of them, reads what is pending and then what is new, and commits.
What is done with the entries is up to the subclasses: a consumer computes outputs, a relay delivers
them, a repartitioner moves them. The rules are in `docs/decisions/consumers.md`.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import structlog

from service.consumers.arrivals import Arrivals
from service.consumers.assignment import assign_topics
from service.consumers.config import ConsumerConfig
from service.core.errors import CarryError, OperatorError, StoreRefused
from service.core.values import Check
from service.store.base import COMMITTED, CommitResult
from service.store.topics import (
    FIRST_PENDING,
    NEW,
    Entry,
    Ownership,
    TopicItem,
    TopicKeys,
    Topics,
    TopicStatus,
    Unclear,
    id_before,
    is_not_pending,
)

JOIN_INTERVAL_S: Final = 0.5
MEMBER_VALID_S: Final = 2.0
"""How long a process counts as a member after its last announcement."""

RENEWALS: Final = 3
"""How often a lease is renewed in its duration."""

MOVES_AT_ONCE: Final = 64
"""Most topics that are released to other members in one `JOIN_INTERVAL_S`, so that none waits until
all others are acquired."""

ACQUIRE_PAUSE_S: Final = 0.3
EXPIRY_PAUSE_S: Final = 1.0
"""Longest pauses between two attempts to acquire a topic: of a member, which releases it soon; of
an owner that died, whose lease has to expire."""

STATUS_AT_ONCE: Final = 16
"""Topics whose status is read at a time."""

MIN_READ: Final = 32
MAX_READ: Final = 512
"""Most entries of one read. The number doubles while there are more; no commit waits long behind a
read. A topic with few entries reserves little memory, so that many topics are read at a time."""

POLL_S: Final = 0.0003
"""Pause between two reads of topics that cannot be watched, for each of them; at least
`MIN_POLL_S`."""

MIN_POLL_S: Final = 0.01

RETRY_S: Final = 0.05
"""Pause before a topic is acquired again, doubled with each failure in a row up to 32 times."""

log = structlog.get_logger(__name__)


class LeasedTopic(ABC):
    """A topic that is assigned to this process, and which it owns while it has a `fence`.

    Each entry that was read and is not yet acknowledged is in memory. If it is not known what the
    store did with a call, all of it is forgotten, and read again under a new fence (`lose`).

    Attributes:
        fence: of the current acquisition; None if the topic is not owned.
    """

    def __init__(
        self,
        keys: TopicKeys,
        shared: SharedTopics[Any],
        *,
        min_read: int = MIN_READ,
        max_read: int = MAX_READ,
    ):
        self.keys = keys
        self.fence: str | None = None
        self._shared = shared
        self._min_read, self._max_read = min_read, max_read
        self._topics = shared.store
        self._number = self._known_number = 0
        self._failures = 0
        self._is_releasing = False
        self._unacknowledged: dict[bytes, None] = {}
        self._last_read = b""
        self._arrivals = Arrivals(self._topics, keys)

    # What subclasses do with the topic

    async def _prepare(self) -> None:  # noqa: B027
        """Read what the entries need, before the topic is owned; nothing by default."""

    @abstractmethod
    async def _process(self, entries: Sequence[Entry]) -> None:
        """Process entries that were read. The memory of each is freed once, when it is
        acknowledged or forgotten."""

    async def _drain(self) -> None:
        """Wait until no entry of the topic is processed, and forget them."""
        self._unacknowledged.clear()
        self._last_read = b""

    # Ownership

    async def run(self) -> None:
        """Acquire the topic and process its entries until it is released; acquire it again whenever
        it is lost."""
        while not self._is_releasing:
            try:
                if not await self._acquire():
                    continue
                await self._read_pending()
                await self._read_new()
            except CarryError as error:
                self.lose(error.detail)
            await self._drain()
            if self.fence is not None:
                await self._release()
            elif self._failures:
                await asyncio.sleep(RETRY_S * 2 ** min(5, self._failures - 1))

    def release(self) -> None:
        """Stop reading; `run` ends once what is processed is committed."""
        self._is_releasing = True
        self._arrivals.wake()

    async def _acquire(self) -> bool:
        """Try to acquire the topic; returns whether it is owned now."""
        shared, fence = self._shared, secrets.token_hex(8)
        held = await self._topics.acquire(
            self.keys, shared.name, fence, shared.lease_s, shared.start
        )
        if not held.is_held:
            await asyncio.sleep(min(held.left_s, shared.acquire_pause_s(held.owner)))
            return False
        if held.has_new_group:
            log.info("group_created", topic=self.keys.topic, group=self.keys.group)
        if claimed := await self._topics.claim(self.keys):
            log.info("entries_claimed", topic=self.keys.topic, entries=claimed)
        await self._prepare()
        self._number = self._known_number = 0
        self.fence = fence
        log.info("topic_acquired", topic=self.keys.topic, fence=fence)
        return True

    def lose(self, reason: str) -> None:
        """End the acquisition: the outcome of a call is unknown, or there is another owner. `run`
        acquires the topic again, unless another process has."""
        self._failures += 1
        self._shared.counts["losses"] += 1
        self.fence = None
        self._arrivals.wake()
        log.warning("topic_lost", topic=self.keys.topic, reason=reason)

    async def renew(self) -> None:
        """Renew the lease; lose the topic if it has another owner."""
        fence = self.fence
        if fence is None:
            return
        try:
            held = await self._lease(fence, self._shared.lease_s)
        except CarryError:
            # the fence decides, also after the lease has expired
            return
        if not held.is_held and self.fence == fence:
            self.lose(Unclear.FENCED.value)

    async def _release(self) -> None:
        fence, self.fence = self.fence, None
        if fence is not None:
            try:
                await self._lease(fence, 0)
            except CarryError as error:
                log.warning("topic_not_released", topic=self.keys.topic, reason=error.detail)
                return
            log.info("topic_released", topic=self.keys.topic)

    async def _lease(self, fence: str, lease_s: float) -> Ownership:
        number, floor = self._known_number, self._floor()
        return await self._topics.renew(self.keys, self._shared.name, fence, lease_s, number, floor)

    def _floor(self) -> bytes:
        """An id up to which every entry is acknowledged; empty if none is known."""
        oldest = next(iter(self._unacknowledged), None)
        return self._last_read if oldest is None else id_before(oldest)

    # Reading

    async def _read_pending(self) -> None:
        """Read the entries that earlier acquisitions left pending."""
        after = FIRST_PENDING
        while entries := (await self._read(after, self._min_read))[0]:
            after = entries[-1].id.decode()

    async def _read_new(self) -> None:
        """Read new entries until the topic is released or lost."""
        most = self._min_read
        self._arrivals.restart()
        while not self._is_releasing and self.fence is not None:
            entries, room = await self._read(NEW, most)
            if len(entries) == room:
                most = min(2 * most, self._max_read)
            elif not self._is_releasing and self.fence is not None:
                most = max(most // 2, self._min_read)
                await self._arrivals.wait(entries, self._shared.poll_s)

    async def _read(self, after: str, most: int) -> tuple[Sequence[Entry], int]:
        """Read and process entries, as many as there is memory for; returns them and that
        number."""
        room = await self._shared.reserve(most)
        entries: Sequence[Entry] = ()
        try:
            if (fence := self.fence) is not None and not self._is_releasing:
                read = await self._topics.read(self.keys, fence, after, room)
                if isinstance(read, Unclear):
                    self.lose(read.value)
                elif self.fence is not None:
                    entries = read
        finally:
            self._shared.release(room - len(entries))
        if entries:
            self._last_read = entries[-1].id
            self._unacknowledged |= dict.fromkeys(entry.id for entry in entries)
            await self._process(entries)
        return entries, room

    # Commits

    async def _commit(
        self, fence: str, items: Sequence[TopicItem], deadline_s: float
    ) -> Sequence[CommitResult] | None:
        """Commit items; None if the topic was lost."""
        self._number = number = self._number + 1
        results: Sequence[CommitResult] | None = None
        try:
            done = await self._topics.commit(self.keys, fence, number, items, deadline_s)
        except CarryError as error:
            reason = error.detail
        except Exception as error:  # a defect: nobody else would see it, and the entries would wait
            log.exception("commit_failed", topic=self.keys.topic)
            reason = repr(error)
        else:
            if isinstance(done, Unclear):
                reason = done.value
            else:
                results, reason = done, "".join(map(str, filter(is_not_pending, done)))
                if self.fence == fence:
                    self._known_number = number
        if reason and self.fence == fence:
            self.lose(reason)
        return results

    async def _acknowledge(self, items: Sequence[tuple[str, TopicItem]]) -> None:
        """Commit items without chunks, each with what it is counted as; the topic is lost if one
        fails."""
        deadline_s = time.monotonic() + self._shared.lease_s
        results = None
        if self.fence is not None:
            results = await self._commit(self.fence, [item for _, item in items], deadline_s)
        for at, (kind, item) in enumerate(items):
            if results is not None and results[at] is COMMITTED:
                self._shared.counts[kind] += len(item.ids)
                self._forget(item.ids)
            else:
                self._shared.release(len(item.ids))
                if results is not None and self.fence is not None:
                    self.lose(str(results[at]))

    def _forget(self, ids: Sequence[bytes]) -> None:
        """Free the memory of entries that are acknowledged."""
        self._failures = 0
        for entry_id in ids:
            self._unacknowledged.pop(entry_id, None)
        self._shared.release(len(ids))


AnyTopic = TypeVar("AnyTopic", bound=LeasedTopic)


class SharedTopics(ABC, Generic[AnyTopic]):
    """Topics that the processes of one pool share; `run` once, `stop` at any time.

    Args:
        keys: all of them.
        pool: name of the pool, whose members divide the topics.
        room: most entries in memory.

    Attributes:
        name: of this process, unique among all.
        counts: entries by result; and `losses` of topics.
        topics: the topics that are assigned to this process, by name.
        poll_s: pause between two reads of a topic that cannot be watched.
    """

    def __init__(
        self,
        store: Topics,
        keys: Sequence[TopicKeys],
        config: ConsumerConfig,
        *,
        pool: str,
        room: int,
    ):
        self.store = store
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.lease_s = config.lease_s
        self.start = config.start_id
        self.counts: Counter[str] = Counter()
        self.topics: dict[str, AnyTopic] = {}
        self.poll_s = MIN_POLL_S
        self._keys = {each.topic: each for each in keys}
        self._pool = pool
        self._room = room
        self._has_room = asyncio.Event()
        self._reserving = asyncio.Lock()
        self._stopped = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._members: set[str] = set()
        self._is_join_failing = False

    @abstractmethod
    def _make_topic(self, keys: TopicKeys) -> AnyTopic:
        """A topic that is assigned to this process."""

    async def check_is_stream(self, member: str, name: str, *, may_be_missing: bool) -> None:
        """Check that a topic is a stream, and that it exists unless it may be missing.

        Args:
            member: of the configuration that names it, for errors.

        Raises:
            OperatorError: naming what was expected and what came; StoreUnavailable
        """
        try:
            kind = await self.store.type_of(name)
        except StoreRefused as error:
            raise OperatorError(f"{member}: topic {name!r}: {error.detail}") from error
        if kind != "stream" and not (kind == "none" and may_be_missing):
            hint = ", or --create" if kind == "none" else ""
            got = "nothing" if kind == "none" else f"a {kind}"
            raise OperatorError(
                f"{member}: expected a stream {name!r} in the store{hint}; got {got}"
            )

    async def run(self) -> None:
        """Process entries until `stop`; then commit what is in progress, and release the topics.

        Raises:
            StoreUnavailable, StoreRefused: the store cannot be used at the start.
        """
        members = await self._join(MEMBER_VALID_S)
        log.info("consumer_joined", consumer=self.name, pool=self._pool, members=len(members))
        renewing = asyncio.create_task(self._renew_leases())
        try:
            while not self._stopped.is_set():
                self._assign(members)
                if renewing.done():
                    # raises what ended it
                    renewing.result()
                try:
                    async with asyncio.timeout(JOIN_INTERVAL_S):
                        await self._stopped.wait()
                except TimeoutError:
                    members = await self._try_join(members)
        finally:
            for topic in self.topics.values():
                topic.release()
            await asyncio.gather(*self._tasks.values())
            renewing.cancel()
            await self._try_join([], 0)

    def stop(self) -> None:
        """Shut down gracefully."""
        self._stopped.set()

    async def _join(self, valid_s: float) -> list[str]:
        return [*await self.store.join(self._pool, self.name, valid_s)]

    async def _try_join(self, members: list[str], valid_s: float = MEMBER_VALID_S) -> list[str]:
        """Join; returns the earlier members if the store does not answer, which is logged once."""
        try:
            members = await self._join(valid_s)
        except CarryError as error:
            if not self._is_join_failing:
                log.warning("members_unknown", reason=error.detail)
            self._is_join_failing = True
        else:
            self._is_join_failing = False
        return members

    def _assign(self, members: list[str]) -> None:
        """Acquire the topics that are assigned to this process, and release all others."""
        self._members = {*members, self.name}
        owners, moves = assign_topics([*self._keys], self._members), 0
        for name, owner in owners.items():
            task = self._tasks.get(name)
            if task is not None and task.done():
                # raises what ended it
                task.result()
                del self._tasks[name], self.topics[name]
                task = None
            if owner == self.name and task is None:
                topic = self.topics[name] = self._make_topic(self._keys[name])
                self._tasks[name] = asyncio.create_task(topic.run())
            elif owner != self.name and task is not None and moves < MOVES_AT_ONCE:
                self.topics[name].release()
                moves += 1
        self.poll_s = max(MIN_POLL_S, POLL_S * len(self.topics))

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self.lease_s / RENEWALS)
            await asyncio.gather(*[topic.renew() for topic in self.topics.values()])

    def acquire_pause_s(self, owner: str) -> float:
        """Longest pause between two attempts to acquire a topic of another owner."""
        return ACQUIRE_PAUSE_S if owner in self._members else EXPIRY_PAUSE_S

    def count_owned(self) -> int:
        """Count the topics that this process owns."""
        return sum(topic.fence is not None for topic in self.topics.values())

    def check(self, name: str = "topics") -> Check:
        """Check readiness: whether it owns the topics that are assigned to it."""
        owned, assigned = self.count_owned(), len(self.topics)
        return Check(name, owned == assigned, f"{owned} of {assigned} assigned topics owned")

    async def read_status(self) -> list[TopicStatus]:
        """Read how far the topics that it owns were read."""
        owned = [topic.keys for topic in self.topics.values() if topic.fence is not None]
        statuses: list[TopicStatus | None] = []
        # no commit waits long behind them
        for at in range(0, len(owned), STATUS_AT_ONCE):
            topics = owned[at : at + STATUS_AT_ONCE]
            statuses += await asyncio.gather(*map(self.store.status, topics))
        return [status for status in statuses if status is not None]

    # Memory for entries

    async def reserve(self, most: int) -> int:
        """Wait until entries may be read, in order of the calls; returns how many, which are
        reserved."""
        async with self._reserving:
            while self._room <= 0:
                self._has_room.clear()
                await self._has_room.wait()
            reserved = min(self._room, most)
            self._room -= reserved
            return reserved

    def release(self, count: int) -> None:
        """Free the memory of entries."""
        self._room += count
        if self._room > 0:
            self._has_room.set()
