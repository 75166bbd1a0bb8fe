"""Queue entries of the batcher: requests, jobs, tickets, and the interface to a running batch.

A job is resolved exactly once, by whichever part gets to it first. The future of its caller is
completed when all jobs of the caller are resolved.
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
    """A unit of work that a caller submits.

    Attributes:
        key: the stream; None for work without a stream.
        steps: its steps, on which the size of a batch depends.
    """

    payload: P
    key: Hashable | None
    steps: int


Results = asyncio.Future[list[R | CarryError]]


class Ticket(Generic[R]):
    """One caller, which waits for the results of all of its jobs.

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
        """Set one result; the last one completes the future, unless it was cancelled."""
        self._results[index] = result
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result([each for each in self._results if each is not None])


@dataclass(slots=True, eq=False)
class Job(Generic[P, R]):
    """One request in the queue or in a batch.

    Attributes:
        number: position in the order of all jobs.
        submitted_s: time of submission, on the monotonic clock.
        attempts: number of batches that it was in before.
        is_committing: its commit was sent, so it may have been applied even if it fails.
        is_out_of_order: an earlier job of its stream is being retried, so it has to be retried too.
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
        """Time until which its caller waits, on the monotonic clock."""
        return self.ticket.deadline_s

    def resolve(self, result: R | CarryError) -> None:
        """Resolve the job with a result or an error; only the first call has an effect."""
        if not self.is_resolved:
            self.is_resolved = True
            self.ticket.resolve(self.index, result)


Work = Coroutine[Any, Any, list[Job[Any, Any]]]


class BatchControl:
    """What a running batch can ask of the batcher: release streams early, detach jobs."""

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
        """Remove jobs from the batch and continue them in a task of its own, which needs no slot.

        Args:
            work: resolves the jobs; returns those to be retried.

        Returns:
            The task of the work.
        """
        return self._detach(jobs, work)

    @property
    def is_alone(self) -> bool:
        """Whether no other batch is running and the queue is empty."""
        return self._is_alone()


Run = Callable[[list[Job[P, R]], BatchControl], Awaitable[list[Job[P, R]]]]
"""Runs a batch: resolves its jobs, each of another stream, and returns those to be retried. May
release a stream before it ends, once the stream's next job can be computed."""
