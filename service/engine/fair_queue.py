"""Jobs, and the fair queue of one model: FIFO within a stream, round robin between requests.

A job is resolved exactly once, by whichever part gets to it first, and then calls its `on_result`.

At most one job of a stream is ready, its oldest, and none while a batch holds the stream. A batch
takes ready jobs round robin, one of each request at a time, as a router serves its flows. So a
stream with a long backlog, or a request of many items, gets no larger share of a batch than any
other waiting request. Taking a job and releasing a stream cost the same whatever the length of the
backlogs, but for moving the pointers of one; only `remove_expired` and `clear` visit all jobs.

Invariants: at most one job of a stream is ready or held; the jobs of a stream keep their order,
even if one is put back; the request at the front gives the first job of the next batch, so no
request starves, however many steps its job has.
"""

from __future__ import annotations

import asyncio
import math
import sys
from bisect import insort
from collections import deque
from collections.abc import Callable, Container, Coroutine, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
import structlog

from service.core.errors import CarryError

MAX_SKIPPED: Final = 64
"""How many jobs that do not fit into a batch may be skipped in favour of smaller ones."""

WINDOW_S: Final = 0.2
"""Length of one measurement; the rate is the mean of the new and the previous one."""

P = TypeVar("P")
R = TypeVar("R")

log = structlog.get_logger(__name__)


class BatchLimits(NamedTuple):
    """How large a batch may grow.

    Attributes:
        max_rows: jobs per batch.
        max_padded_steps: rows times the steps of the longest row; a longer job runs alone.
        long_steps: a job of more steps is a long job, which takes several runtime calls.
    """

    max_rows: int
    max_padded_steps: int
    long_steps: int = 2**31


class DrainRate(msgspec.Struct, eq=False):
    """The drain rate of one queue; use from one task at a time.

    Attributes:
        done: number of jobs done so far, counted by the owner.
        per_s: jobs done per second; None if unknown.
        since_s, before: when the measurement began, and the jobs done before it.
    """

    done: int = 0
    per_s: float | None = None
    since_s: float | None = None
    before: int = 0

    def note(self, now_s: float, waiting: int) -> None:
        """Note the number of waiting jobs; call after starting all jobs that may start."""
        if not waiting:
            self.per_s = self.since_s = None
            return
        if self.since_s is not None:
            seconds, done = now_s - self.since_s, self.done - self.before
            if seconds < WINDOW_S:
                return
            if done:
                rate = done / seconds
                self.per_s = rate if self.per_s is None else (self.per_s + rate) / 2
        self.since_s, self.before = now_s, self.done


class JobSpec(msgspec.Struct, Generic[P]):
    """Specification of a job, which a caller submits.

    Attributes:
        key: the stream; None for work without a stream.
        steps: its steps, on which the size of a batch depends.
    """

    payload: P
    key: Hashable | None
    steps: int


OnResult = Callable[[R | CarryError], None]
"""Called once with the result of a job, from the event loop; never before the job is queued."""


class Job(msgspec.Struct, Generic[P, R], eq=False):
    """One unit of work in the queue or in a batch.

    Attributes:
        submitted_s: time of submission, on the monotonic clock.
        deadline_s: time until which its caller waits, on the monotonic clock.
        request: identifies the request of several jobs that it came with; None if it came alone.
        number: position in the order of all jobs, counted by the queue.
        attempts: number of batches that it was in before.
        is_cancelled: its caller does not wait any more, and is not called.
        is_committing: its commit was sent, so it may have been applied even if it fails.
        is_out_of_order: an earlier job of its stream is being retried, so it has to be retried too.
    """

    payload: P
    key: Hashable | None
    steps: int
    submitted_s: float
    deadline_s: float
    on_result: OnResult[R]
    request: Hashable | None = None
    number: int = 0
    attempts: int = 0
    is_resolved: bool = False
    is_cancelled: bool = False
    is_committing: bool = False
    is_out_of_order: bool = False

    def resolve(self, result: R | CarryError) -> None:
        """Resolve the job with a result or an error; only the first call has an effect."""
        if self.is_resolved:
            return
        self.is_resolved = True
        if not self.is_cancelled:
            try:
                self.on_result(result)
            except Exception:
                # the other jobs of its batch are not affected
                log.exception("result_not_sent")


