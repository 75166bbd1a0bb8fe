"""The waiting jobs of one model: in order within a stream, in rotation between requests.

A stream has at most one ready job, its oldest, and none while a batch holds it. A batch takes ready
jobs in rotation, one of each request in its turn (round robin, as a router serves its flows). So a
stream with a long backlog, or a request of many items, gets no more of a batch than any other
request while others wait. Taking a job and releasing a stream cost the same however long the
backlogs are; only `sweep` and `clear` look at all jobs.

Invariants: at most one job of a stream is ready or held; jobs of one stream keep their order, also
one that is put back; the request at the front gives the first job of the next batch, so nobody
starves, however many steps that job needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final, Generic, NamedTuple

from service.engine.drain_rate import DrainRate
from service.engine.jobs import Job, P, R, Ticket
from service.engine.policy import BatchLimits

MOST_PASSED: Final = 64
"""How many jobs that do not fit into a batch are passed over for smaller ones."""


class Backlog(Generic[P, R]):
    """The waiting jobs of one stream, oldest first.

    Attributes:
        key: the stream; of a job that continues no stream, the job.
        is_held: whether a batch holds the stream.
        per_s: how many of the stream's jobs are begun in a second; None where that is not known.
        is_refusing: whether a job was refused since the stream was idle.
    """

    __slots__ = ("_rate", "is_held", "is_refusing", "jobs", "key")

    def __init__(self, key: Hashable):
        self.key = key
        self.jobs: deque[Job[P, R]] = deque()
        self.is_held = self.is_refusing = False
        self._rate: DrainRate | None = None

    @property
    def per_s(self) -> float | None:
        return None if self._rate is None else self._rate.per_s

    def note_turn(self, now_s: float) -> None:
        """Another job may begin."""
        if self._rate is None:
            self._rate = DrainRate()
        self._rate.done += 1
        self._rate.note(now_s, len(self.jobs))

    def insert(self, job: Job[P, R]) -> None:
        """Add a job where its number says, which is near the front."""
        at = 0
        while at < len(self.jobs) and self.jobs[at].number < job.number:
            at += 1
        self.jobs.insert(at, job)


class ManyReady(NamedTuple, Generic[P, R]):
    """The ready streams of a request with more than one job."""

    ticket: Ticket[Any]
    backlogs: deque[Backlog[P, R]]


class Rotation(Generic[P, R]):
    """Streams with a ready job, by the requests of these jobs.

    Attributes:
        ready: how many streams.
    """

    __slots__ = ("_of_many", "_turns", "ready")

    def __init__(self) -> None:
        self.ready = 0
        self._turns: deque[Backlog[P, R] | ManyReady[P, R]] = deque()
        self._of_many: dict[Ticket[Any], ManyReady[P, R]] = {}

    @property
    def requests(self) -> int:
        """How many requests."""
        return len(self._turns)

    @property
    def front(self) -> Job[P, R] | None:
        """The job whose turn it is."""
        if not self._turns:
            return None
        turn = self._turns[0]
        return (turn if isinstance(turn, Backlog) else turn.backlogs[0]).jobs[0]

    def add(self, backlog: Backlog[P, R], *, first: bool = False) -> None:
        """Add a stream behind others of its request, or before them; a request that had none has
        its turn after all others, or before them."""
        self.ready += 1
        ticket = backlog.jobs[0].ticket
        turn: Backlog[P, R] | ManyReady[P, R] = backlog
        if ticket.jobs > 1:
            many = self._of_many.get(ticket)
            if many is not None:
                if first:
                    many.backlogs.appendleft(backlog)
                else:
                    many.backlogs.append(backlog)
                return
            turn = self._of_many[ticket] = ManyReady(ticket, deque((backlog,)))
        if first:
            self._turns.appendleft(turn)
        else:
            self._turns.append(turn)

    def pop(self) -> Backlog[P, R]:
        """Take the stream whose turn it is; its request's next turn comes after all others'."""
        self.ready -= 1
        turn = self._turns.popleft()
        if isinstance(turn, Backlog):
            return turn
        backlog = turn.backlogs.popleft()
        if turn.backlogs:
            self._turns.append(turn)
        else:
            del self._of_many[turn.ticket]
        return backlog

    def prune(self) -> None:
        """Drop the streams whose jobs are gone."""
        turns, self._turns = self._turns, deque()
        self._of_many.clear()
        self.ready = 0
        for turn in turns:
            for backlog in (turn,) if isinstance(turn, Backlog) else turn.backlogs:
                if backlog.jobs:
                    self.add(backlog)


class FairQueue(Generic[P, R]):
    """The queue of one batcher; its length is the number of waiting jobs.

    Jobs of more steps than `long_steps` are long. They have a rotation of their own, since they may
    not always run, and share no batch with others.
    """

    def __init__(self, limits: BatchLimits):
        self._limits = limits
        self._length = 0
        self._backlogs: dict[Hashable, Backlog[P, R]] = {}
        self._short: Rotation[P, R] = Rotation()
        self._long: Rotation[P, R] = Rotation()

    def __len__(self) -> int:
        return self._length

    @property
    def requests(self) -> int:
        """Requests with ready jobs."""
        return self._short.requests + self._long.requests

    def ready(self, *, long_ones: bool = True) -> int:
        """Jobs that may be taken now."""
        return self._short.ready + (self._long.ready if long_ones else 0)

    def backlog(self, key: Hashable) -> Backlog[P, R] | None:
        """Of a stream with waiting jobs."""
        backlog = self._backlogs.get(key)
        return backlog if backlog is not None and backlog.jobs else None

    def push(self, job: Job[P, R]) -> bool:
        """Add a job behind those of its stream; whether it is ready."""
        self._length += 1
        key = job if job.key is None else job.key
        backlog = self._backlogs.get(key)
        if backlog is None:
            backlog = self._backlogs[key] = Backlog(key)
        elif backlog.is_held or backlog.jobs:
            backlog.jobs.append(job)
            return False
        backlog.jobs.append(job)
        self._rotation(job).add(backlog)
        return True

    def put_back(self, job: Job[P, R]) -> None:
        """Return a job that was taken to its old place."""
        self._length += 1
        key = job if job.key is None else job.key
        backlog = self._backlogs.get(key)
        if backlog is None:
            backlog = self._backlogs[key] = Backlog(key)
        backlog.insert(job)
        if not backlog.is_held and len(backlog.jobs) == 1:
            self._rotation(job).add(backlog, first=True)

    def release(self, key: Hashable, *, first: bool = False) -> Backlog[P, R] | None:
        """Let the next job of a held stream be taken; the backlog, if there is one.

        Args:
            first: before all others.
        """
        backlog = self._backlogs[key]
        backlog.is_held = False
        if not backlog.jobs:
            del self._backlogs[key]
            return None
        self._rotation(backlog.jobs[0]).add(backlog, first=first)
        return backlog

    def take(
        self, is_live: Callable[[Job[P, R]], bool] | None = None, *, long_ones: bool = True
    ) -> list[Job[P, R]]:
        """The jobs of the next batch, their streams held from now on; empty where none may run.

        Args:
            is_live: whether a job is still to be done, and is dropped otherwise; None: all are.
            long_ones: whether long jobs may be taken.
        """
        max_rows, max_padded, long_steps = self._limits
        rotation = self._short
        if long_ones and self._long.ready and self._is_older(self._long, self._short):
            rotation = self._long
        jobs: list[Job[P, R]] = []
        passed: list[Backlog[P, R]] = []
        longest = rows = 0
        while rotation.ready and rows < max_rows and len(passed) < MOST_PASSED:
            backlog = rotation.pop()
            if is_live is not None and not self._drop_dead(backlog, is_live):
                continue
            job = backlog.jobs[0]
            steps = job.steps
            if (steps > long_steps) != (rotation is self._long):
                self._rotation(job).add(backlog, first=True)
                continue
            widest = steps if steps > longest else longest
            if rows and (rows + 1) * widest > max_padded:
                passed.append(backlog)
                continue
            del backlog.jobs[0]
            if job.key is None:
                del self._backlogs[job]
            else:
                backlog.is_held = True
            jobs.append(job)
            rows, longest = rows + 1, widest
            if (rows + 1) * longest > max_padded:
                # Nothing more fits, not even one step.
                break
        self._length -= rows
        for backlog in reversed(passed):
            rotation.add(backlog, first=True)
        return jobs

    def sweep(self, is_live: Callable[[Job[P, R]], bool]) -> None:
        """Drop every job that need not be done any more."""
        for backlog in list(self._backlogs.values()):
            live = deque(job for job in backlog.jobs if is_live(job))
            self._length -= len(backlog.jobs) - len(live)
            backlog.jobs = live
            if not live and not backlog.is_held:
                del self._backlogs[backlog.key]
        self._short.prune()
        self._long.prune()

    def clear(self) -> list[Job[P, R]]:
        """Drop all jobs; returns them."""
        jobs = [job for backlog in self._backlogs.values() for job in backlog.jobs]
        self.sweep(lambda _: False)
        return jobs

    def _rotation(self, job: Job[P, R]) -> Rotation[P, R]:
        return self._long if job.steps > self._limits.long_steps else self._short

    def _is_older(self, one: Rotation[P, R], other: Rotation[P, R]) -> bool:
        """Whether the job at the front of one has waited longer."""
        first, second = one.front, other.front
        return second is None or (first is not None and first.number < second.number)

    def _drop_dead(self, backlog: Backlog[P, R], is_live: Callable[[Job[P, R]], bool]) -> bool:
        """Drop a stream's oldest jobs up to one that is live; whether there is one."""
        while backlog.jobs:
            if is_live(backlog.jobs[0]):
                return True
            del backlog.jobs[0]
            self._length -= 1
        del self._backlogs[backlog.key]
        return False
