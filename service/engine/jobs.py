"""What a batcher has in its hands: requests on their way, who waits for them, and what runs them.

A job is settled once, whoever comes to it first; its caller is woken when all of its own are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from service.core.errors import CarryError

P = TypeVar("P")
R = TypeVar("R")


class JobRequest(NamedTuple, Generic[P]):
    """What a caller wants done.

    Attributes:
        key: the stream, or None for work that continues no stream.
        steps: steps it needs.
    """

    payload: P
    key: Hashable | None
    steps: int


Results = asyncio.Future[list[R | CarryError]]


class Ticket(Generic[R]):
    """One caller, who waits for all of its jobs.

    Attributes:
        jobs: how many jobs the caller waits for.
        deadline_s: how long the caller waits, on the monotonic clock.
    """

    __slots__ = ("_left", "_results", "deadline_s", "future", "jobs")

    def __init__(self, jobs: int, deadline_s: float):
        self.jobs = jobs
        self.deadline_s = deadline_s
        self.future: Results[R] = asyncio.get_running_loop().create_future()
        self._results: list[R | CarryError | None] = [None] * jobs
        self._left = jobs

    def resolve(self, index: int, result: R | CarryError) -> None:
        """Give the caller one result, unless it left; the last one wakes it."""
        self._results[index] = result
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result([found for found in self._results if found is not None])


@dataclass(slots=True, eq=False)
class Job(Generic[P, R]):
    """One request on its way.

    Attributes:
        number: its place in the order of all jobs.
        attempts: how often it was in a batch before.
        submitted_s: when it came, of the monotonic clock.
        committing: from here on it may be done without anybody knowing.
        is_out_of_order: an earlier job of its stream went back to be done again meanwhile.
    """

    payload: P
    key: Hashable | None
    steps: int
    number: int
    submitted_s: float
    ticket: Ticket[R]
    index: int
    attempts: int = 0
    is_resolved: bool = False
    is_committing: bool = False
    is_out_of_order: bool = False

    @property
    def deadline_s(self) -> float:
        """Until when its caller waits, of the monotonic clock."""
        return self.ticket.deadline_s

    def resolve(self, result: R | CarryError) -> None:
        """Give the caller its result or its error, once."""
        if not self.is_resolved:
            self.is_resolved = True
            self.ticket.resolve(self.index, result)


Work = Coroutine[Any, Any, list[Job[Any, Any]]]


class BatchControl:
    """Lets a batch release its streams, or detach some of its jobs, before it ends.

    Attributes:
        is_alone: whether no other batch is under way now and nothing waits for one.
    """

    __slots__ = ("_detach", "_held", "_is_alone", "_on_release")

    def __init__(
        self,
        held: set[Hashable],
        on_release: Callable[[Hashable], None],
        is_alone: Callable[[], bool],
        detach: Callable[[list[Job[Any, Any]], Work], asyncio.Task[None]],
    ):
        self._held = held
        self._on_release = on_release
        self._is_alone = is_alone
        self._detach = detach

    def release_stream(self, key: Hashable) -> None:
        """Let the next job of a stream run before this batch ends."""
        if key in self._held:
            self._held.discard(key)
            self._on_release(key)

    def detach(self, jobs: list[Job[P, R]], work: Work) -> asyncio.Task[None]:
        """Remove jobs from the batch and run work on them as a task of its own, without a slot.

        Args:
            work: settles the jobs; returns those to be retried.

        Returns:
            The task of the work.
        """
        return self._detach(jobs, work)

    @property
    def is_alone(self) -> bool:
        return self._is_alone()


Run = Callable[[list[Job[P, R]], BatchControl], Awaitable[list[Job[P, R]]]]
"""Settles the jobs of a batch, which are of different streams. May release a stream's next job
before that, once it can go on from what this one left. Returns the jobs to be done again."""