Work = Coroutine[Any, Any, Sequence[Job[Any, Any]]]


class RunningBatch(msgspec.Struct, eq=False):
    """A running batch; with it, the batch releases streams early and detaches jobs.

    Attributes:
        jobs: the jobs that are not detached.
        held: the streams that it holds: their next jobs wait until they are released.
        on_release, on_detach: called with what is released, and what is detached from it.
        has_slot: whether it counts as in flight; detached jobs do not.
        is_long: whether it occupies the slot of a long job.
        task: runs it; None before the start.
    """

    jobs: list[Job[Any, Any]]
    held: set[Hashable]
    on_release: Callable[[Iterable[Hashable]], None]
    on_detach: Callable[[RunningBatch, Sequence[Job[Any, Any]], Work], None]
    has_slot: bool = False
    is_long: bool = False
    task: asyncio.Task[None] | None = None

    def release_streams(self, keys: Iterable[Hashable]) -> None:
        """Let the next jobs of some streams run, in this order, before this batch ends."""
        released = [key for key in keys if key in self.held]
        self.held.difference_update(released)
        self.on_release(released)

    def detach(self, jobs: Sequence[Job[Any, Any]], work: Work) -> None:
        """Remove jobs from the batch and continue them in a task without a slot.

        Args:
            work: resolves the jobs; returns those to be retried.
        """
        self.on_detach(self, jobs, work)


class Backlog(msgspec.Struct, Generic[P, R], eq=False):
    """The waiting jobs of one stream, oldest first.

    Attributes:
        key: the stream; for a job without a stream, the job itself.
        is_held: whether a batch holds the stream.
        is_shedding: whether a job of the stream was rejected since the backlog was last empty.
        rate: at which its jobs start, once one has been released.
    """

    key: Hashable
    jobs: list[Job[P, R]]
    is_held: bool = False
    is_shedding: bool = False
    rate: DrainRate | None = None

    @property
    def per_s(self) -> float | None:
        """How many of the stream's jobs start per second; None if unknown."""
        return None if self.rate is None else self.rate.per_s

    def note_release(self, now_s: float) -> None:
        """Count a job whose stream was released towards the drain rate."""
        if self.rate is None:
            self.rate = DrainRate()
        self.rate.done += 1
        self.rate.note(now_s, len(self.jobs))

    def insert(self, job: Job[P, R]) -> None:
        """Insert a job by its number."""
        insort(self.jobs, job, key=attrgetter("number"))


