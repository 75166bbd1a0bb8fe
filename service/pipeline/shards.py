"""Isolates unresponsive shards (bulkheads): a hanging cluster node blocks its own streams only.

The chunks of a batch belong to many shards, the nodes of a cluster, and the batch waits for all of
them, `SHARD_TIMEOUT_S` at most. The jobs of a shard that has not answered by then are detached:
their work continues in a task of its own, and the batch ends and frees its slot. While detached
work waits for a shard, the shard counts as unresponsive, and its chunks are detached before they
are loaded; they are requeued once it answers. A chunk waits until its deadline, as it does for a
single server that hangs.

A store on a single server has no shards, and its batches keep their slots.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Final, TypeVar

from service.core.errors import CarryError, StoreUnavailable
from service.core.values import StreamKey
from service.engine.fair_queue import RunningBatch
from service.pipeline.chunk_job import ChunkJob
from service.store.base import StateStore

T = TypeVar("T")
X = TypeVar("X")

SHARD_TIMEOUT_S: Final = 0.2
"""How long a batch waits for its slowest shard: far longer than a healthy shard takes."""

RETRY_AFTER_S: Final = 1.0


class Shards:
    """Tracks which shards of a store are unresponsive, for the batches of one model.

    Args:
        max_detached: most chunks that may wait for unresponsive shards.

    Attributes:
        unresponsive: the unresponsive shards, with the number of tasks that wait for each.
    """

    def __init__(self, store: StateStore, max_detached: int):
        self._store = store
        self._max_detached = max_detached
        self._detached = 0
        self.unresponsive: Counter[Hashable] = Counter()

    def is_unresponsive(self, key: StreamKey) -> bool:
        """Whether detached work is waiting for the shard of a stream."""
        return bool(self.unresponsive) and self._store.shard(key) in self.unresponsive

    def detach_unresponsive(self, jobs: list[ChunkJob], batch: RunningBatch) -> list[ChunkJob]:
        """Detach the jobs whose shards are unresponsive; returns the others."""
        responsive: list[ChunkJob] = []
        for shard, group in self._group_by_shard(jobs, lambda job: job.payload.key).items():
            if shard in self.unresponsive:
                self.detach_until_answer(shard, group, batch)
            else:
                responsive += group
        return responsive

    async def read(
        self,
        jobs: list[ChunkJob],
        read: Callable[[list[ChunkJob]], Coroutine[Any, Any, list[X]]],
        batch: RunningBatch,
    ) -> list[tuple[ChunkJob, X]]:
        """Read from every job's stream; jobs of shards that time out are detached.

        Args:
            read: returns one result for each of the jobs that it is called with.
        """

        def on_timeout(shard: Hashable, group: list[ChunkJob], task: asyncio.Task[list[X]]) -> None:
            task.cancel()
            self.detach_until_answer(shard, group, batch)

        if self._store.shard(jobs[0].payload.key) is None:
            return list(zip(jobs, await read(jobs), strict=True))
        results = await self.run_by_shard(jobs, lambda job: job.payload.key, read, on_timeout)
        return [pair for group, values in results for pair in zip(group, values, strict=True)]

    async def run_by_shard(
        self,
        items: list[T],
        key: Callable[[T], StreamKey],
        work: Callable[[list[T]], Coroutine[Any, Any, X]],
        on_timeout: Callable[[Hashable, list[T], asyncio.Task[X]], None],
    ) -> list[tuple[list[T], X]]:
        """Run work on the items of each shard concurrently.

        Args:
            on_timeout: takes over the task of a shard that does not finish in time.

        Returns:
            The items of each shard that finished in time, with the result of their work.
        """
        groups = self._group_by_shard(items, key)
        tasks = {shard: asyncio.create_task(work(group)) for shard, group in groups.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=SHARD_TIMEOUT_S)
        except asyncio.CancelledError:
            for task in tasks.values():
                task.cancel()
            await asyncio.wait(tasks.values())
            raise
        for shard, task in tasks.items():
            if not task.done():
                on_timeout(shard, groups[shard], task)
        return [(groups[shard], task.result()) for shard, task in tasks.items() if task.done()]

    def detach_until_answer(
        self, shard: Hashable, jobs: list[ChunkJob], batch: RunningBatch
    ) -> None:
        """Detach jobs until their shard answers, then requeue them.

        Those beyond `max_detached` fail with StoreUnavailable.
        """
        # detached commits count, but are never rejected: there may be more than the bound
        room = max(0, self._max_detached - self._detached)
        for job in jobs[room:]:
            job.resolve(
                StoreUnavailable(
                    f"{self._detached} chunks wait for shards of the store that do not answer",
                    retry_after_s=RETRY_AFTER_S,
                )
            )
        if room:
            self.detach(shard, jobs[:room], batch, self._wait_for_answer(jobs[:room]))

    def detach(
        self,
        shard: Hashable,
        jobs: list[ChunkJob],
        batch: RunningBatch,
        work: Coroutine[Any, Any, list[ChunkJob]],
    ) -> None:
        """Continue work on an unresponsive shard outside of its batch.

        Args:
            work: returns the jobs to be retried.
        """
        self.unresponsive[shard] += 1
        self._detached += len(jobs)

        async def counted() -> list[ChunkJob]:
            try:
                return await work
            finally:
                self._detached -= len(jobs)
                self.unresponsive[shard] -= 1
                if not self.unresponsive[shard]:
                    del self.unresponsive[shard]

        batch.detach(jobs, counted())

    async def _wait_for_answer(self, jobs: list[ChunkJob]) -> list[ChunkJob]:
        """Wait until the jobs' shard answers; returns the jobs to be retried."""
        deadline_s = max(job.deadline_s for job in jobs)
        try:
            await self._store.load([jobs[0].payload.key], deadline_s)
        except StoreUnavailable as error:
            for job in jobs:
                job.resolve(error)
        except CarryError:
            pass  # an error is an answer, too
        waiting = [job for job in jobs if not job.is_resolved]
        for job in waiting:
            job.attempts -= 1  # waiting is no attempt
        return waiting

    def _group_by_shard(
        self, items: Iterable[T], key: Callable[[T], StreamKey]
    ) -> dict[Hashable, list[T]]:
        groups: dict[Hashable, list[T]] = {}
        for item in items:
            groups.setdefault(self._store.shard(key(item)), []).append(item)
        return groups
