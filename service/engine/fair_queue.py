"""Jobs, and the fair queue of one model: FIFO within a stream, round robin between requests.

A job is resolved exactly once, by whichever part gets to it first, and then calls its `on_result`.
A caller that awaits the results of several jobs has a ticket, whose future completes with the last.

At most one job of a stream is ready, its oldest, and none while a batch holds the stream. A batch
takes ready jobs round robin, one of each request at a time, as a router serves its flows. So a
stream with a long backlog, or a request of many items, gets no larger share of a batch than any
other waiting request. Taking a job and releasing a stream cost the same whatever the length of the
backlogs; only `remove` and `clear` visit all jobs.

Invariants: at most one job of a stream is ready or held; the jobs of a stream keep their order,
even if one is put back; the request at the front gives the first job of the next batch, so no
request starves, however many steps its job has.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import (
    Awaitable,
    Callable,
    Container,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Sequence,
)
from itertools import chain
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


class DrainRate:
    """The drain rate of one queue; use from one task at a time.

    Attributes:
        done: number of jobs done so far, counted by the owner.
        per_s: jobs done per second; None if unknown.
    """

    __slots__ = ("_before", "_since_s", "done", "per_s")

    def __init__(self) -> None:
        self.done = 0
        self.per_s: float | None = None
        self._before = 0
        self._since_s: float | None = None

    def note(self, now_s: float, waiting: int) -> None:
        """Note the number of waiting jobs; call after starting all jobs that may start."""
        if not waiting:
            self.per_s = self._since_s = None
            return
        if self._since_s is not None:
            seconds, done = now_s - self._since_s, self.done - self._before
            if seconds < WINDOW_S:
                return
            if done:
                rate = done / seconds
                self.per_s = rate if self.per_s is None else (self.per_s + rate) / 2
        self._since_s, self._before = now_s, self.done


class JobSpec(msgspec.Struct, Generic[P], frozen=True):
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
        number: position in the order of all jobs.
        submitted_s: time of submission, on the monotonic clock.
        deadline_s: time until which its caller waits, on the monotonic clock.
        request: identifies the request of several jobs that it came with; None if it came alone.
        attempts: number of batches that it was in before.
        is_cancelled: its caller does not wait any more, and is not called.
        is_committing: its commit was sent, so it may have been applied even if it fails.
        is_out_of_order: an earlier job of its stream is being retried, so it has to be retried too.
    """

    payload: P
    key: Hashable | None
    steps: int
    number: int
    submitted_s: float
    deadline_s: float
    on_result: OnResult[R]
    request: Hashable | None = None
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


class RunningBatch:
    """A running batch; with it, the batch releases streams early and detaches jobs.

    Attributes:
        jobs: the jobs that are not detached.
        held: the streams that it holds: their next jobs wait until they are released.
        task: runs it; None before the start.
        is_long: whether it occupies the slot of a long job.
    """

    __slots__ = ("_on_detach", "_on_release", "held", "is_long", "jobs", "task")

    def __init__(
        self,
        jobs: list[Job[Any, Any]],
        held: set[Hashable],
        on_release: Callable[[Iterable[Hashable]], None],
        on_detach: Callable[[RunningBatch, Sequence[Job[Any, Any]], Work], None],
        *,
        is_long: bool = False,
    ):
        self.jobs = jobs
        self.held = held
        self.task: asyncio.Task[None] | None = None
        self.is_long = is_long
        self._on_release = on_release
        self._on_detach = on_detach

    def release_streams(self, keys: Iterable[Hashable]) -> None:
        """Let the next jobs of some streams run, in this order, before this batch ends."""
        released = [key for key in keys if key in self.held]
        self.held.difference_update(released)
        self._on_release(released)

    def detach(self, jobs: Sequence[Job[Any, Any]], work: Work) -> None:
        """Remove jobs from the batch and continue them in a task without a slot.

        Args:
            work: resolves the jobs; returns those to be retried.
        """
        self._on_detach(self, jobs, work)


Run = Callable[[list[Any], RunningBatch], Awaitable[Sequence[Job[P, R]]]]
"""Runs a batch: resolves its jobs, each of another stream, and returns those to be retried. May
release a stream before it ends, once the stream's next job can be computed."""