class RoundRobin(Generic[P, R]):
    """Streams with a ready job, served round robin by request.

    Attributes:
        ready: number of streams.
    """

    __slots__ = ("_order", "_requests", "ready")

    def __init__(self) -> None:
        self.ready = 0
        # in service order: a stream whose job came alone, or a request of `_requests`
        self._order: deque[Hashable] = deque()
        self._requests: dict[Hashable, list[Backlog[P, R]]] = {}

    @property
    def requests(self) -> int:
        """Number of requests with a ready stream."""
        return len(self._order)

    @property
    def front(self) -> Job[P, R]:
        """The job that is taken next, if there is one."""
        return self._streams(self._order[0])[0].jobs[0]

    def add(self, *backlogs: Backlog[P, R], first: bool = False) -> None:
        """Add ready streams of a request behind its others, and a new request behind all others.

        Args:
            first: add them in front, and move their request in front of all others.
        """
        self.ready += len(backlogs)
        entries: Sequence[Hashable] = backlogs
        request = backlogs[0].jobs[0].request
        if request is not None:
            others = self._requests.get(request)
            if others is None:
                self._requests[request] = [*backlogs]
            elif first:
                others[:0] = backlogs
                self._order.remove(request)
            else:
                others += backlogs
                return
            entries = (request,)
        if first:
            self._order.extendleft(entries)
        else:
            self._order += entries

    def pop(self) -> Backlog[P, R]:
        """Take the next stream; its request then moves behind all others."""
        self.ready -= 1
        entry = self._order.popleft()
        if isinstance(entry, Backlog):
            return entry
        backlogs = self._requests[entry]
        backlog = backlogs.pop(0)
        if backlogs:
            self._order.append(entry)
        else:
            del self._requests[entry]
        return backlog

    def prune(self) -> None:
        """Drop the streams that have no job left."""
        backlogs = [*chain.from_iterable(map(self._streams, self._order))]
        self._order.clear()
        self._requests.clear()
        self.ready = 0
        for backlog in backlogs:
            if backlog.jobs:
                self.add(backlog)

    def _streams(self, entry: Hashable) -> Sequence[Backlog[P, R]]:
        """The streams of an entry of the order."""
        return (entry,) if isinstance(entry, Backlog) else self._requests[entry]


