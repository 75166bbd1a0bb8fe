"""Shards of the store that do not answer hold up their own streams alone.

A batch has chunks of many shards, the nodes of a cluster. It waits for all of them for `LATE_S`.
What a shard owes by then is waited for apart from the batch, which ends and leaves its slot to
others. For as long as anything is waited for like this the shard is late: its chunks leave their
batches before anything is done for them, and are judged once it answers. A chunk waits until its
deadline, as for a single server that does not answer.

A store that is one server has no shards, and its batches hold their slots.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Final, TypeVar

from service.domain import StreamKey
from service.engine.jobs import Release
from service.errors import CarryError, StoreUnavailable
from service.member import ChunkJob, Member
from service.state.protocol import StateStore

T = TypeVar("T")
X = TypeVar("X")

LATE_S: Final = 0.2
"""Longest that a batch waits for some shards; far longer than a shard that works takes."""

RETRY_AFTER_S: Final = 1.0


class Shards:
    """The shards of a store, as the batches of one model meet them.

    Args:
        most_waiting: chunks that may wait apart for shards that are late.
    """

    def __init__(self, store: StateStore, most_waiting: int):
        self._store = store
        self._most_waiting = most_waiting
        self._waiting = 0
        self._late: Counter[Hashable] = Counter()

    def is_late(self, key: StreamKey) -> bool:
        """Whether the shard of a stream is waited for."""
        return bool(self._late) and self._store.shard(key) in self._late

    def without_late(self, members: list[Member], release: Release) -> list[Member]:
        """The members whose shards answer; the others wait apart."""
        if not self._late:
            return members
        going: list[Member] = []
        for shard, group in self._grouped(members, lambda member: member.key).items():
            if shard in self._late:
                self.wait_apart(shard, group, release)
            else:
                going += group
        return going

    async def each(
        self,
        items: list[T],
        key: Callable[[T], StreamKey],
        work: Callable[[list[T]], Coroutine[Any, Any, X]],
        leave: Callable[[Hashable, list[T], asyncio.Task[X]], None],
    ) -> list[tuple[list[T], X]]:
        """Do the work of each shard's items at once; items and results of those that are done.

        Args:
            leave: takes the work of a shard that is late over, still under way.
        """
        groups = self._grouped(items, key)
        tasks = {shard: asyncio.create_task(work(group)) for shard, group in groups.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=LATE_S)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            await asyncio.wait(tasks.values())
            raise
        for shard, task in tasks.items():
            if not task.done():
                leave(shard, groups[shard], task)
        return [(groups[shard], task.result()) for shard, task in tasks.items() if task.done()]

    def wait_apart(self, shard: Hashable, members: list[Member], release: Release) -> None:
        """Judge the members once their shard answers; some, where too many wait already, never."""
        room = self._most_waiting - self._waiting
        for member in members[room:]:
            member.job.settle(
                StoreUnavailable(
                    f"{self._waiting} chunks wait for shards of the store that do not answer",
                    retry_after_s=RETRY_AFTER_S,
                )
            )
        if room > 0:
            self.go_apart(shard, members[:room], release, self._answered(members[:room]))

    def go_apart(
        self,
        shard: Hashable,
        members: list[Member],
        release: Release,
        work: Coroutine[Any, Any, list[ChunkJob]],
    ) -> None:
        """Let work for a shard that is late go on apart from its batch."""
        self._late[shard] += 1
        self._waiting += len(members)

        def done(_: object) -> None:
            self._waiting -= len(members)
            self._late[shard] -= 1
            if not self._late[shard]:
                del self._late[shard]

        release.apart([member.job for member in members], work).add_done_callback(done)

    async def _answered(self, members: list[Member]) -> list[ChunkJob]:
        """Wait until the members' shard answers; those to be judged then."""
        deadline_s = max(member.job.deadline_s for member in members)
        try:
            await self._store.load([members[0].key], None if deadline_s == math.inf else deadline_s)
        except StoreUnavailable as error:
            for member in members:
                member.job.settle(error)
        except CarryError:
            pass  # it answers, if not as it should
        left = [member.job for member in members if not member.job.settled]
        for job in left:
            job.attempts -= 1  # nothing was tried
        return left

    def _grouped(
        self, items: Iterable[T], key: Callable[[T], StreamKey]
    ) -> dict[Hashable, list[T]]:
        groups: dict[Hashable, list[T]] = {}
        for item in items:
            groups.setdefault(self._store.shard(key(item)), []).append(item)
        return groups