class Backlog(msgspec.Struct, Generic[P, R], eq=False):
    """The waiting jobs of one stream, oldest first.

    Attributes:
        key: the stream; for a job without a stream, the job itself.
        is_held: whether a batch holds the stream.
        is_shedding: whether a job of the stream was rejected since the backlog was last empty.
        rate: at which its jobs start, once one has been released.
    """

    key: Hashable
    jobs: deque[Job[P, R]]
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
        """Insert a job by its number; linear in the number of older jobs, which are few."""
        at = 0
        while at < len(self.jobs) and self.jobs[at].number < job.number:
            at += 1
        self.jobs.insert(at, job)


ReadyRequests = OrderedDict[Hashable, Backlog[P, R] | deque[Backlog[P, R]]]
"""Ready streams by request, in service order. The key is the backlog for a request of one job, and
`Job.request` for any other."""


class RoundRobin(Generic[P, R]):
    """Streams with a ready job, served round robin by request.

    Attributes:
        ready: number of streams.
    """

    __slots__ = ("_requests", "ready")

    def __init__(self) -> None:
        self.ready = 0
        self._requests: ReadyRequests[P, R] = OrderedDict()

    @property
    def requests(self) -> int:
        """Number of requests with a ready stream."""
        return len(self._requests)

    @property
    def front(self) -> Job[P, R] | None:
        """The job that is taken next."""
        for request in self._requests.values():
            return (request if isinstance(request, Backlog) else request[0]).jobs[0]
        return None

    def add(self, *backlogs: Backlog[P, R], first: bool = False) -> None:
        """Add ready streams of a request behind its others, and a new request behind all others.

        Args:
            first: add them in front, and move their request in front of all others.
        """
        self.ready += len(backlogs)
        key = backlogs[0].jobs[0].request
        if key is None:
            [backlog] = backlogs
            self._requests[key := backlog] = backlog
        else:
            request = self._requests.setdefault(key, deque())
            if not isinstance(request, Backlog):
                (request.extendleft if first else request.extend)(backlogs)
        if first:
            self._requests.move_to_end(key, last=False)

    def pop(self) -> Backlog[P, R]:
        """Take the next stream; its request then moves behind all others."""
        self.ready -= 1
        key, request = next(iter(self._requests.items()))
        backlog = request if isinstance(request, Backlog) else request.popleft()
        if backlog is request or not request:
            del self._requests[key]
        else:
            self._requests.move_to_end(key)
        return backlog

    def prune(self) -> None:
        """Drop the streams that have no job left."""
        requests, self._requests = self._requests, OrderedDict()
        self.ready = 0
        for request in requests.values():
            for backlog in (request,) if isinstance(request, Backlog) else request:
                if backlog.jobs:
                    self.add(backlog)