class FairQueue(Generic[P, R]):
    """The queue of one batcher.

    Jobs of more steps than `long_steps` are long. They are queued separately, since they may not
    always start, and never share a batch with short ones.

    Args:
        max_long: most batches of long jobs that may run at a time.

    Attributes:
        waiting: number of waiting jobs.
        long_batches: number of batches of long jobs that run; its owner counts those that end.
    """

    def __init__(self, limits: BatchLimits, max_long: int = 1):
        self._limits = limits
        self._max_long = max_long
        self._pushed = 0
        self._backlogs: dict[Hashable, Backlog[P, R]] = {}
        self._short: RoundRobin[P, R] = RoundRobin()
        self._long: RoundRobin[P, R] = RoundRobin()
        self.waiting = 0
        self.long_batches = 0

    @property
    def requests(self) -> int:
        """Number of requests with ready jobs."""
        return self._short.requests + self._long.requests

    @property
    def ready(self) -> int:
        """Number of ready jobs."""
        return self._short.ready + self._long.ready

    @property
    def startable(self) -> int:
        """Number of ready jobs that may start now."""
        may_start_long = self.long_batches < self._max_long
        return self._short.ready + (self._long.ready if may_start_long else 0)

    def backlog(self, key: Hashable) -> Backlog[P, R] | None:
        """The waiting jobs of a stream; None if there are none."""
        backlog = self._backlogs.get(key)
        return backlog if backlog is not None and backlog.jobs else None

    def are_idle(self, keys: Iterable[Hashable]) -> bool:
        """Whether no job of these streams waits or runs."""
        return self._backlogs.keys().isdisjoint(keys)

    def push(self, *jobs: Job[P, R]) -> None:
        """Add the jobs of a request, each behind the others of its stream."""
        self.waiting += len(jobs)
        backlogs, long_steps = self._backlogs, self._limits.long_steps
        short: list[Backlog[P, R]] = []
        long: list[Backlog[P, R]] = []
        for job in jobs:
            job.number = self._pushed = self._pushed + 1
            key = job if job.key is None else job.key
            backlog = backlogs.get(key)
            if backlog is None:
                backlog = backlogs[key] = Backlog(key, [job])
            else:
                backlog.jobs.append(job)
                if backlog.is_held or len(backlog.jobs) > 1:
                    continue
            (long if job.steps > long_steps else short).append(backlog)
        if short:
            self._short.add(*short)
        if long:
            self._long.add(*long)

    def put_back(self, job: Job[P, R]) -> None:
        """Requeue a job at its old place."""
        self.waiting += 1
        key = job if job.key is None else job.key
        backlog = self._backlogs.setdefault(key, Backlog(key, []))
        backlog.insert(job)
        if not backlog.is_held and len(backlog.jobs) == 1:
            self._queue_of(job).add(backlog, first=True)

    def release(
        self, keys: Iterable[Hashable], now_s: float, first: Container[Hashable] = frozenset()
    ) -> bool:
        """Make the next jobs of held streams ready, those of `first` before all others; returns
        whether any stream has one."""
        backlogs, has_next = self._backlogs, False
        for key in keys:
            backlog = backlogs[key]
            if not backlog.jobs:
                del backlogs[key]
                continue
            backlog.is_held = False
            self._queue_of(backlog.jobs[0]).add(backlog, first=key in first)
            backlog.note_release(now_s)
            has_next = True
        return has_next

    def take(
        self, now_s: float, most_rows: int = sys.maxsize
    ) -> tuple[list[Job[P, R]], list[Job[P, R]]]:
        """Take the jobs of the next batch and hold their streams.

        Args:
            most_rows: most jobs of the batch, where the limits allow more.

        Returns:
            The jobs, none if none may start, and the expired ones before them, which are dropped.
        """
        max_rows, max_padded, long_steps = self._limits
        max_rows = min(max_rows, most_rows)
        is_long = self._long.ready > 0 and self._starts_with_long()
        queue = self._long if is_long else self._short
        jobs: list[Job[P, R]] = []
        expired: list[Job[P, R]] = []
        skipped: list[Backlog[P, R]] = []
        longest, has_moved = 0, False
        while queue.ready and len(jobs) < max_rows and len(skipped) < MAX_SKIPPED:
            backlog = queue.pop()
            waiting = backlog.jobs
            while waiting and (waiting[0].is_cancelled or waiting[0].deadline_s <= now_s):
                expired.append(waiting.pop(0))
            if not waiting:
                del self._backlogs[backlog.key]
                continue
            job = waiting[0]
            steps = job.steps
            if (steps > long_steps) != is_long:
                # its front job has changed since it was queued: it belongs to the other queue
                self._queue_of(job).add(backlog, first=True)
                has_moved = True
                continue
            if steps > longest:
                if jobs and (len(jobs) + 1) * steps > max_padded:
                    skipped.append(backlog)
                    continue
                longest = steps
                max_rows = min(max_rows, max_padded // longest)
            del waiting[0]
            if job.key is None:
                del self._backlogs[job]
            else:
                backlog.is_held = True
            jobs.append(job)
        self.waiting -= len(jobs) + len(expired)
        for backlog in reversed(skipped):
            queue.add(backlog, first=True)
        if jobs:
            self.long_batches += is_long
        elif has_moved:
            jobs, more = self.take(now_s, most_rows)
            expired += more
        return jobs, expired

    def remove_expired(self, now_s: float) -> list[Job[P, R]]:
        """Drop the jobs that were cancelled or whose deadline passed, and return them."""
        expired: list[Job[P, R]] = []
        for backlog in list(self._backlogs.values()):
            live: list[Job[P, R]] = []
            for job in backlog.jobs:
                (expired if job.is_cancelled or job.deadline_s <= now_s else live).append(job)
            backlog.jobs = live
            if not live and not backlog.is_held:
                del self._backlogs[backlog.key]
        self.waiting -= len(expired)
        self._short.prune()
        self._long.prune()
        return expired

    def clear(self) -> list[Job[P, R]]:
        """Drop all jobs and return them."""
        return self.remove_expired(math.inf)

    def jobs(self) -> Iterator[Job[P, R]]:
        """The waiting jobs, stream by stream."""
        return chain.from_iterable(backlog.jobs for backlog in self._backlogs.values())

    def _queue_of(self, job: Job[P, R]) -> RoundRobin[P, R]:
        return self._long if job.steps > self._limits.long_steps else self._short

    def _starts_with_long(self) -> bool:
        """Whether the oldest of the jobs at the front that may start is a long one."""
        short, is_allowed = self._short, self.long_batches < self._max_long
        return is_allowed and (not short.ready or self._long.front.number < short.front.number)