class FairQueue(Generic[P, R]):
    """The queue of one batcher; its length is the number of waiting jobs.

    Jobs of more steps than `long_steps` are long. They are queued separately, since they may not
    always run, and never share a batch with short ones.
    """

    def __init__(self, limits: BatchLimits):
        self._limits = limits
        self._length = 0
        self._backlogs: dict[Hashable, Backlog[P, R]] = {}
        self._short: RoundRobin[P, R] = RoundRobin()
        self._long: RoundRobin[P, R] = RoundRobin()

    def __len__(self) -> int:
        return self._length

    @property
    def requests(self) -> int:
        """Number of requests with ready jobs."""
        return self._short.requests + self._long.requests

    def ready(self, *, long_ones: bool = True) -> int:
        """Number of jobs that may be taken now."""
        return self._short.ready + (self._long.ready if long_ones else 0)

    def backlog(self, key: Hashable) -> Backlog[P, R] | None:
        """The waiting jobs of a stream; None if there are none."""
        backlog = self._backlogs.get(key)
        return backlog if backlog is not None and backlog.jobs else None

    def are_idle(self, keys: Iterable[Hashable]) -> bool:
        """Whether no job of these streams waits or runs."""
        return self._backlogs.keys().isdisjoint(keys)

    def push(self, *jobs: Job[P, R], long_ones: bool = True) -> bool:
        """Add the jobs of a request, each behind the others of its stream.

        Returns whether one of them may be taken now; `long_ones` as for `take`.
        """
        self._length += len(jobs)
        backlogs, long_steps = self._backlogs, self._limits.long_steps
        short: list[Backlog[P, R]] = []
        long: list[Backlog[P, R]] = []
        for job in jobs:
            key = job if job.key is None else job.key
            backlog = backlogs.get(key)
            if backlog is None:
                backlog = backlogs[key] = Backlog(key, deque((job,)))
            else:
                backlog.jobs.append(job)
                if backlog.is_held or len(backlog.jobs) > 1:
                    continue
            (long if job.steps > long_steps else short).append(backlog)
        if short:
            self._short.add(*short)
        if long:
            self._long.add(*long)
        return bool(short or (long_ones and long))

    def put_back(self, job: Job[P, R]) -> None:
        """Requeue a job at its old place."""
        self._length += 1
        key = job if job.key is None else job.key
        backlog = self._backlogs.setdefault(key, Backlog(key, deque()))
        backlog.insert(job)
        if not backlog.is_held and len(backlog.jobs) == 1:
            self._queue_of(job).add(backlog, first=True)

    def release(
        self, *keys: Hashable, first: Container[Hashable] = frozenset()
    ) -> list[Backlog[P, R]]:
        """Make the next jobs of held streams ready, those of `first` before all others.

        Returns the backlogs of those that have one.
        """
        backlogs = self._backlogs
        waiting: list[Backlog[P, R]] = []
        for key in keys:
            backlog = backlogs[key]
            if not backlog.jobs:
                del backlogs[key]
                continue
            backlog.is_held = False
            self._queue_of(backlog.jobs[0]).add(backlog, first=key in first)
            waiting.append(backlog)
        return waiting

    def take(
        self, expire: Callable[[Job[P, R]], bool] | None = None, *, long_ones: bool = True
    ) -> list[Job[P, R]]:
        """Take the jobs of the next batch and hold their streams; empty if none may run.

        Args:
            expire: called with a job before it is taken; if it returns True, the job is dropped.
            long_ones: whether long jobs may be taken too.
        """
        max_rows, max_padded, long_steps = self._limits
        is_long = long_ones and self._long.ready > 0 and self._is_older(self._long, self._short)
        queue = self._long if is_long else self._short
        jobs: list[Job[P, R]] = []
        skipped: list[Backlog[P, R]] = []
        longest, has_moved = 0, False
        while queue.ready and len(jobs) < max_rows and len(skipped) < MAX_SKIPPED:
            backlog = queue.pop()
            if expire is not None and not self._drop_expired(backlog, expire):
                continue
            job = backlog.jobs[0]
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
            backlog.jobs.popleft()
            if job.key is None:
                del self._backlogs[job]
            else:
                backlog.is_held = True
            jobs.append(job)
        self._length -= len(jobs)
        for backlog in reversed(skipped):
            queue.add(backlog, first=True)
        return self.take(expire, long_ones=long_ones) if has_moved and not jobs else jobs

    def remove(self, is_dead: Callable[[Job[P, R]], bool]) -> list[Job[P, R]]:
        """Drop the jobs whose caller is not waiting any more, and return them."""
        removed: list[Job[P, R]] = []
        for backlog in list(self._backlogs.values()):
            live: deque[Job[P, R]] = deque()
            for job in backlog.jobs:
                (removed if is_dead(job) else live).append(job)
            backlog.jobs = live
            if not live and not backlog.is_held:
                del self._backlogs[backlog.key]
        self._length -= len(removed)
        self._short.prune()
        self._long.prune()
        return removed

    def clear(self) -> list[Job[P, R]]:
        """Drop all jobs and return them."""
        return self.remove(lambda _: True)

    def jobs(self) -> Iterator[Job[P, R]]:
        """The waiting jobs, stream by stream."""
        return chain.from_iterable(backlog.jobs for backlog in self._backlogs.values())

    def _queue_of(self, job: Job[P, R]) -> RoundRobin[P, R]:
        return self._long if job.steps > self._limits.long_steps else self._short

    def _is_older(self, one: RoundRobin[P, R], other: RoundRobin[P, R]) -> bool:
        """Whether the front job of one queue is older than that of the other."""
        first, second = one.front, other.front
        return second is None or (first is not None and first.number < second.number)

    def _drop_expired(self, backlog: Backlog[P, R], expire: Callable[[Job[P, R]], bool]) -> bool:
        """Drop the expired jobs at the front of a backlog; returns whether any job is left."""
        while backlog.jobs:
            if not expire(backlog.jobs[0]):
                return True
            backlog.jobs.popleft()
            self._length -= 1
        del self._backlogs[backlog.key]
        return False
